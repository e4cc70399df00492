"""Ordinary tensors: those made outside inference mode, which compiled code would take for another world."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

_Method = TypeVar("_Method", bound=Callable)


def on_ordinary_tensors(method: _Method) -> _Method:
    """Runs a method without gradients and outside inference mode."""

    @functools.wraps(method)
    def run(*args, **kwargs):
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return cast(_Method, run)


def ordinary(tensor: Any) -> Any:
    """The tensor, or an ordinary one of the same numbers; None is None."""
    return tensor.clone() if tensor is not None and tensor.is_inference() else tensor
