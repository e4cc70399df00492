"""KeyboardInterrupt at a chosen line of the package, as Ctrl-C may come at any."""

import linecache
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

PACKAGE = str(Path(__file__).parent.parent / "fastllama")


def heed() -> None:
    """A child's `preexec_fn`: tests that a shell starts in the background ignore Ctrl-C, which is inherited."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Lines:
    """Counts the lines of the package that this thread runs, and raises at the one numbered `at` (from 1).

    `event` "call" counts its functions instead. Python has a line of its own for the end of a `with`, at which no
    interruption comes, and which would leave open what is not ours: it counts for nothing.
    """

    def __init__(self, at: int | None = None, within: str = "", event: str = "line"):
        self.at, self.event, self.count, self.where = at, event, 0, None
        self.begun: set = set()  # (frame, line) of each `with`
        self.prefix = f"{PACKAGE}/{within}"

    def _called(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(self.prefix):
            return None
        return self._passed(frame, event, argument)

    def _passed(self, frame, event, argument):
        if event == self.event and not self._ends_a_with(frame, event):
            self.count += 1
            if self.count == self.at:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._passed

    def _ends_a_with(self, frame, event) -> bool:
        if event != "line":
            return False
        place = (frame, frame.f_lineno)
        if place in self.begun:
            return True
        if linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with "):
            self.begun.add(place)
        return False

    @contextmanager
    def watched(self):
        before = sys.gettrace()
        sys.settrace(self._called)
        try:
            yield self
        finally:
            sys.settrace(before)
            self.begun.clear()


def spread(work, most: int, within: str = "", event: str = "line"):
    """Up to `most` interruptions, each at another line of those that `work()` runs; evenly over all of them."""
    with Lines(within=within, event=event).watched() as lines:
        work()
    stride = max(lines.count // most, 1)
    for at in range(1, lines.count + 1, stride):
        yield Lines(at, within, event)


def interrupt(lines: Lines, work):
    """Runs `work()` up to the line. Its result, where the interruption came too late or where nothing may raise."""
    try:
        with lines.watched():
            return work()
    except KeyboardInterrupt:
        return None
