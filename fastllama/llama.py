"""LlamaForCausalLM: transformers' class, generating from a preallocated cache."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
import transformers
from transformers import GenerationConfig, LlamaConfig
from transformers.generation.utils import GenerateOutput
from transformers.utils import logging

from fastllama.decode import own_loop
from fastllama.decode.assisted.call import assisted_call
from fastllama.decode.assisted.companions import Companions
from fastllama.decode.assisted.report import Assisted
from fastllama.decode.assisted.support import ASKED, own_arguments
from fastllama.decode.cache_name import CACHE_NAMES
from fastllama.decode.context.choose import positions_used, require_unmoved
from fastllama.decode.ending import well_ended
from fastllama.decode.engine import Engine
from fastllama.decode.loop import sample_loop
from fastllama.decode.many.call import SHARED, run_many
from fastllama.decode.many.result import Generated
from fastllama.decode.opening import opening
from fastllama.decode.ordinary import on_ordinary_tensors, ordinary
from fastllama.decode.reservation import within
from fastllama.decode.sampling import call as sampling_call
from fastllama.decode.sampling.options import Sampling
from fastllama.decode.support import model_obstacle
from fastllama.decode.switches import switched
from fastllama.decode.told import Told, telling, told
from fastllama.decode.turn import if_free, in_turn
from fastllama.model.config import FastConfig
from fastllama.model.small_linear import held_format
from fastllama.model.small_loading import known_to_transformers, quantised_by
from fastllama.model.spreading import asked_plainly, distribute

logger = logging.get_logger("fastllama")
_UNFINISHED = "in progress, or cut short"

_Method = TypeVar("_Method", bound=Callable)
_Model = TypeVar("_Model", bound="LlamaForCausalLM")


def _like(parents: Any) -> Callable[[_Method], _Method]:
    """functools.wraps that puts the method's own docstring first; a type checker still sees the method's arguments."""

    def wrap(method: _Method) -> _Method:
        own = method.__doc__
        made = functools.wraps(parents)(method)
        made.__doc__ = own if parents.__doc__ is None or own is None else f"{own}\n{parents.__doc__}"
        return cast(_Method, made)

    return wrap


class LlamaForCausalLM(transformers.LlamaForCausalLM):
    """A `transformers.LlamaForCausalLM` whose greedy and sampled generation runs on a preallocated cache.

    Everything else is the parent's: `forward`, loading, saving, training, adapters, beam search. `generate` takes the
    parent's arguments and gives the parent's results; `path` says which way the last call went. With
    `generate(sampling=Sampling(...))` it draws by llama.cpp's options, in transformers' order or in llama.cpp's.

    Calls of several threads take turns. Within a call (in a streamer, a processor) `generate` runs the parent's code,
    and what else needs the cache raises `ValueError`. An interrupted call leaves a model that the next one can use.
    """

    default_fast: FastConfig | None = None  # what `register` was told

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self._engine = Engine()
        self._companions = Companions()
        self._path = "no call yet"
        self._assisted: Assisted | None = None

    @classmethod
    @_like(transformers.LlamaForCausalLM.from_pretrained.__func__)  # type: ignore[attr-defined]  # it has one
    def from_pretrained(cls: type[_Model], *args: Any, fast: FastConfig | None = None, **kwargs: Any) -> _Model:
        """The parent's, whose words follow; `fast` is how it generates where `preallocate` is not told otherwise.

        Without it, what `register` was told holds. `fast.weights` quantises the weights while they are loaded, one
        tensor at a time. Raises `ValueError` for weights that cannot be held so.
        """
        if fast is not None and not isinstance(fast, FastConfig):
            raise ValueError(f"fast={fast!r} is not allowed; allowed: None or a FastConfig")
        fast = cls.default_fast if fast is None else fast
        weights = None if fast is None else fast.weights
        kwargs = asked_plainly(kwargs, weights)
        with known_to_transformers(weights):
            result = super().from_pretrained(*args, **quantised_by(weights, kwargs))
        model = result[0] if isinstance(result, tuple) else result
        # Small weights are for the C++ products, which stock products do without.
        model._engine.default = FastConfig() if fast is None and held_format(model) is not None else fast
        model.free()
        return result

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, mesh: Any) -> Any:
        """The parent's, for any number of kv heads: `from_pretrained` spreads a model over processes here."""
        return distribute(super().maybe_distribute_model, model, distributed_config, mesh)

    # reservation

    @on_ordinary_tensors
    def preallocate(
        self,
        batch_size: int = 1,
        cache_length: int | None = None,
        config: FastConfig | None = None,
        memory: int | str | None = None,
        **switches: Any,
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
        nbytes = self._engine.alone(
            "preallocate", lambda: self._engine.preallocate(self, batch_size, cache_length, config)
        )
        if positions_used(config, cache_length) > longest:
            logger.warning(
                f"cache_length {cache_length} is longer than max_position_embeddings {longest}: "
                "the model was not trained for positions beyond it"
            )
        return nbytes

    def free(self) -> None:
        """Gives back what `preallocate` or the first `generate` took."""

        def free():
            self._engine.free()
            self._companions.free()

        self._engine.alone("free", free)

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

    @on_ordinary_tensors
    def prefill(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Starts anew with prompts [B, T]; returns the logits [B, V] after each row's last token.

        Rows may be padded on the left (`attention_mask` [B, T], 0 at padding). Raises `ValueError` when an explicit
        cache is too small or the model's forward must stay the parent's.
        """
        return own_loop.prefill(self, self._engine, input_ids, attention_mask)

    @on_ordinary_tensors
    def step(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Appends tokens [B, Q] to the rows of the last prefill; returns logits [B, Q, V].

        The model must be as it was at the prefill. Raises `ValueError` before any prefill, for another number of
        rows, without a token, or when an explicit cache is full.
        """
        return own_loop.step(self, self._engine, input_ids)

    # generation

    @_like(transformers.LlamaForCausalLM.generate)
    def generate(
        self, *args: Any, sampling: Sampling | None = None, **kwargs: Any
    ) -> GenerateOutput | torch.LongTensor:
        """The parent's, whose words follow: token ids [B, T], prompts and new ones, or its output class.

        `sampling` draws by llama.cpp's options, greedily at temperature 0. Raises `ValueError` for options by row that
        are for another number of rows, or that do not go with other arguments. `path` says afterwards what ran.
        """
        if sampling is not None:
            args, kwargs = (), sampling_call.arguments(self, sampling, args, kwargs)
        draft = kwargs.get("assistant_model")
        turns = [each._engine.turn for each in (self, draft) if isinstance(each, LlamaForCausalLM)]
        return in_turn(turns, lambda: self._generate(*args, **kwargs))

    def _generate(self, *args, **kwargs):
        self._path, self._assisted = _UNFINISHED, None
        own = own_arguments(kwargs)
        config = args[1] if len(args) > 1 else kwargs.get("generation_config")
        asked = {name: (own | kwargs).get(name, getattr(config, name, None)) for name in ASKED}
        given = any(kwargs.get(name) is not None for name in CACHE_NAMES)
        result = telling(Told(given, asked), functools.partial(super().generate, *args, **kwargs))
        if self._path is _UNFINISHED:
            self._say_parent("this decoding mode is not sped up")
        logger.info("generated: %s", self._path)
        return result

    @on_ordinary_tensors
    def generate_many(
        self,
        prompts: Iterable[Sequence[int] | torch.Tensor],
        slots: int | None = None,
        max_new_tokens: int | Sequence[int | None] | None = None,
        generation_config: GenerationConfig | None = None,
        chunk: int | None = None,
        shared_prefix: int | None = SHARED,
        on_result: Callable[[int, Generated], object] | None = None,
        sampling: Sampling | None = None,
        **kwargs: Any,
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
        self._path, self._assisted = _UNFINISHED, None
        how = (slots, max_new_tokens, generation_config, chunk, shared_prefix, on_result, kwargs, sampling)
        run = functools.partial(run_many, self, self._engine, prompts, *how)
        results, self._path = in_turn([self._engine.turn], run, "generate_many cannot run")
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
        obstacle = opening(self, input_ids, logits_processor, generation_config, synced_gpus, model_kwargs)
        how = (logits_processor, stopping_criteria, generation_config)

        def fast():
            with torch.inference_mode(False), torch.no_grad():
                mask, embeds = (ordinary(model_kwargs.get(name)) for name in ("attention_mask", "inputs_embeds"))
                tensors = {"attention_mask": mask, "inputs_embeds": embeds}
                result = sample_loop(self, self._engine, ordinary(input_ids), *how, streamer, **tensors)
            self._path = self._engine.words()
            return result

        if obstacle is None:
            # One cache serves one call at a time: one from within a processor, say, is the parent's.
            ran, result = if_free([self._engine.fast], lambda: well_ended(self._engine, fast))
            if ran:
                return result
            obstacle = "another call is using the cache"
        self._say_parent(obstacle)
        return super()._sample(input_ids, *how, synced_gpus=synced_gpus, streamer=streamer, **model_kwargs)

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
        obstacle = opening(self, input_ids, logits_processor, generation_config, synced_gpus, model_kwargs)
        how = (logits_processor, stopping_criteria, generation_config)
        draft = assistant_model if generation_config.prompt_lookup_num_tokens is None else None
        for config in (self._engine.config, *_config_of(draft)):
            require_unmoved(config, "assisted generation, which takes tokens back that may have moved")
        if obstacle is None:
            with torch.inference_mode(False):
                ids = ordinary(input_ids)
                inputs = model_kwargs | {"attention_mask": ordinary(model_kwargs.get("attention_mask"))}
            other_tokenizer = not self._companions.same_tokenizer(tokenizer, assistant_tokenizer)
            obstacle, result, report, words = assisted_call(
                self,
                self._engine,
                self._companions,
                told().assistance or {},
                draft,
                other_tokenizer,
                ids,
                how,
                streamer,
                inputs,
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
        rebind = functools.partial(super()._apply, fn, recurse)
        return self._rebinding("moving or casting the model", rebind)

    def _rebinding(self, name: str, rebind):
        def run():
            self._engine.forget_weights()
            return rebind()

        return self._engine.alone(name, run)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
    ) -> torch.nn.Embedding:
        """The parent's. Raises `ValueError` for another size while the output matrix is held in few bits."""
        held = held_format(self)
        if held is not None and new_num_tokens not in (None, self.config.vocab_size):
            raise ValueError(
                f"resize_token_embeddings({new_num_tokens}) cannot be honoured: the output matrix is held in few bits "
                f"(weights {held}): resize the float model, save it, and load that"
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's; what was fused or packed of the old weights is let go first."""
        return self._rebinding("load_state_dict", functools.partial(super().load_state_dict, *args, **kwargs))


def _config_of(draft) -> tuple[FastConfig, ...]:
    return (draft._engine.config,) if isinstance(draft, LlamaForCausalLM) else ()
