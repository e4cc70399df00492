"""python -m fastllama.lab.suite cpu|gpu: measure what is claimed, line by line, beside what is asked."""

import argparse
import gc
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastllama.lab.fault import sentence
from fastllama.lab.measuring import environment
from fastllama.lab.measuring.progress import progress
from fastllama.lab.points import figures
from fastllama.lab.records import git, record
from fastllama.lab.records.sources import ROOT, require_clone
from fastllama.lab.suite import suite_file
from fastllama.lab.suite.line import Line, Measured, judge
from fastllama.lab.suite.suite_lines import LINES

_STYLES = {"reached": "green", "not reached": "bold red", "nothing asked": "dim"}


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message} (--help lists what is possible)\n")


def _runs(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m fastllama.lab.suite", description=__doc__, allow_abbrev=False)
    parser.add_argument("device", choices=tuple(LINES))
    parser.add_argument("--quick", action="store_true", help="smaller models and fewer runs; some lines are left out")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these lines")
    parser.add_argument("--runs", type=_runs, metavar="N", help="timed runs or rounds, in place of each line's own")
    parser.add_argument("--list", action="store_true", help="print the lines and measure nothing")
    parser.add_argument("--commit", metavar="SHA", help="in a copied tree: the commit it is a copy of")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def choose(lines: tuple[Line, ...], quick: bool = False, only: list[str] | None = None, runs: int | None = None):
    """The lines to measure, each with its case. ValueError where `only` names one that there is not."""
    known = [line.name for line in lines if line.case_of(quick) is not None]
    unknown = [name for name in only or [] if name not in known]
    if unknown:
        raise ValueError(f"there is no {'quick ' if quick else ''}line {unknown[0]!r}; there are {', '.join(known)}")
    chosen = [line for line in lines if line.name in (only or known)]
    cases = [(line, line.case_of(quick)) for line in chosen]
    return [(line, replace(case, runs=runs or case.runs)) for line, case in cases]


def _state(commit: str | None, root: Path) -> tuple[str | None, str]:
    """(the commit that holds the sources, None if there is none; their hash)."""
    if commit is not None:
        return record.check_recordable(commit, root), record.source_sha256(root)
    clean = git.is_repository(root) and not git.dirty_files(root)
    return git.head(root) if clean else None, record.source_sha256(root)


def outcome(kept: dict) -> str:
    """A record's result in words."""
    if kept["not_measured"] is not None:
        return f"not measured: {kept['not_measured']}"
    return {True: "reached", False: "not reached", None: "nothing asked"}[kept["reached"]]


def measure_line(line: Line, case, device: str) -> dict:
    """The line's record but for what names the run. A line that fails says why and is not reached."""
    start = time.perf_counter()
    measured, why = Measured({}), None
    try:
        measured = line.measure(case, {"gpu": "cuda"}.get(device, device))
    except Exception as fault:
        # Whatever ends one line must not end those after it.
        known = isinstance(fault, (ValueError, OSError, MemoryError))
        why = sentence(fault) if known else f"{type(fault).__name__}: {sentence(fault)}"
    gc.collect()
    reached, each = judge(line.asked, measured)
    return {
        "schema": suite_file.SCHEMA,
        "line": line.name,
        "what": line.what(case),
        "device": device,
        "asked": [asdict(bound) for bound in line.asked],
        "measured": measured.figures,
        "reached": reached if why is None else False,
        "reached_by_figure": each,
        "not_measured": why,
        "parity": measured.parity if why is None else None,
        "points": measured.points,
        "samples": measured.samples,
        "seconds": round(time.perf_counter() - start, 1),
    }


def run(chosen: list, options: argparse.Namespace, path: Path, root: Path, show: Callable[[dict], None]) -> list[dict]:
    """Measure the lines in order; each is on disk before it is shown and before the next begins."""
    commit, source = _state(options.commit, root)
    facts = environment.environment(torch.device({"gpu": "cuda"}.get(options.device, options.device)))
    records = []
    with progress(len(chosen)) as begin:
        for line, case in chosen:
            begin(line.name)
            kept = measure_line(line, case, options.device)
            now = record.source_sha256(root)
            held = commit if now == source else None  # the sources were edited meanwhile
            words = ["python", "-m", "fastllama.lab.suite", options.device, "--only", line.name]
            words += ["--quick"] * options.quick + (["--runs", str(options.runs)] if options.runs else [])
            kept |= {
                "environment": facts,
                "commit": held,
                "dirty": held is None,
                "source_sha256": now,
                "recorded_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "quick": options.quick,
                "selected": options.only is not None,
                "command": shlex.join(words),
            }
            suite_file.append(path, kept)
            records.append(kept)
            show(kept)
    return records


def table(records: list[dict]) -> Table:
    """A row per figure; those that are asked come first."""
    first = records[0]
    tree = f"commit {first['commit'][:7]}" if not first["dirty"] else "dirty tree: no commit holds these sources"
    title = f"{figures.machine_name({**first, 'device': _torch_type(first)})}; {tree}"
    title += "; quick: smaller cases and fewer runs" if first["quick"] else ""
    shown = Table(title=title, title_justify="left", padding=(0, 0, 0, 1))
    shown.add_column("line", overflow="fold", ratio=2)
    shown.add_column("figure", no_wrap=True)
    for name in ("asked", "measured"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("", overflow="fold")
    shown.add_column("parity", no_wrap=True)
    for kept in records:
        asked = {bound["figure"]: bound for bound in kept["asked"]}
        names = list(dict.fromkeys([*asked, *kept["measured"]]))
        result, style = outcome(kept), _STYLES.get(outcome(kept), "yellow")
        about = Text(f"{kept['line']}\n", "bold").append(kept["what"], "dim")
        cells = [Text("\n".join(names)), Text(), Text(), Text(), Text(kept["parity"] or "-")]
        for index, name in enumerate(names):
            bound, end = asked.get(name), "\n" if index < len(names) - 1 else ""
            cells[1].append((f"{bound['op']} {bound['bound']:g}" if bound else "") + end)
            good = kept["reached_by_figure"].get(name)
            color = "" if good is None else "green" if good else "red"
            cells[2].append(figures.figure(kept["measured"].get(name)) + end, color)
        cells[3] = Text(result, style)
        shown.add_row(about, *cells)
        shown.add_section()
    return shown


def _torch_type(kept: dict) -> str:
    return {"gpu": "cuda"}.get(kept["device"], kept["device"])


def _brief(kept: dict) -> str:
    asked = {bound["figure"]: f" (asked {bound['op']} {bound['bound']:g})" for bound in kept["asked"]}
    found = ", ".join(f"{name} {figures.figure(kept['measured'].get(name))}{text}" for name, text in asked.items())
    detail = f"; {found}; parity {kept['parity']}" if kept["not_measured"] is None else ""
    return f"{kept['line']}: {outcome(kept)}{detail}; {kept['seconds']:.0f} s"


def _say_left_out(options: argparse.Namespace) -> None:
    left = [line.name for line in LINES[options.device] if line.quick is None]
    if options.quick and left and not options.only:
        print(f"left out of a quick run: {', '.join(left)}")


def _run(options: argparse.Namespace, root: Path) -> int:
    chosen = choose(LINES[options.device], options.quick, options.only, options.runs)
    if options.list:
        for line, case in chosen:
            asked = ", ".join(map(str, line.asked)) or "nothing asked"
            print(f"{line.name}: {line.what(case)}; {asked}")
        _say_left_out(options)
        return 0
    if options.device == "gpu" and not torch.cuda.is_available():
        raise ValueError("this machine has no GPU that torch can use: run the suite with cpu")
    if root == ROOT:
        require_clone(root, "the suite's figures are kept")
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = suite_file.create(options.device, _state(options.commit, root)[0], root)
    try:
        records = run(chosen, options, path, root, lambda kept: print(_brief(kept), flush=True))
    except KeyboardInterrupt:
        print(f"interrupted; what was measured is kept in {path}", file=sys.stderr)
        return 130
    finally:
        if not path.stat().st_size:
            path.unlink()
    Console().print(table(records))
    _say_left_out(options)
    print(f"kept in {path}")
    return 1 if any(kept["not_measured"] is not None for kept in records) else 0


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """The exit code: 0; 1 if a line could not be measured; 2 (and one sentence) on wrong arguments."""
    options = _parser().parse_args(argv)
    try:
        return _run(options, root)
    except (ValueError, OSError) as error:
        if options.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
