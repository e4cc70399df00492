"""Ctrl-C that ends an answer and not the program."""

import signal
import threading
from contextlib import contextmanager


class Interrupt:
    """`stopped()` is true once Ctrl-C was pressed within `listening`; a second one is raised as usual."""

    def __init__(self):
        self._pressed = False

    def stopped(self) -> bool:
        """Whether the answer shall end."""
        return self._pressed

    def _press(self, number, frame) -> None:
        if self._pressed:
            raise KeyboardInterrupt
        self._pressed = True

    @contextmanager
    def listening(self):
        """While an answer is made: no step of the model is cut in two."""
        self._pressed = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._press)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
