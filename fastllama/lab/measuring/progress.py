"""The progress bar, on stderr."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar of `total` steps; the function it yields is told what begins, which ends the step before."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    # A bar that redraws by itself would take time from what is being timed.
    console = Console(stderr=True)
    bar = Progress(*columns, console=console, transient=True, auto_refresh=False, disable=not console.is_terminal)
    with bar:
        task = bar.add_task("starting", total=total)
        begun = False

        def begin(doing: str) -> None:
            nonlocal begun
            bar.update(task, description=doing, advance=1 if begun else 0, refresh=True)
            begun = True

        yield begin
