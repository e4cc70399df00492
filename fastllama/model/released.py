"""Weights that are held in packed form only, and come back as parameters as soon as anybody asks for one.

A packed weight is a copy in another arrangement. To hold each weight once, the modules let go of their parameters;
in the place of a module's `_parameters` stands a dict that restores them all on the first look. So forward,
state_dict, saving, training, moving, copying and adapters find what they expect, and pay for it with a second or so.
"""

import copy
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from fastllama.kernels.linear import Packed, held, hold, let_go, pack

logger = logging.get_logger("fastllama")


class Released(dict):
    """Stands for a module's parameters while they are packed. Names are known; a value brings everything back."""

    def __init__(self, plain: dict, packing: "Packing"):
        super().__init__(dict.fromkeys(plain))
        self.plain, self.packing = plain, packing

    def back(self) -> dict:
        """The plain parameters, restored."""
        if not self.packing.restored:
            logger.warning_once("fastllama: packed weights were asked for as parameters: unpacked until the next call")
        self.packing.restore()
        return self.plain

    def __getitem__(self, name):
        return self.back()[name]

    def __setitem__(self, name, value):
        self.back()[name] = value

    def __delitem__(self, name):
        del self.back()[name]

    def get(self, name, default=None):
        return self.back().get(name, default)

    def items(self):
        return self.back().items()

    def values(self):
        return self.back().values()

    def pop(self, *arguments):
        return self.back().pop(*arguments)

    def setdefault(self, *arguments):
        return self.back().setdefault(*arguments)

    def update(self, *arguments, **more):
        self.back().update(*arguments, **more)

    def copy(self):
        return self.back().copy()

    def __iter__(self):
        return iter(self.plain)

    def __deepcopy__(self, memo):
        return copy.deepcopy(self.back(), memo)

    def __reduce__(self):
        return dict, (list(self.back().items()),)


class _Entry:
    """One weight that is packed, or is about to be, and the modules whose weights are its rows."""

    def __init__(self, modules: tuple[nn.Module, ...], parameters: list[nn.Parameter], weight: torch.Tensor):
        self.handle: torch.Tensor | None = None
        self.weight: torch.Tensor | None = weight  # until there is a handle
        self.modules = [weakref.ref(module) for module in modules]
        self.references = [weakref.ref(parameter) for parameter in parameters]
        self.sizes = [parameter.shape[0] for parameter in parameters]
        self.requires_grad = [parameter.requires_grad for parameter in parameters]
        self.attributes = [dict(vars(parameter)) for parameter in parameters]

    def are_held(self) -> bool:
        """Whether somebody else has one of the parameters that the modules let go of."""
        return any(reference() is not None for reference in self.references)

    def parameters(self) -> list[nn.Parameter]:
        """Those that somebody has, and new ones with the values and marks of the others."""
        parts = (self.weight if self.handle is None else held(self.handle).to_dense()).split(self.sizes)
        return [self._parameter(index, part) for index, part in enumerate(parts)]

    def _parameter(self, index: int, values: torch.Tensor) -> nn.Parameter:
        alive = self.references[index]()
        if alive is not None and self.handle is None:
            return alive
        parameter = nn.Parameter(values, requires_grad=self.requires_grad[index])
        vars(parameter).update(self.attributes[index])
        return parameter


def _in_training(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None or bool(parameter._backward_hooks)


class Packing:
    """The packed weights of one model. `restored` is true from the moment that somebody wants their parameters back.

    Whatever ends a packing or a restoring early, the next look at a parameter finishes it; other threads wait for it.
    """

    def __init__(self, in_use: Callable[[], bool]):
        self.entries: list[_Entry] = []
        self.restored = False
        self.small: Any = None  # of small weights: released_small.py
        self._in_use = in_use
        self._lock = threading.RLock()

    def take(self, modules: tuple[nn.Module, ...], weight: torch.Tensor, bias: torch.Tensor | None) -> Packed | None:
        """Packs `weight`, whose rows are the modules' weights, and makes the modules let go of theirs.

        None, and nothing changed, where somebody else holds a parameter (an optimizer, say) or it is being trained:
        what is written to it must be seen, and it would be held twice.
        """
        with self._lock:
            parameters = [module._parameters["weight"] for module in modules]
            if any(_in_training(parameter) for parameter in parameters):
                return None
            entry = _Entry(modules, parameters, weight)
            del parameters
            self.entries.append(entry)
            for module in modules:  # a look from here on waits, and brings back
                module.__dict__["_parameters"] = Released({**module._parameters, "weight": None}, self)
            if entry.are_held():
                self._put_back(entry)
                return None
            handle = entry.handle = hold(pack(weight))
            entry.weight = None
            return Packed(handle, bias, weight.shape[0])

    def restore(self) -> None:
        """Puts the parameters back, one weight at a time. Once done, nothing happens."""
        self.restored = True
        if self.small is not None:
            self.small.put_back()
        if not self.entries:
            return
        with self._lock, torch.inference_mode(False), torch.no_grad():
            while self.entries:
                entry = self.entries[0]
                self._put_back(entry)
                # A call in progress goes on with what is packed; it is let go with the call's last product.
                if entry.handle is not None and not self._in_use():
                    let_go(entry.handle)

    def _put_back(self, entry: _Entry) -> None:
        for module, parameter in zip(entry.modules, entry.parameters(), strict=True):
            module = module()
            released = None if module is None else module.__dict__["_parameters"]
            if isinstance(released, Released):
                released.plain["weight"] = parameter
                module.__dict__["_parameters"] = released.plain
        self.entries.remove(entry)


def is_released(module: nn.Module) -> bool:
    """Whether the module's weight is packed; asking brings nothing back."""
    return any(isinstance(module.__dict__[name], Released) for name in ("_parameters", "_buffers"))
