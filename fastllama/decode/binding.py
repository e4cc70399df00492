"""Binding: a model's weights as the fast path reads them, kept current and never held twice."""

from collections.abc import Callable

from torch import nn

from fastllama.kernels.small_weights import canonical
from fastllama.kernels.tune import Chooser
from fastllama.model.compiled import run_for
from fastllama.model.config import FastConfig
from fastllama.model.released import Packing
from fastllama.model.released_small import SmallPacking
from fastllama.model.small_linear import held_format, is_small, small_tensors
from fastllama.model.sources import Sources, all_modules
from fastllama.model.spread import local, processes
from fastllama.model.weights import Weights, gather


def chooser(model: nn.Module, config: FastConfig, rows: int, nbytes: int = 0) -> Chooser:
    """Who picks each product's formulation. Raises `ValueError` where the one asked for does not exist."""
    if config.products == "packed" and processes(model) > 1:
        raise ValueError("products='packed' cannot be honoured: weights that are spread over processes are not packed")
    wanted = "native" if config.compile == "native" else config.products
    like = model.model.norm.weight
    small = {(module.format, module.in_features) for module in all_modules(model) if is_small(module)}
    choose = Chooser(wanted, rows, nbytes, like, run_for(config.compile, like.device), bool(small))
    for format, columns in small:
        choose.require_small(format, columns)
    return choose


def require_weights(model: nn.Module, weights: str | None) -> None:
    """Raises `ValueError` where the model's weights are not held as `weights`, a name of `WEIGHTS`, says."""
    held = held_format(model)
    if weights is not None and canonical(weights) != held:
        raise ValueError(
            f"weights={weights!r} cannot be honoured: the model holds its weights as {held or 'floats'}, and they are "
            f"quantised while loading: LlamaForCausalLM.from_pretrained(..., fast=FastConfig(weights={weights!r}))"
        )


class Binding:
    """`in_use` tells whether a call is in progress, which goes on with packed weights that somebody asked for."""

    def __init__(self, in_use: Callable[[], bool]):
        self.in_use = in_use
        self.weights: Weights | None = None
        self._sources: Sources | None = None
        self._packing: Packing | None = None

    def is_current(self, model: nn.Module) -> bool:
        """Whether what was read still is what the model would compute with."""
        return self.weights is not None and not self._packing.restored and self._sources.are_current(model)

    @property
    def is_whole(self) -> bool:
        """Whether a step can go on with what was read: nothing was forgotten, or asked for, since."""
        return self.weights is not None and not self._packing.restored

    def read(self, model: nn.Module, config: FastConfig, rows: int) -> None:
        """Reads the weights anew, for steps of `rows` rows."""
        self.forget()  # never hold the old and the new at once
        choose = chooser(model, config, rows, _bytes_held(model))
        packing = Packing(self.in_use)
        packing.small = SmallPacking(packing, self.in_use, self._let_go)
        try:
            self._packing = packing
            weights = gather(model, config.fuse, choose, choose.attention, packing)
            self._sources = Sources(model)
            self.weights = weights
        except BaseException:
            self.forget()
            raise

    def forget(self) -> None:
        """Lets go of everything; what was packed becomes parameters again."""
        self.weights = self._sources = None
        if self._packing is not None:
            self._packing.restore()
        self._packing = None

    def _let_go(self) -> None:
        """Keeps what can be said of weights that are parameters again, and none of their tensors."""
        if self.weights is not None:
            self.weights = self.weights._replace(embed=None, blocks=(), norm=None, lm_head=None)

    def forget_restored(self) -> None:
        """After a call within which somebody asked for packed weights: they are parameters again, and held once."""
        if self._packing is not None and self._packing.restored:
            self.forget()


def _bytes_held(model: nn.Module) -> int:
    # No tensor outlives this call: a parameter that somebody holds is not packed.
    tensors = map(local, (*model.parameters(), *small_tensors(model)))
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())
