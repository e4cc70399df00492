"""Failures, in one sentence."""

import re
from contextlib import contextmanager

import torch
from safetensors import SafetensorError

_NO_MEMORY = re.compile(r"can't allocate memory|out of memory|not enough memory", re.IGNORECASE)


def sentence(fault: BaseException) -> str:
    """The first sentence of a failure's message, or its type where it has none."""
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()]
    if not lines:
        return type(fault).__name__
    return re.split(r"(?<=[a-z)\]'\"])\.\s", lines[0])[0].rstrip(".")


@contextmanager
def explained(what: str):
    """Turn what libraries raise about `what` into built-in errors of one sentence.

    Corrupt weights become `ValueError`, a full memory `MemoryError`, whatever a loader says its own type.
    """
    try:
        yield
    except SafetensorError as fault:
        raise ValueError(f"the weights of {what} are corrupt ({sentence(fault)})") from fault
    except torch.OutOfMemoryError as fault:
        raise MemoryError(f"{what} does not fit in memory ({sentence(fault)})") from fault
    except RuntimeError as fault:
        if _NO_MEMORY.search(str(fault)):
            raise MemoryError(f"{what} does not fit in memory ({sentence(fault)})") from fault
        raise
