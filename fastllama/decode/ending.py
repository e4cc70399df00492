"""How a call leaves its engine, whatever ended it."""

from collections.abc import Callable
from typing import TypeVar

from fastllama.decode.engine import Engine

Result = TypeVar("Result")


def well_ended(engine: Engine, work: Callable[[], Result]) -> Result:
    """What `work()`, a call on this engine, returns; however it ends, the next one finds the engine in order.

    A text goes on after what was refused; where one was begun, or an interruption may have cut it, none does.
    """
    text = engine.texts.current
    try:
        return work()
    except BaseException as fault:
        if engine.texts.current is not text or not isinstance(fault, Exception):
            engine.forget_text()
        raise
    finally:
        engine.binding.forget_restored()
