"""register(): makes transformers build our class wherever it would build its own for `model_type: llama`."""

import gc
import sys
from types import ModuleType

from transformers import AutoModelForCausalLM, LlamaConfig

from fastllama.llama import LlamaForCausalLM
from fastllama.model.config import FastConfig

_NAME = "LlamaForCausalLM"
# Packages whose attribute was set, with what stood there before (nothing where transformers had not looked it up yet).
_replaced: list[tuple[ModuleType, dict]] = []


def _registered() -> dict:
    # AutoModelForCausalLM.register() has no inverse, and in some versions ignores a configuration of transformers' own.
    return AutoModelForCausalLM._model_mapping._extra_content


def _packages() -> list[ModuleType]:
    """Every object that stands for the package: its initialisation can run twice, and then users hold the older one."""
    # What is frozen the collector does not tell of: modules are asked as well.
    imported = tuple(sys.modules.values())
    held = [thing for module in imported for thing in tuple(getattr(module, "__dict__", {}).values())]
    things = (*gc.get_objects(), *imported, *held)
    modules = {id(thing): thing for thing in things if issubclass(type(thing), ModuleType)}
    return [module for module in modules.values() if vars(module).get("__name__") == "transformers"]


def register(fast: FastConfig | None = None) -> None:
    """Auto classes, `pipeline`, `transformers serve`, PEFT and lm-eval build `fastllama.LlamaForCausalLM` from now on.

    `fast` is how each model that is loaded from now on generates, as `from_pretrained(fast=...)` would say it. Raises
    `ValueError` for what is no FastConfig.
    """
    if fast is not None and not isinstance(fast, FastConfig):
        raise ValueError(f"fast={fast!r} is not allowed; allowed: None or a FastConfig")
    unregister()
    LlamaForCausalLM.default_fast = fast
    _registered()[LlamaConfig] = LlamaForCausalLM
    # `transformers serve` looks the architecture's name up on the package.
    for package in _packages():
        _replaced.append((package, {_NAME: vars(package)[_NAME]} if _NAME in vars(package) else {}))
        setattr(package, _NAME, LlamaForCausalLM)


def unregister() -> None:
    """Undoes `register`; models that were built stay what they are."""
    LlamaForCausalLM.default_fast = None
    _registered().pop(LlamaConfig, None)
    while _replaced:
        package, before = _replaced.pop()
        vars(package).pop(_NAME, None)
        vars(package).update(before)
