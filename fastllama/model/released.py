"""Weights that are held in packed form only, and come back as parameters as soon as anybody asks for one.

A packed weight is a copy in another arrangement. To hold each weight once, the modules let go of their parameters;
in the place of a module's `_parameters` stands a dict that restores them all on the first look. So forward,
state_dict, saving, training, moving, copying and adapters find what they expect, and pay for it with a second or so.
"""

import copy
import weakref
from collections.abc import Callable

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
    """One packed weight, and the modules whose weights are its rows."""

    def __init__(self, modules: tuple[nn.Module, ...], handle: torch.Tensor):
        parameters = [module._parameters["weight"] for module in modules]
        self.handle = handle
        self.modules = [weakref.ref(module) for module in modules]
        self.sizes = [parameter.shape[0] for parameter in parameters]
        # Whoever else holds a parameter (an optimizer, a model that shares it) keeps it, and it is put back then.
        self.originals = [weakref.ref(parameter) for parameter in parameters]
        self.versions = [parameter._version for parameter in parameters]
        self.requires_grad = [parameter.requires_grad for parameter in parameters]
        self.attributes = [dict(vars(parameter)) for parameter in parameters]

    def is_current(self) -> bool:
        """False once somebody who kept a parameter has written to it."""
        pairs = zip(self.originals, self.versions, strict=True)
        return all(original() is None or original()._version == version for original, version in pairs)

    def parameters(self) -> list[nn.Parameter]:
        originals = [original() for original in self.originals]
        if all(original is not None for original in originals):
            return originals
        parts = held(self.handle).to_dense().split(self.sizes)
        found = []
        for index, (original, part) in enumerate(zip(originals, parts, strict=True)):
            if original is None:
                original = nn.Parameter(part, requires_grad=self.requires_grad[index])
                vars(original).update(self.attributes[index])
            found.append(original)
        return found


class Packing:
    """The packed weights of one model. `restored` is true from the moment their parameters are back."""

    def __init__(self, in_use: Callable[[], bool]):
        self.entries: list[_Entry] = []
        self.restored = False
        self._in_use = in_use

    def take(self, modules: tuple[nn.Module, ...], weight: torch.Tensor, bias: torch.Tensor | None) -> Packed:
        """Packs `weight`, whose rows are the modules' weights, and makes the modules let go of theirs."""
        handle = hold(pack(weight))
        self.entries.append(_Entry(modules, handle))
        for module in modules:
            plain = module._parameters
            released = Released(plain, self)
            plain["weight"] = None
            module.__dict__["_parameters"] = released
        # Compiled code may outlive the product: what its handle names lives as long as the handle's tensor.
        weakref.finalize(handle, let_go, handle.clone())
        return Packed(handle, bias, weight.shape[0])

    def is_current(self) -> bool:
        """Whether what is packed still is what the model would compute with."""
        return not self.restored and all(entry.is_current() for entry in self.entries)

    def restore(self) -> None:
        """Puts the parameters back, one weight at a time. Once done, nothing happens."""
        if self.restored:
            return
        self.restored = True
        logger.warning_once(
            "fastllama: packed weights were asked for as parameters, and are unpacked until the next call"
        )
        with torch.inference_mode(False), torch.no_grad():
            for entry in self.entries:
                for module, parameter in zip(entry.modules, entry.parameters(), strict=True):
                    module = module()
                    if module is not None:
                        plain = module.__dict__["_parameters"].plain
                        plain["weight"] = parameter
                        module.__dict__["_parameters"] = plain
                # A call in progress goes on with what is packed; it is let go with the call's last product.
                if not self._in_use():
                    let_go(entry.handle)
        self.entries.clear()


def is_released(module: nn.Module) -> bool:
    """Whether the module's weight is packed; asking brings nothing back."""
    return isinstance(module.__dict__["_parameters"], Released)
