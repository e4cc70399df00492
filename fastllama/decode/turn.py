"""Turn: whose turn it is to use a model. One thread's call at a time; the others wait, or are told.

An interruption may come between any two instructions. So a call is known by its own mark, which is put down and taken
away in one step each, and taking it away twice does no harm.
"""

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeVar

Result = TypeVar("Result")
_here = threading.local()  # .calls: those of this thread that hold a turn


class Call:
    """The mark of one call."""

    def __init__(self):
        self.thread, self.process = threading.get_ident(), os.getpid()
        self.ended: SimpleQueue = SimpleQueue()  # never empty again once the call has ended

    def wait(self) -> None:
        """Until the call has ended."""
        self.ended.get()
        self.ended.put(None)


class Turn:
    """Neither copied nor pickled with what it guards. A process that was forked off has its own turns."""

    def __init__(self):
        self._slot: dict[str, Call] = {}

    def claim(self, call: Call) -> Call:
        """Who has the turn now: `call` itself where nobody had it."""
        while True:
            holder = self._slot.setdefault("holder", call)
            if holder.process == call.process or holder.thread == call.thread:
                return holder
            self.leave(holder)  # of a thread that does not exist in this process

    def leave(self, call: Call) -> None:
        """Gives the turn back if it is `call`'s."""
        if self._slot.get("holder") is call:
            self._slot.pop("holder", None)

    def is_taken(self) -> bool:
        return bool(self._slot)


def in_turn(turns: list[Turn], work: Callable[[], Result], refused: str | None = None) -> Result:
    """What `work()` returns, run when this thread has all `turns`; those that a call around this one has are had.

    A call within a call never waits for another thread, which may be waiting for it: it raises `ValueError`, which
    begins with `refused`, or without it runs all the same.
    """
    call = Call()
    try:
        try:
            while (holder := _enter(turns, call)) is not None:
                _leave(turns, call)
                if calls_here() and refused is None:
                    break
                if calls_here():
                    raise ValueError(
                        f"{refused}: another thread is using the model, and a call within a call does not wait"
                    )
                holder.wait()
                call = Call()
            calls_here().append(call)
            return work()
        finally:
            _leave(turns, call)
    finally:
        _leave(turns, call)  # where an interruption kept the first from it


def if_free(turns: list[Turn], work: Callable[[], Result]) -> tuple[bool, Result | None]:
    """(True, what `work()` returns), run while it has all `turns`; (False, None) where any call has one of them."""
    call = Call()
    try:
        try:
            if any(turn.claim(call) is not call for turn in turns):
                return False, None
            return True, work()
        finally:
            _leave(turns, call)
    finally:
        _leave(turns, call)


def require_free(turns: list[Turn], work: Callable[[], Result], refused: str) -> Result:
    """What `work()` returns. `ValueError`, which begins with `refused`, where any call has one of the turns."""
    ran, result = if_free(turns, work)
    if not ran:
        raise ValueError(f"{refused}: another call is using the cache")
    return result


def calls_here() -> list[Call]:
    """The calls of this thread that hold turns, the outermost first."""
    if not hasattr(_here, "calls"):
        _here.calls = []
    return _here.calls


def _enter(turns: list[Turn], call: Call) -> Call | None:
    """Takes all turns; or returns the call of another thread that has one."""
    for turn in turns:
        holder = turn.claim(call)
        if holder is not call and holder.thread != call.thread:
            return holder
    return None


def _leave(turns: list[Turn], call: Call) -> None:
    for turn in turns:
        turn.leave(call)
    if call in calls_here():
        calls_here().remove(call)
    call.ended.put(None)
