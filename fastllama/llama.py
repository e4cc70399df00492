"""LlamaForCausalLM: transformers' class, generating from a preallocated cache."""

import functools

import torch
import transformers
from transformers.utils import logging

from fastllama.decode.engine import Engine
from fastllama.decode.loop import sample_loop
from fastllama.decode.prompt import unpad
from fastllama.decode.support import call_obstacle, model_obstacle
from fastllama.model.config import FastConfig

logger = logging.get_logger("fastllama")


def _on_ordinary_tensors(method):
    """Runs a method without gradients and outside inference mode, which compiled code would take for another world."""

    @functools.wraps(method)
    def run(*args, **kwargs):
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return run


class LlamaForCausalLM(transformers.LlamaForCausalLM):
    """A `transformers.LlamaForCausalLM` whose greedy and sampled generation runs on a preallocated cache.

    Everything else is the parent's: `forward`, loading, saving, training, adapters, beam search. `generate` takes the
    parent's arguments and gives the parent's results; `path` says which way the last call went.
    """

    _given_cache = False  # whether the generate call in progress was handed past_key_values

    def __init__(self, config):
        super().__init__(config)
        self._engine = Engine()
        self._path = "no call yet"

    # reservation

    @_on_ordinary_tensors
    def preallocate(
        self, batch_size: int = 1, cache_length: int | None = None, config: FastConfig | None = None, **switches
    ) -> int:
        """Reserves, compiles and warms up now; returns the bytes that the reservation takes.

        `cache_length` counts prompt and new tokens of a row (default: max_position_embeddings). `switches` are fields
        of `FastConfig`, for `config` left out. Raises `ValueError` for a value that is not allowed or a model that
        the fast path cannot run, `MemoryError` for what does not fit; the earlier reservation is kept then.
        """
        if config is not None and switches:
            raise ValueError("pass either config or single switches to preallocate, not both")
        unknown = sorted(switches.keys() - FastConfig.__dataclass_fields__.keys())
        if unknown:
            allowed = ", ".join(FastConfig.__dataclass_fields__)
            raise ValueError(f"preallocate has no switch {unknown[0]!r}; allowed: {allowed}")
        config = FastConfig(**switches) if config is None else config
        obstacle = model_obstacle(self)
        if obstacle is not None:
            raise ValueError(f"preallocate cannot be honoured: {obstacle}")
        longest = self.config.max_position_embeddings
        cache_length = longest if cache_length is None else cache_length
        nbytes = self._engine.preallocate(self, batch_size, cache_length, config)
        if cache_length > longest:
            logger.warning(
                f"cache_length {cache_length} is longer than max_position_embeddings {longest}: "
                "the model was not trained for positions beyond it"
            )
        return nbytes

    def free(self) -> None:
        """Gives back what `preallocate` or the first `generate` took."""
        self._engine.free()

    @property
    def valid_past_index(self) -> torch.Tensor | None:
        """int64 [B]: how many cache positions of each row hold tokens; None without a cache."""
        return None if self._engine.cache is None else self._engine.cache.valid_past_index

    @property
    def path(self) -> str:
        """Which path the last generation took."""
        return self._path

    # forward passes for people who write their own loop

    @_on_ordinary_tensors
    def prefill(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Starts anew with prompts [B, T]; returns the logits [B, V] after each row's last token.

        Rows may be padded on the left (`attention_mask` [B, T], 0 at padding). Raises `ValueError` when an explicit
        cache is too small or the model's forward must stay the parent's.
        """
        self._require_fast()
        prompt = unpad(input_ids, attention_mask)
        self._engine.refresh(self)
        self._engine.fit(self, input_ids.shape[0], prompt.longest)
        self._engine.begin(self, input_ids.shape[0])
        return self._engine.prefill(prompt).clone()

    @_on_ordinary_tensors
    def step(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Appends tokens [B, Q] to the rows of the last prefill; returns logits [B, Q, V].

        Raises `ValueError` before any prefill, for another number of rows, or when an explicit cache is full.
        """
        self._require_fast()
        self._engine.require_rows(input_ids.shape[0])
        self._engine.refresh(self)
        while self._engine.room() < input_ids.shape[1]:
            self._engine.grow(self)
        return self._engine.step(input_ids.to(self.device)).clone()

    def _require_fast(self) -> None:
        obstacle = model_obstacle(self)
        if obstacle is not None:
            raise ValueError(f"prefill and step cannot run: {obstacle}")

    # generation

    @functools.wraps(transformers.LlamaForCausalLM.generate)
    def generate(self, *args, **kwargs):
        self._path = None
        self._given_cache = kwargs.get("past_key_values") is not None
        try:
            result = super().generate(*args, **kwargs)
        finally:
            self._given_cache = False
        if self._path is None:
            self._say_parent("this decoding mode is not sped up")
        return result

    def _sample(
        self,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus=False,
        streamer=None,
        **model_kwargs,
    ):
        obstacle = "past_key_values are given" if self._given_cache else None
        obstacle = obstacle or model_obstacle(self)
        obstacle = obstacle or call_obstacle(self, generation_config, synced_gpus, model_kwargs)
        if obstacle is not None:
            self._say_parent(obstacle)
            return super()._sample(
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **model_kwargs,
            )
        with torch.inference_mode(False), torch.no_grad():
            result = sample_loop(
                self,
                self._engine,
                _ordinary(input_ids),
                logits_processor,
                stopping_criteria,
                generation_config,
                streamer,
                attention_mask=_ordinary(model_kwargs.get("attention_mask")),
                inputs_embeds=_ordinary(model_kwargs.get("inputs_embeds")),
            )
        self._path = self._engine.words()
        return result

    def _say_parent(self, reason: str) -> None:
        self._path = f"parent: {reason}"
        logger.warning_once(f"fastllama: generate runs transformers' own code: {reason}")

    # what rebinds weights

    def _apply(self, fn, recurse=True):
        # A move or cast makes new tensors; holding the fused ones would hold the weights twice.
        self._engine.weights = None
        return super()._apply(fn, recurse)


def _ordinary(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor.clone() if tensor is not None and tensor.is_inference() else tensor
