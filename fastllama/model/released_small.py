"""Small weights that are held in another order only, and come back as buffers as soon as anybody asks for one.

As released.py does it for floats: in the place of a module's `_buffers` stands a dict that restores them all on the
first look. They come back bit for bit.
"""

import threading
import weakref
from collections.abc import Callable

import torch
from torch import nn

from fastllama.kernels.small_packed import PackedSmall
from fastllama.kernels.small_summed import Summed
from fastllama.model.released import Packing, Released

SMALL_TENSORS = ("weight", "weight_scale")  # the buffers of a module whose weight is small


class ReleasedSmall(Released):
    """Stands for a module's buffers. `instead`: the tensors that hold the small weight meanwhile."""

    def __init__(self, plain: dict, packing: Packing, instead: tuple[torch.Tensor, ...]):
        super().__init__(plain, packing)
        self.instead = instead


class _Entry:
    """One small weight in another order, and the modules whose weights are its tiles."""

    def __init__(self, modules: tuple[nn.Module, ...], product: PackedSmall | Summed):
        self.product = product
        self.modules = [weakref.ref(module) for module in modules]
        self.tiles = [module.weight.shape[0] for module in modules]

    def put_back(self) -> None:
        parts = zip(*(tensor.split(self.tiles) for tensor in self.product.unpacked()), strict=True)
        for reference, tensors in zip(self.modules, parts, strict=True):
            module = reference()
            released = None if module is None else module.__dict__["_buffers"]
            if isinstance(released, ReleasedSmall):
                released.plain.update(zip(SMALL_TENSORS, tensors, strict=True))
                module.__dict__["_buffers"] = released.plain


class SmallPacking:
    """The small weights of one model that are in another order; `packing`, of which it is a part, brings them back.

    `on_restored` is called then, unless `in_use` says that a call goes on with them. Whatever ends a packing or a
    restoring early, the next look at a buffer finishes it; other threads wait for it.
    """

    def __init__(self, packing: Packing, in_use: Callable[[], bool], on_restored: Callable[[], None]):
        self.entries: list[_Entry] = []
        self._packing, self._in_use, self._on_restored = packing, in_use, on_restored
        self._lock = threading.RLock()

    def take(self, modules: tuple[nn.Module, ...], make: Callable[[], PackedSmall | Summed]) -> PackedSmall | Summed:
        """The product that `make` makes of small weights, of which the modules let go.

        Nobody else is thought to hold them: they are not trained, and a tied one is not packed.
        """
        with self._lock:
            product = make()
            self.entries.append(_Entry(modules, product))
            for module in modules:  # a look from here on brings back
                plain = module._buffers | dict.fromkeys(SMALL_TENSORS)
                module.__dict__["_buffers"] = ReleasedSmall(plain, self._packing, (product.quants, product.scales))
            return product

    def put_back(self) -> None:
        """Makes them buffers again, one weight at a time. Once done, nothing happens."""
        if not self.entries:
            return
        with self._lock, torch.inference_mode(False), torch.no_grad():
            while self.entries:
                self.entries[0].put_back()
                del self.entries[0]
        if not self._in_use():
            self._on_restored()
