"""python -m fastllama.lab compare A B: is B faster than A? Two records, or two commits or branches measured now."""

import argparse
import math
import statistics as plain
import sys
from contextlib import closing
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastllama.lab.measuring import processes, statistics
from fastllama.lab.measuring.progress import progress
from fastllama.lab.measuring.statistics import SLOWER, Verdict
from fastllama.lab.points import figures
from fastllama.lab.records import git, record, words

# Pairs of processes, five runs in each. tests/test_statistics.py shows what this finds and how often it is wrong.
RUNS = 17
FIGURES = {"decode_tok_per_s": "decode speed", "tok_per_s": "speed of the whole call", "ttft_ms": "first token's speed"}
_WORKLOAD = ("model", "dtype", "batch_size", "prompt_length", "new_tokens", "seed", "prompt_hash")
_MACHINE = ("cpu", "threads", "torch", "gpu")


def _share(text: str) -> float:
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = math.nan
    if not 0 <= value < 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a percentage from 0 to below 100, such as 3%")
    return value / 100


def _pairs(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 2 on")
    return value


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments to its parser."""
    parser.add_argument("a", metavar="A", help="a record (its id or path), or a commit or branch")
    parser.add_argument("b", metavar="B", help="the same kind")
    parser.add_argument("--figure", choices=FIGURES, help="what the verdict is about (decode_tok_per_s)")
    parser.add_argument("--runs", type=_pairs, help=f"pairs of processes, for commits ({RUNS})")
    parser.add_argument(
        "--fail-if-slower",
        type=_share,
        metavar="PERCENT",
        help="exit code 1 if the verdict is slower and the median loss of speed is above this",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there, with every sample")
    parser.epilog = "Behind -- follow switches of run_llama.py for commits; without, " + " ".join(processes.WORKLOAD)


def _record(name: str, root: Path) -> dict | None:
    """The record of that id or path; None if there is none."""
    for path in (Path(name), Path(name) / "record.json", root / words.LOGS / name / "record.json"):
        if path.is_file():
            found = record.read(path)
            record.verify(found, root)
            return found
    return None


def refuse(a: dict, b: dict, names: tuple[str, str]) -> None:
    """ValueError, one sentence, where two points cannot be compared."""
    for point, name in zip((a, b), names, strict=True):
        if point["parity"] == "differs":
            raise ValueError(
                f"{name} failed parity: its output is not vanilla's, so its speed is not for the same text"
            )
    for field in _WORKLOAD:
        # Older records lack the prompt's hash; the fields beside it name the prompt as well.
        if field in a and field in b and a[field] != b[field]:
            raise ValueError(f"different workloads: {field} is {a[field]} in {names[0]} and {b[field]} in {names[1]}")
    if a["device"] != b["device"]:
        raise ValueError(f"different machines: device is {a['device']} in {names[0]} and {b['device']} in {names[1]}")
    here, there = a["environment"], b["environment"]
    for field in _MACHINE:
        if here.get(field) != there.get(field):
            raise ValueError(
                f"different machines: {field} is {here.get(field)} in {names[0]} and {there.get(field)} in {names[1]}"
            )


def _figures(points: list[dict]) -> list[str]:
    """Figures that every point has, the verdict's own first; a first token in no time is none."""
    return [name for name in FIGURES if all(point[name] for point in points)]


def _times_vanilla(point: dict, figure: str) -> float:
    if point["baseline"] is None:
        return 1.0
    return float(plain.median(statistics.ratios_to_vanilla(point, figure)))


def _records(a: dict, b: dict) -> tuple[dict[str, Verdict], dict]:
    names = f"record {a['id']}", f"record {b['id']}"
    refuse(a, b, names)
    verdicts = {name: statistics.compare_points(b, a, name) for name in _figures([a, b])}
    if a["baseline"] is None and b["baseline"] is None:
        how = "speeds of vanilla, which drift from run to run"
        medians = {name: [one[name] for one in (a, b)] for name in verdicts}
    else:
        how = "speeds over that of the vanilla of the same run (x), since two runs drift; vanilla itself is 1"
        medians = {name: [_times_vanilla(one, name) for one in (a, b)] for name in verdicts}
    about = {"kind": "records", "a": a["id"], "b": b["id"], "compared": how, "medians": medians}
    samples = {side: {"runs": one["runs"], "baseline": one["baseline"]} for side, one in (("a", a), ("b", b))}
    return verdicts, {**about, "samples": samples}


def _commits(names: list[str], commits: list[str], switches: list[str], pairs: int, root: Path):
    first, second = (f"{name} ({commit[:7]})" for name, commit in zip(names, commits, strict=True))
    titles, sides = (first, second), []
    with progress(2 * pairs) as begin, closing(processes.take_turns(root, commits, switches, pairs, begin)) as turns:
        for pair in turns:
            refuse(pair[0], pair[1], titles)
            sides.append(pair)
    a, b = zip(*sides, strict=True)
    verdicts = {}
    for name in _figures([*a, *b]):
        speeds = [[1 / one[name] if name == "ttft_ms" else one[name] for one in side] for side in (b, a)]
        verdicts[name] = statistics.paired(*speeds)
    medians = {name: [plain.median(one[name] for one in side) for side in (a, b)] for name in verdicts}
    how = f"{pairs} pairs of processes in turns, A B A B ..., each the median of its {len(a[0]['runs'])} runs: "
    how += f"{figures.workload_name(a[0])}; {figures.machine_name(a[0])}; paths: {a[0]['path']} / {b[0]['path']}"
    about = {"kind": "commits", "a": titles[0], "b": titles[1], "compared": how, "medians": medians}
    kept = ("runs", "path", "hash", "parity", "command", "source_sha256")
    samples = {
        side: [{name: one.get(name) for name in kept} for one in points] for side, points in (("a", a), ("b", b))
    }
    return verdicts, {**about, "commits": commits, "switches": switches, "samples": samples}


def _number(value: float) -> str:
    return "-" if math.isinf(value) else f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def table(verdicts: dict[str, Verdict], about: dict) -> Table:
    """A row per figure: the medians of A and B, and what the rule says of B's speed over A's."""
    made = Table(title=f"A = {about['a']}, B = {about['b']}", title_justify="left", padding=(0, 0, 0, 1))
    for head in ("figure", "A", "B", "B's speed\n/ A's", "95 %\ninterval", "p", "B is"):
        made.add_column(head, justify="left" if head in ("figure", "B is") else "right")
    for name, verdict in verdicts.items():
        ends = f"{verdict.low:.3f}..{_number(verdict.high)}"
        cells = [*map(_number, about["medians"][name]), f"{verdict.ratio:.3f}", ends, f"{verdict.p:.2g}"]
        made.add_row(name, *cells, verdict.word)
    return made


def sentence(verdict: Verdict, figure: str, about: dict) -> str:
    """The verdict in one sentence."""
    word = f"{verdict.word} than" if verdict.word != statistics.NO_DIFFERENCE else "no different from"
    numbers = f"median ratio {verdict.ratio:.3f}, 95 % interval {verdict.low:.3f} to {_number(verdict.high)}"
    few = "; too few samples for any other answer" if math.isinf(verdict.high) else ""
    return (
        f"{about['b']} is {word} {about['a']} in {FIGURES[figure]}: {numbers}, p = {verdict.p:.2g}, "
        f"{verdict.runs} samples{few}."
    )


def fails(verdict: Verdict, allowed: float | None) -> bool:
    """True if B is slower, by the rule, and its median lost more than `allowed` of A's speed."""
    return allowed is not None and verdict.word == SLOWER and 1 - verdict.ratio > allowed


def _compare(arguments) -> tuple[dict[str, Verdict], dict]:
    root, names = arguments.root, [arguments.a, arguments.b]
    found = [_record(name, root) for name in names]
    commits = [git.commit_of(root, name) if one is None else None for name, one in zip(names, found, strict=True)]
    for name, one, commit in zip(names, found, commits, strict=True):
        if one is None and commit is None:
            raise ValueError(f"{name!r} is neither a record (id or path) nor a commit or branch of this repository")
    if all(found):
        if arguments.runs is not None or arguments.switches:
            raise ValueError("records are measured already: --runs and switches belong to commits")
        return _records(found[0], found[1])
    if any(found):
        raise ValueError(f"{names[0]} and {names[1]} are a record and a commit: compare two of one kind")
    statistics.paired([1.0, 2.0], [1.0, 1.0])  # before minutes of measuring: is scipy there?
    if "HEAD" in names and git.dirty_files(root):
        print("warning: what is not committed is not part of HEAD and is not measured", file=sys.stderr)
    return _commits(names, commits, arguments.switches, arguments.runs or RUNS, root)


def run(arguments) -> int:
    """0; 1 where --fail-if-slower says so; 130 after Ctrl-C. ValueError, one sentence, on what cannot be compared."""
    try:
        verdicts, about = _compare(arguments)
    except KeyboardInterrupt:
        print("interrupted; nothing is compared, and the work trees are gone", file=sys.stderr)
        return 130
    figure = arguments.figure or next(iter(verdicts))
    if figure not in verdicts:
        raise ValueError(f"{figure} was not measured: with one new token nothing is decoded")
    verdict = verdicts[figure]
    failed = fails(verdict, arguments.fail_if_slower)
    if arguments.json is not None:
        found = {name: one.json() for name, one in verdicts.items()}
        words.dump_json(
            arguments.json,
            {"schema": 1, "figure": figure, "verdict": verdict.word, "failed": failed} | {**about, "verdicts": found},
        )
    Console().print(table(verdicts, about))
    print(f"Compared: {about['compared']}.")
    print(sentence(verdict, figure, about))
    return 1 if failed else 0
