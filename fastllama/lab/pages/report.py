"""One HTML page with what was measured: for people who would rather look than read."""

import argparse
from html import escape
from pathlib import Path

from fastllama.lab.pages.page import page, picture, table
from fastllama.lab.pictures import curve, history, plot_sweep
from fastllama.lab.points import figures, option, points_file
from fastllama.lab.quality import score
from fastllama.lab.records import changes, words
from fastllama.lab.records.record import read_all
from fastllama.lab.records.sources import ROOT
from fastllama.lab.suite import suite_file

_HEADS = ["#", "commit", "what changed", "compile", "tok/s", "decode tok/s", "x vanilla", "of ceiling", "max MB"]
_HEADS += ["hash", "parity", "quality", "gain", "predicted"]
_NUMBERS = ("tok/s", "decode tok/s", "x vanilla", "of ceiling", "max MB", "gain", "first token, ms")


def _share(point: dict) -> str:
    return "-" if point["ceiling_fraction"] is None else f"{100 * point['ceiling_fraction']:.0f} %"


def _row(record: dict, before: dict | None) -> list[str]:
    return [
        record["id"].split("-")[0],
        record["commit"][:7],
        record["what"],
        changes.how(record),
        changes.speed(record["tok_per_s"]),
        changes.speed(record["decode_tok_per_s"], figures.spread(record)),
        changes.times_vanilla(record),
        _share(record),
        changes.number(record["max_mem_mb"]),
        record["hash"],
        record["parity"],
        score.of_record(record) or "-",
        changes.gain(record, before),
        record["prediction"] or "",
    ]


def _results(records: list[dict]) -> str:
    newest = [changes.own_rows(rows)[-1] for group in changes.groups(records).values() for rows in group.values()]
    kept = ("x vanilla", "decode tok/s", "of ceiling", "max MB", "parity", "#")
    rows = []
    for record in newest:
        by_head = dict(zip(_HEADS, _row(record, None), strict=True))
        first, rest = ([by_head[head] for head in part] for part in (kept[:3], kept[3:]))
        first_token = changes.number(record["ttft_ms"])
        rows.append([figures.workload_name(record), *first, first_token, *rest, figures.machine_name(record)])
    heads = ["workload", *kept[:3], "first token, ms", *kept[3:], "machine"]
    return table("newest record of each group", heads, rows, _NUMBERS)


def _suite(root: Path) -> str:
    parts = []
    for machine, lines in suite_file.current(root).items():
        rows = []
        for path, one in lines.values():
            names = [bound["figure"] for bound in one["asked"]] or list(one["measured"])
            said = {True: "reached", False: "not reached", None: "nothing asked"}[one["reached"]]
            rows.append(
                [
                    one["what"],
                    "; ".join(f"{bound['figure']} {bound['op']} {bound['bound']:g}" for bound in one["asked"]) or "-",
                    "; ".join(f"{name} {changes.speed(one['measured'].get(name))}" for name in names) or "-",
                    said if one["not_measured"] is None else f"not measured: {one['not_measured']}",
                    one["parity"] or "-",
                    path.stem,
                ]
            )
        parts.append(f"<h3>{escape(machine)}</h3>")
        parts.append(table(machine, ["line", "asked", "measured", "result", "parity", "run"], rows))
    return "".join(parts)


def _sweep(path: Path) -> str:
    entries = points_file.read(path)
    measured = [entry for entry in entries if points_file.is_measured(entry)]
    varied = option.varied(measured) if measured else []
    rows = []
    for entry in entries:
        name = ", ".join(f"{axis} {option.words(option.stored(entry, axis))}" for axis in varied) or entry["model"]
        if not points_file.is_measured(entry):
            rows.append([name, *["-"] * 5, f"{entry['status']}: {entry['reason']}"])
            continue
        speeds = [changes.speed(entry["tok_per_s"]), changes.speed(entry["decode_tok_per_s"])]
        others = [changes.number(entry["ttft_ms"]), changes.number(entry["max_mem_mb"]), entry["parity"]]
        rows.append([name, *speeds, changes.times_vanilla(entry), *others])
    heads = ["point", "tok/s", "decode tok/s", "x vanilla", "first token, ms", "max MB", "parity"]
    html = f"<h3>{escape(path.stem)}</h3>{table(path.stem, heads, rows, _NUMBERS)}"
    try:
        return html + picture(lambda target: plot_sweep.sweep(entries, target), f"{path.stem}: speed, with the spread")
    except ValueError as fault:  # what varies cannot be one curve
        return html + f"<p>Not drawn: {escape(str(fault))}.</p>"


