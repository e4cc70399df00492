"""Reserved: what a model's generation stands on - cache, weights, rotary table and step - kept together and current."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastllama.cache.budget import CacheShape
from fastllama.cache.float_cache import FloatCache
from fastllama.cache.small_cache import SmallCache, cache_for
from fastllama.decode.binding import Binding
from fastllama.decode.cache_device import model_device
from fastllama.decode.cache_device import words as device_words
from fastllama.decode.context.choose import context_for
from fastllama.decode.context.choose import words as context_words
from fastllama.decode.turn import Result, Turn, in_turn, require_free
from fastllama.model.capture import CapturedStep
from fastllama.model.compiled import Buckets, compiled_step
from fastllama.model.config import FastConfig
from fastllama.model.layered_step import LayeredStep, layer_obstacle
from fastllama.model.native_step import NativeStep, obstacle
from fastllama.model.rotary import RotaryTable
from fastllama.model.small_linear import small_tensors
from fastllama.model.weights import Weights

# A reservation on first use takes no time for compiling or measuring, and leaves the weights where they are.
IMPLICIT = FastConfig(products="stock")

# Of the native step, that take a text in no later than one pass for any number of tokens, on models of 1 M to 1.1 G
# numbers in any of the types that it multiplies.
_FEW_PASSES = 2


class Reserved:
    """It belongs to one model, follows what is rebound there, and says in words which path it makes."""

    def __init__(self, default: FastConfig | None = None):
        self.turn = Turn()  # one thread's call at a time, whichever path it takes
        self.fast = Turn()  # one call at a time that runs here: a call within it does not
        self.default = default  # what from_pretrained was told
        self.config = default or IMPLICIT
        self.explicit = False
        self.cache: FloatCache | SmallCache | None = None
        self.rotary: RotaryTable | None = None
        self.context: Any = None  # ContextShift or SelfExtend, what moves keys of a long text: context/
        self.binding = Binding(in_use=self.fast.is_taken)
        self.reallocations = 0
        self._step: Callable[..., torch.Tensor] | None = None
        self._native: NativeStep | None = None
        self._native_obstacle: str | None = None
        self._layer_obstacle: str | None = None  # why a static step is compiled whole
        self._addresses: tuple[int, ...] | None = None  # of the weights that captured graphs read
        self._buckets: Buckets | None = None

    @property
    def weights(self) -> Weights | None:
        """What the forward passes read."""
        return self.binding.weights

    def alone(self, name: str, work: Callable[[], Result]) -> Result:
        """What `work()` returns, run when no other call uses the cache. `ValueError`, by `name`, within such a call."""
        refused = f"{name} cannot run"
        return in_turn([self.turn], lambda: require_free([self.fast], work, refused), refused)

    def _reserve(self, model: nn.Module, shape: CacheShape, config: FastConfig) -> None:
        self.context = context_for(model, config, shape)
        self.config = config
        self.cache = cache_for(shape, stock=config.products == "stock")
        self.refresh(model)
        self._attach(model)

    def _attach(self, model: nn.Module) -> None:
        self._make_rotary(model)
        self._make_step(model)
        self.reallocations += 1

    def _make_rotary(self, model: nn.Module) -> None:
        shape = self.cache.shape
        self.rotary = RotaryTable(model.model.rotary_emb, shape.reserved_length, shape.dtype, model_device(model))

    def _why_whole(self) -> str | None:
        return layer_obstacle(self.weights, self.cache) if self.config.compile == "static" else None

    def _make_step(self, model: nn.Module) -> None:
        self._native = self._addresses = None
        shape, mode = self.cache.shape, self.config.compile
        if mode == "native":
            self._native_obstacle = obstacle(model, shape)
            if self._native_obstacle is None:
                offset_B = None if self.context is None else self.context.offset_B
                self._native = NativeStep(self.weights, self.cache, self.rotary, offset_B)
        self._layer_obstacle = self._why_whole()
        by_layer = mode == "static" and self._layer_obstacle is None
        # What a module that is not a plain product does may change without its weights' addresses changing.
        self._step = compiled_step(mode, shape.device, shape.device.type == "cuda" and self.weights.plain, by_layer)
        marked = mode not in ("no", "native") and not by_layer
        self._buckets = Buckets(self.cache.positions, shape.cache_length, self.config.bucket, marked)

    def free(self) -> None:
        """Gives the cache, the tables and the compiled step back."""
        # In an order in which each beginning leaves what the next call can make whole.
        self.explicit = False
        self.cache = None
        self.config = self.default or IMPLICIT
        self._step = self._native = self._buckets = self._addresses = self.context = None
        self.forget_weights()

    def forget_weights(self) -> None:
        """Lets go of weights and tables that a move, a cast or a loaded state dict is about to replace."""
        self.binding.forget()
        self.rotary = self._native = None

    def refresh(self, model: nn.Module) -> None:
        """Follows what has been rebound since the last call: adapters, casts and assigned state dicts do that."""
        try:
            self._follow(model)
        except BaseException:  # half of it is new: all of it is read again
            self.forget_weights()
            raise

    def _follow(self, model: nn.Module) -> None:
        plain = self.weights.plain if self.weights is not None else None
        stale = not self.binding.is_current(model)
        if stale:
            self._native = None
            self.binding.read(model, self.config, self.cache.shape.batch_size if self.cache is not None else 1)
        if self.cache is None:
            return
        self._watch_addresses(model)
        if self.rotary is None or self.rotary.module is not model.model.rotary_emb:
            self._make_rotary(model)
            stale = stale or self.config.compile == "native"
        if stale and self._step is not None and self._is_outdated(plain):
            self._make_step(model)

    def _is_outdated(self, was_plain: bool | None) -> bool:
        """Whether the step is not the one to make for weights that were read anew."""
        bound = self.config.compile == "native" or isinstance(self._step, LayeredStep)
        return bound or self.weights.plain != was_plain or self._why_whole() != self._layer_obstacle

    def _watch_addresses(self, model: nn.Module) -> None:
        """Drops captured graphs when any parameter has moved since they were captured."""
        if isinstance(self._step, CapturedStep):
            addresses = tuple(tensor.data_ptr() for tensor in (*model.parameters(), *small_tensors(model)))
            if self._addresses not in (None, addresses):
                self._step.reset()
            self._addresses = addresses

    def widest(self) -> int | None:
        """Tokens of a row that the native step takes at once; None where it does not run."""
        return None if self._native is None else max(self._native.most_rows // self.cache.shape.batch_size, 1)

    def few(self, tokens: int) -> int | None:
        """Tokens of a row at a time, where native steps take so many in soonest; None where they do not."""
        widest = self.widest()
        return widest if widest is not None and tokens <= _FEW_PASSES * widest else None

    def words(self, whole_prompts: bool = True) -> str:
        """Which path runs, for people. `whole_prompts`: they went through `prefill`."""
        kind = "preallocated" if self.explicit else "preallocated on first use"
        how, attention = f"{self.config.compile} compile", ", SDPA by kv group"
        if self.config.compile == "static" and self.rotary.device.type == "cpu":
            how += " by layer" if self._layer_obstacle is None else f" of the whole step ({self._layer_obstacle})"
        if self._native is not None:
            how, attention = "native step", ""
        elif self.config.compile == "native":
            how = f"no compile (the native step is not possible: {self._native_obstacle})"
        if isinstance(self.cache, SmallCache):
            attention = f", {self.cache.words}"
        elif self.weights.prompt_attention.first == "native":
            attention += ", C++ prompt attention"
        elif self.weights.prompt_attention.later == "native":
            attention += ", C++ attention of a prompt's later chunks"
        if self._native is not None and self.context is None and whole_prompts:  # a context has its own way with them
            few = min(_FEW_PASSES * self.widest(), self.config.prefill_chunk or _FEW_PASSES * self._native.most_rows)
            attention += f", prompts of up to {few} tokens in native steps"
        attention += device_words(self.config, self.rotary.device)
        return f"{kind}, {how}, {self.weights.words}{attention}{context_words(self.config, self.context)}"
