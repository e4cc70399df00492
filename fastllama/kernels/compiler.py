"""What a missing compiler is called, wherever in torch it was missed."""

import contextlib
from collections.abc import Iterator


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
