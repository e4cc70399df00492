"""Texts: whose text a cache holds, where several threads prefill and step."""

import threading


class _Text:
    handed_over = False  # whether a thread that began none of its own has gone on with it


class Texts:
    """Told of every beginning; a thread whose text is not there any more is told before it goes on with another's."""

    def __init__(self):
        self._own = threading.local()  # .last: the text that this thread began last
        self.current: _Text | None = None  # what the cache holds

    def begin(self) -> None:
        """The cache holds a text of this thread from here on."""
        self.current = self._own.last = _Text()

    def require_own(self) -> None:
        """Raises `ValueError` where another thread began a text after this one did.

        A thread that never began one may go on with another's, which then is no one's in particular.
        """
        last = getattr(self._own, "last", None)
        if last is self.current:
            return
        if last is not None and not last.handed_over:
            raise ValueError(
                "step() continues this thread's prefill, and another thread's call has used the cache since: prefill "
                "again, or give each thread a model of its own (copy.deepcopy)"
            )
        if self.current is not None:
            self.current.handed_over = True
