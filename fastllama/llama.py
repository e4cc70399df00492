"""LlamaForCausalLM: transformers' class, generating from a preallocated cache."""

import functools
from contextvars import ContextVar

import torch
import transformers
from transformers.utils import logging

from fastllama.decode import own_loop
from fastllama.decode.assisted.call import assisted_call
from fastllama.decode.assisted.companions import Companions
from fastllama.decode.assisted.report import Assisted
from fastllama.decode.assisted.support import ASKED, own_arguments
from fastllama.decode.context.choose import positions_used, require_unmoved
from fastllama.decode.engine import Engine
from fastllama.decode.loop import sample_loop
from fastllama.decode.many.call import SHARED, run_many
from fastllama.decode.many.result import Generated
from fastllama.decode.reservation import within
from fastllama.decode.sampling import call as sampling_call
from fastllama.decode.sampling.options import Sampling
from fastllama.decode.support import call_obstacle, model_obstacle
from fastllama.decode.switches import switched
from fastllama.model.config import FastConfig
from fastllama.model.small_linear import held_format
from fastllama.model.small_loading import known_to_transformers, quantised_by

logger = logging.get_logger("fastllama")
# Whether the generate call in progress, in this thread, was handed past_key_values.
_given_cache: ContextVar[bool] = ContextVar("given_cache", default=False)
# What that call itself says about assistance, which transformers reads from the draft's generation config only.
_asked: ContextVar[dict | None] = ContextVar("asked", default=None)


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
    parent's arguments and gives the parent's results; `path` says which way the last call went. With
    `generate(sampling=Sampling(...))` it draws by llama.cpp's options, in transformers' order or in llama.cpp's.
    """

    default_fast: FastConfig | None = None  # what `register` was told

    def __init__(self, config):
        super().__init__(config)
        self._engine = Engine()
        self._companions = Companions()
        self._path = "no call yet"
        self._assisted = None

    @classmethod
    @functools.wraps(transformers.LlamaForCausalLM.from_pretrained.__func__)
    def from_pretrained(cls, *args, fast: FastConfig | None = None, **kwargs):
        """The parent's; `fast` is how the model generates where `preallocate` is not told otherwise.

        Without it, what `register` was told holds. `fast.weights` quantises the weights while they are loaded, one
        tensor at a time. Raises `ValueError` for weights that cannot be held so.
        """
        if fast is not None and not isinstance(fast, FastConfig):
            raise ValueError(f"fast={fast!r} is not allowed; allowed: None or a FastConfig")
        fast = cls.default_fast if fast is None else fast
        weights = None if fast is None else fast.weights
        with known_to_transformers(weights):
            result = super().from_pretrained(*args, **quantised_by(weights, kwargs))
        model = result[0] if isinstance(result, tuple) else result
        # Small weights are for the C++ products, which stock products do without.
        model._engine.default = FastConfig() if fast is None and held_format(model) is not None else fast
        model._engine.free()
        return result

    # reservation

    @_on_ordinary_tensors
    def preallocate(
        self,
        batch_size: int = 1,
        cache_length: int | None = None,
        config: FastConfig | None = None,
        memory: int | str | None = None,
        **switches,
    ) -> int:
        """Reserves, compiles and warms up now; returns the bytes that the reservation takes.

        `cache_length` counts prompt and new tokens of a row (default: max_position_embeddings). `switches` are fields
        of `FastConfig`, for `config` left out; the others are as `from_pretrained` was told. `memory` ("24GB", "16GiB",
        or bytes) is what weights and cache may take together: keys and values get the most exact format that fits,
        unless cache_k or cache_v says which; `path` then says what was chosen. Raises `ValueError` for a value that is
        not allowed or a model that the fast path cannot run, `MemoryError` for what does not fit, and keeps the earlier
        reservation then.
        """
        config = switched(config, self._engine.default, switches)
        obstacle = model_obstacle(self)
        if obstacle is not None:
            raise ValueError(f"preallocate cannot be honoured: {obstacle}")
        longest = self.config.max_position_embeddings
        cache_length = longest if cache_length is None else cache_length
        if memory is not None:
            config = within(self, batch_size, cache_length, config, memory)
        nbytes = self._engine.preallocate(self, batch_size, cache_length, config)
        if positions_used(config, cache_length) > longest:
            logger.warning(
                f"cache_length {cache_length} is longer than max_position_embeddings {longest}: "
                "the model was not trained for positions beyond it"
            )
        return nbytes

    def free(self) -> None:
        """Gives back what `preallocate` or the first `generate` took."""
        self._engine.free()
        self._companions.free()

    @property
    def valid_past_index(self) -> torch.Tensor | None:
        """int64 [B]: how many cache positions of each row hold tokens; None without a cache."""
        return None if self._engine.cache is None else self._engine.cache.valid_past_index

    @property
    def path(self) -> str:
        """Which path the last generation took."""
        return self._path

    @property
    def assisted(self) -> Assisted | None:
        """What assistance did in the last generation; None where it was not asked for, or the parent's code ran."""
        return self._assisted

    # forward passes for people who write their own loop

    @_on_ordinary_tensors
    def prefill(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Starts anew with prompts [B, T]; returns the logits [B, V] after each row's last token.

        Rows may be padded on the left (`attention_mask` [B, T], 0 at padding). Raises `ValueError` when an explicit
        cache is too small or the model's forward must stay the parent's.
        """
        return own_loop.prefill(self, self._engine, input_ids, attention_mask)

    @_on_ordinary_tensors
    def step(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Appends tokens [B, Q] to the rows of the last prefill; returns logits [B, Q, V].

        The model must be as it was at the prefill. Raises `ValueError` before any prefill, for another number of
        rows, without a token, or when an explicit cache is full.
        """
        return own_loop.step(self, self._engine, input_ids)

    # generation

    @functools.wraps(transformers.LlamaForCausalLM.generate)
    def generate(self, *args, sampling: Sampling | None = None, **kwargs):
        if sampling is not None:
            args, kwargs = (), sampling_call.arguments(self, sampling, args, kwargs)
        self._path = self._assisted = None
        own = own_arguments(kwargs)
        given = _given_cache.set(kwargs.get("past_key_values") is not None)
        config = args[1] if len(args) > 1 else kwargs.get("generation_config")
        asked = _asked.set({name: (own | kwargs).get(name, getattr(config, name, None)) for name in ASKED})
        try:
            result = super().generate(*args, **kwargs)
        finally:
            _given_cache.reset(given)
            _asked.reset(asked)
        if self._path is None:
            self._say_parent("this decoding mode is not sped up")
        logger.info("generated: %s", self._path)
        return result

    @_on_ordinary_tensors
    def generate_many(
        self,
        prompts,
        slots: int | None = None,
        max_new_tokens=None,
        generation_config=None,
        chunk: int | None = None,
        shared_prefix: int | None = SHARED,
        on_result=None,
        sampling: Sampling | None = None,
        **kwargs,
    ) -> list[Generated]:
        """Generates for any number of prompts, `slots` at a time; a finished prompt's place is taken at once.

        `prompts`: lists of token ids or 1-D tensors, every id of which counts. `slots` (8, or the rows that
        `preallocate` reserved) rows decode together. `max_new_tokens`: a number, or one for each prompt. A newcomer is
        prefilled `chunk` tokens at a time between steps. What all prompts begin with is computed once where it has
        `shared_prefix` tokens (None: never). `sampling` has a row for each prompt; with seeds a text is what `generate`
        draws for that prompt alone with `sampling.of_row(index)`. `generation_config` and `kwargs` are `generate`'s;
        max_time counts from this call, and processors and criteria see one row at a time. Returns a `Generated` for
        each prompt, in order; `on_result(index, result)` is called as soon as one is there. A prompt that cannot run
        has an error in its result, and the others go on. Raises `ValueError` for what is not allowed or only the
        parent's code can do, `MemoryError` for slots that do not fit.
        """
        self._path = self._assisted = None
        how = (slots, max_new_tokens, generation_config, chunk, shared_prefix, on_result, kwargs, sampling)
        results, self._path = run_many(self, self._engine, prompts, *how)
        return results

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
        sampling_call.begin(logits_processor, input_ids, model_kwargs.get("attention_mask"))
        obstacle = "past_key_values are given" if _given_cache.get() else None
        obstacle = obstacle or model_obstacle(self)
        obstacle = obstacle or call_obstacle(self, generation_config, synced_gpus, model_kwargs)
        # One cache serves one call at a time: another thread's, or one from within a processor, is the parent's.
        if obstacle is None and not self._engine.lock.acquire(blocking=False):
            obstacle = "another call is using the cache"
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
        try:
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
        finally:
            self._engine.binding.forget_restored()
            self._engine.lock.release()
        return result

    def _assisted_decoding(
        self,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus=False,
        streamer=None,
        inputs_tensor=None,
        assistant_model=None,
        assistant_tokenizer=None,
        tokenizer=None,
        **model_kwargs,
    ):
        """The parent's, which takes one row, for any number of rows."""
        sampling_call.begin(logits_processor, input_ids, model_kwargs.get("attention_mask"))
        how = (logits_processor, stopping_criteria, generation_config)
        draft = assistant_model if generation_config.prompt_lookup_num_tokens is None else None
        for config in (self._engine.config, *_config_of(draft)):
            require_unmoved(config, "assisted generation, which takes tokens back that may have moved")
        obstacle = "past_key_values are given" if _given_cache.get() else None
        obstacle = obstacle or model_obstacle(self)
        obstacle = obstacle or call_obstacle(self, generation_config, synced_gpus, model_kwargs)
        if obstacle is None:
            with torch.inference_mode(False):
                ids = _ordinary(input_ids)
                inputs = model_kwargs | {"attention_mask": _ordinary(model_kwargs.get("attention_mask"))}
            other_tokenizer = not self._companions.same_tokenizer(tokenizer, assistant_tokenizer)
            obstacle, result, report, words = assisted_call(
                self, self._engine, self._companions, _asked.get(), draft, other_tokenizer, ids, how, streamer, inputs
            )
        if obstacle is None:
            self._assisted, self._path = report, words
            return result
        sampling_call.require_stateless(logits_processor, obstacle)
        self._say_parent(obstacle)
        result = super()._assisted_decoding(
            input_ids,
            *how,
            synced_gpus=synced_gpus,
            streamer=streamer,
            inputs_tensor=inputs_tensor,
            assistant_model=assistant_model,
            assistant_tokenizer=assistant_tokenizer,
            tokenizer=tokenizer,
            **model_kwargs,
        )
        self._path = f"parent: {obstacle}"  # a draft that is this model has made calls of its own
        return result

    def _say_parent(self, reason: str) -> None:
        self._path = f"parent: {reason}"
        logger.warning_once(f"fastllama: generate runs transformers' own code: {reason}")

    # what rebinds weights: new tensors are made there, and holding the fused ones would hold the weights twice

    def _apply(self, fn, recurse=True):
        self._engine.forget_weights()
        return super()._apply(fn, recurse)

    def resize_token_embeddings(self, new_num_tokens=None, *args, **kwargs):
        held = held_format(self)
        if held is not None and new_num_tokens not in (None, self.config.vocab_size):
            raise ValueError(
                f"resize_token_embeddings({new_num_tokens}) cannot be honoured: the output matrix is held in few bits "
                f"(weights {held}): resize the float model, save it, and load that"
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def load_state_dict(self, *args, **kwargs):
        self._engine.forget_weights()
        return super().load_state_dict(*args, **kwargs)


def _config_of(draft) -> tuple[FastConfig, ...]:
    return (draft._engine.config,) if isinstance(draft, LlamaForCausalLM) else ()


def _ordinary(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor.clone() if tensor is not None and tensor.is_inference() else tensor