def _plots(records: list[dict], root: Path) -> str:
    plots = ""
    if history.series(records):
        plots += picture(
            lambda path: history.timeline(records, path),
            "Decode speed over vanilla's, commit by commit, with the spread",
        )
    # A curve needs points with a ceiling; the suite's are among them where it ran.
    kept = [one for lines in suite_file.current(root).values() for _, one in lines.values()]
    if drawn := curve.points(records, kept):
        plots += picture(
            lambda path: curve.curve(drawn, path),
            "Decode speed against the bytes of a token, under the memory's ceiling",
        )
    return plots


def _log(records: list[dict]) -> str:
    parts = []
    for machine, workloads in changes.groups(records).items():
        for rows in workloads.values():
            name = f"{machine}: {figures.workload_name(rows[0])}"
            lines = [_row(row, changes.compared_with(rows, index)) for index, row in enumerate(rows)]
            parts.append(f"<h3>{escape(name)}</h3>{table(name, _HEADS, lines, _NUMBERS)}")
    return "".join(parts)


def _cited(root: Path) -> str:
    parts = []
    for cited in words.cited(root):
        heads = ["what changed", "compile", "tok/s", "max MB", "hash"]
        rows = [
            [row["what"], row["compile"], f"{row['tok_per_s']:.3f}", f"{row['max_mem_mb']:.2f}", row["hash"]]
            for row in cited["rows"]
        ]
        about = "; ".join(cited[name] for name in ("machine", "model", "workload", "note"))
        parts.append(f"<h3>{escape(cited['source'])}</h3><p>{escape(about)}</p>")
        parts.append(table(cited["source"], heads, rows, _NUMBERS))
    return "".join(parts)


def _tried(root: Path) -> str:
    entries = words.tried(root)
    heads = ["tried", "expected", "found"]
    return (
        table("Tried and left", heads, [[one["what"], one["expected"], one["found"]] for one in entries])
        if entries
        else ""
    )


def _unmeasured(root: Path) -> str:
    entries = words.unmeasured(root)
    items = (f"<li>{escape(each['what'])}<pre>{escape(each['command'])}</pre></li>" for each in entries)
    return f"<ul>{''.join(items)}</ul>" if entries else ""


def render(records: list[dict], root: Path = ROOT) -> str:
    """The page, from records in order of number and what else `root` keeps of suites, sweeps and words.

    ValueError if there are no records, or if matplotlib or scipy is missing.
    """
    if not records:
        raise ValueError("there is no record to report yet")
    sweeps = sorted((Path(root) / words.LOGS / "sweeps").glob("*.jsonl"))
    sections = [
        ("results", "Newest results", _results(records)),
        ("suite", "What speed is judged by", _suite(root)),
        ("plots", "Plots", _plots(records, root)),
        ("sweeps", "Sweeps", "".join(map(_sweep, sweeps))),
        ("log", "The log", _log(records)),
        ("cited", "Cited, not measured here", _cited(root)),
        ("tried", "Tried and left", _tried(root)),
        ("unmeasured", "Not yet measured", _unmeasured(root)),
    ]
    last = (
        f"{len(records)} records. Speeds are medians, with the smallest and largest sample behind them; ~ claims "
        "nothing, because a test finds no difference."
    )
    return page("fastllama: measurements", sections, last)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments to its parser."""
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="default: report.html")


def run(arguments) -> int:
    """Write the page; the exit code."""
    if not arguments.output.resolve().parent.is_dir():
        raise ValueError(f"{arguments.output}: there is no folder {arguments.output.parent}")
    words.write_atomically(arguments.output, render(read_all(arguments.root), arguments.root))
    print(arguments.output)
    return 0
