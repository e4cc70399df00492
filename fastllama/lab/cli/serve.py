"""fastllama serve: transformers' own server, with our class behind it."""

import logging
from contextlib import contextmanager
from typing import Any

from fastllama import FastConfig, register, unregister
from fastllama.lab.points.option import OPTIONS

_ABOUT = """fastllama serve [--fast NAME=VALUE,...] is `transformers serve` with fastllama's class in place of
transformers' own for every Llama, and takes its arguments (below). --fast gives switches of FastConfig, such as
compile=native or cache_k=q8_0,cache_v=q8_0, to the models that it loads. Which path each answer took is logged.
"""


def run(argv: list[str]) -> int:
    """Serves until it is interrupted. Raises `ValueError` for an option that is not allowed or a missing package."""
    words, rest = _split(argv)
    fast = config(words)
    _require_server()
    from transformers.cli.transformers import app

    if "--help" in rest or "-h" in rest:
        print(_ABOUT)
        rest = ["--help"]
    try:
        with _ours(fast):
            code = app(["serve", *rest], prog_name="fastllama", standalone_mode=False)
    except Exception as fault:
        if _was_interrupted(fault):
            raise KeyboardInterrupt from None
        # Which package the parser's errors come from depends on its version.
        if any(kind.__name__ == "ClickException" for kind in type(fault).__mro__):
            raise ValueError(str(fault)) from fault
        raise
    return code if isinstance(code, int) else 0


@contextmanager
def _ours(fast: FastConfig | None):
    """Within it, transformers builds our class, and standard error says which path each answer took."""
    logger, handler = logging.getLogger("fastllama"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("fastllama: %(message)s"))
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    register(fast)
    try:
        yield
    finally:
        unregister()
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def _was_interrupted(fault: BaseException | None) -> bool:
    while fault is not None and not isinstance(fault, KeyboardInterrupt):
        fault = fault.__cause__ or fault.__context__
    return fault is not None


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """The values of --fast, and everything else."""
    words, rest, left = [], [], iter(argv)
    for word in left:
        name, equals, value = word.partition("=")
        if name != "--fast":
            rest.append(word)
            continue
        given = value if equals else next(left, None)
        if given is None:
            raise ValueError("--fast needs a value: NAME=VALUE,...")
        words += given.split(",")
    return words, rest


def config(words: list[str]) -> FastConfig | None:
    """The switches that `words`, each name=value, give; None without one. Raises `ValueError`."""
    switches: dict[str, Any] = {}
    for word in words:
        name, equals, value = (part.strip() for part in word.partition("="))
        name = name.replace("-", "_")
        if not equals:
            raise ValueError(f"--fast {word!r} is not NAME=VALUE,...")
        if name not in FastConfig.__dataclass_fields__:
            raise ValueError(f"--fast has no switch {name!r}; there are {', '.join(FastConfig.__dataclass_fields__)}")
        if name in switches:
            raise ValueError(f"--fast gives {name} twice")
        switches[name] = OPTIONS[name].value(value)
    return FastConfig(**switches) if switches else None


def _require_server() -> None:
    from transformers.utils import import_utils

    wanted = ("fastapi", "openai", "pydantic", "uvicorn")
    missing = [name for name in wanted if not getattr(import_utils, f"is_{name}_available")()]
    if missing:
        raise ValueError(f"serve needs {', '.join(missing)}: pip install {' '.join(missing)}, or fastllama[serve]")
