"""Compiling ahead of time, and what a missing compiler is called wherever in torch it was missed."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastllama.kernels import instruction_sets


@contextlib.contextmanager
def named(what: str) -> Iterator[None]:
    """Raises `ValueError` in one sentence that begins with `what` where torch finds no working compiler."""
    try:
        yield
    except Exception as failure:
        fault: BaseException | None = failure
        while fault is not None and type(fault).__name__ != "InvalidCxxCompiler":
            fault = fault.__cause__ or fault.__context__
        if fault is None:
            raise
        raise ValueError(f"{what} compiles C++, and no working compiler was found: install g++, or set CXX") from None


def package(traced: torch.export.ExportedProgram, path: Path, what: str, one_of_many: bool, **options: Any) -> None:
    """Compiles into `path` (.pt2), with torch._inductor's `options`. Raises `ValueError` as `named(what)` does.

    `one_of_many`: torch's headers are compiled by themselves first. That takes as long as four packages gain by it.

    Source: torch._inductor.aoti_compile_and_package,
    https://docs.pytorch.org/docs/stable/torch.compiler_aot_inductor.html
    """
    if instruction_sets.are_good():
        options["cpp.vec_isa_ok"] = True
    # Line tables are for debuggers, and take a fifth of the compiler's time.
    for name, value in (("enable_line_tables", False), ("precompile_headers", one_of_many)):
        if hasattr(torch._inductor.config.aot_inductor, name):
            options[f"aot_inductor.{name}"] = value
    with named(what), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # torch's own, about torch's own
        torch._inductor.aoti_compile_and_package(traced, package_path=str(path), inductor_configs=options)
