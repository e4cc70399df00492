"""Two commits measured in turns: a process of A, a process of B, and again, each in a work tree of its own."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastllama.lab.points import points_file
from fastllama.lab.records import git

# What a process measures where the command line says nothing else: the demo, small.
WORKLOAD = ["--preallocate", "--prompt-length", "128", "--new-tokens", "64", "--runs", "5", "--warmup", "1"]
_NOT_HERE = ("--json", "--record", "--predict", "--commit", "--sweep", "--profile")


def check_switches(switches: list[str]) -> None:
    """ValueError for a switch of run_llama.py that makes something else than one point."""
    for word in switches:
        if word.split("=")[0] in _NOT_HERE:
            raise ValueError(
                f"{word.split('=')[0]} has no place in a comparison, which measures one point again and again"
            )


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends what is inside as Ctrl-C does, so that it can clear up."""

    def stop(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(command: list[str], tree: Path) -> tuple[int, str]:
    """(exit code, standard error) of a process that finds the tree's own package; it ends with this one."""
    path = os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])])
    # A session of its own: the processes that it starts in turn can be ended with it.
    process = subprocess.Popen(
        command,
        cwd=tree,
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        error = process.communicate()[1]
        return process.returncode, error
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


def _point(tree: Path, commit: str, switches: list[str]) -> dict:
    """One point measured by the tree's own run_llama.py."""
    name = f"commit {commit[:7]}"
    if not (tree / "run_llama.py").is_file():
        raise ValueError(f"{name} has no run_llama.py")
    with tempfile.TemporaryDirectory(dir=tree.parent) as folder:
        file = Path(folder) / "point.jsonl"
        command = [sys.executable, str(tree / "run_llama.py"), *WORKLOAD, *switches, "--json", str(file)]
        code, error = _run(command, tree)
        if code != 0:
            lines = [line.strip() for line in error.splitlines() if line.strip()]
            said = lines[-1].removeprefix("error: ") if lines else f"exit code {code}"
            raise ValueError(f"{name} could not be measured: {said}")
        points = points_file.read_measured(file)
    if len(points) != 1:
        raise ValueError(f"{name} measured {len(points)} points: a comparison takes one size of each kind")
    measured = points[0].get("source_sha256")
    if measured is not None and measured != git.source_sha256_of_commit(commit, tree, points[0]["schema"]):
        raise ValueError(f"the process in the work tree of {name} measured other sources than that commit's")
    return points[0]


def take_turns(
    root: Path, commits: list[str], switches: list[str], pairs: int, begin: Callable[[str], None]
) -> Generator[list[dict], None, None]:
    """A point of each commit, `pairs` times, one process each: A B A B ...

    The work trees are removed at the end, after a failure and after Ctrl-C. ValueError, one sentence, for a commit
    that cannot be measured.
    """
    check_switches(switches)
    with _terminable(), git.worktrees(root, commits) as trees:
        for pair in range(pairs):
            measured = []
            for name, tree, commit in zip("AB", trees, commits, strict=True):
                begin(f"pair {pair + 1} of {pairs}: {name}")
                measured.append(_point(tree, commit, switches))
            yield measured
