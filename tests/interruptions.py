"""KeyboardInterrupt at a chosen line of the package, as Ctrl-C may come at any."""

import sys
from contextlib import contextmanager
from pathlib import Path

PACKAGE = str(Path(__file__).parent.parent / "fastllama")


class Lines:
    """Counts the lines of the package that this thread runs, and raises at the one numbered `at` (from 1)."""

    def __init__(self, at: int | None = None, within: str = ""):
        self.at, self.count, self.raised, self.where = at, 0, False, None
        self.prefix = f"{PACKAGE}/{within}"

    def _called(self, frame, event, argument):
        return self._line if frame.f_code.co_filename.startswith(self.prefix) else None

    def _line(self, frame, event, argument):
        if event == "line":
            self.count += 1
            if self.count == self.at:
                self.raised, self.where = True, f"{frame.f_code.co_filename}:{frame.f_lineno}"
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._line

    @contextmanager
    def watched(self):
        before = sys.gettrace()
        sys.settrace(self._called)
        try:
            yield self
        finally:
            sys.settrace(before)


def spread(work, most: int, within: str = ""):
    """Up to `most` interruptions, each at another line of those that `work()` runs; evenly over all of them."""
    with Lines(within=within).watched() as lines:
        work()
    stride = max(lines.count // most, 1)
    for at in range(1, lines.count + 1, stride):
        yield Lines(at, within)


def interrupt(lines: Lines, work):
    """Runs `work()` up to the line. Its result, where the interruption came too late or where nothing may raise."""
    try:
        with lines.watched():
            return work()
    except KeyboardInterrupt:
        return None
