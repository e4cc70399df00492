"""One HTML page with the tables, the plots and the log, which loads nothing from anywhere.

The page is built with html.escape alone: it is a few tables, and every text in it passes through one function.
"""

import base64
import tempfile
from html import escape
from pathlib import Path

from fastllama.lab import changes, curve, figures, history, words

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --page: #fff; --line: #c9ced6; --soft: #f3f5f7 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --page: #15181c; --line: #444b55; --soft: #20252b } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0 auto;
  max-width: 72rem; padding: 0 1rem 3rem; overflow-wrap: anywhere }
h1 { font-size: 1.6rem } h2 { font-size: 1.3rem; margin-top: 2.5rem } h3 { font-size: 1rem }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 4px }
.wide:focus-visible { outline: 2px solid currentColor }
table { border-collapse: collapse; font-size: .85rem; width: 100%; overflow-wrap: normal }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem; border-bottom: 1px solid var(--line) }
th { background: var(--soft); white-space: nowrap } td.what { min-width: 14rem }
td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
figure { margin: 1rem 0 } figure img { display: block; max-width: 100%; height: auto; background: #fff; padding: .5rem;
  box-sizing: border-box }
figcaption { font-size: .9rem } nav a { color: inherit; margin-right: 1rem }
"""
_HEADS = ("#", "commit", "what changed", "tok/s", "decode tok/s", "x vanilla", "of ceiling", "max MB", "parity", "gain")
_NUMBERS = ("tok/s", "decode tok/s", "x vanilla", "of ceiling", "max MB", "gain")


def _table(name: str, heads: tuple[str, ...], rows: list[list[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    lines = []
    for row in rows:
        cells = []
        for text, title in zip(row, heads, strict=True):
            kind = "number" if title in _NUMBERS else "what" if title == "what changed" else "plain"
            cells.append(f'<td class="{kind}">{escape(text)}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    # A region that scrolls must be reachable from the keyboard.
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{escape(name)}"><table><thead><tr>{head}</tr>'
        f"</thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _row(record: dict, before: dict | None) -> list[str]:
    share = record["ceiling_fraction"]
    return [
        record["id"].split("-")[0],
        record["commit"][:7],
        record["what"],
        changes.speed(record["tok_per_s"]),
        changes.speed(record["decode_tok_per_s"], figures.spread(record)),
        changes.times_vanilla(record),
        "-" if share is None else f"{100 * share:.0f} %",
        changes.number(record["max_mem_mb"]),
        record["parity"],
        changes.gain(record, before),
    ]


def _picture(draw, drawn: list[dict], text: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        data = draw(drawn, Path(folder) / "plot.svg").read_bytes()
    source = "data:image/svg+xml;base64," + base64.b64encode(data).decode()
    return f'<figure><img src="{source}" alt="{escape(text)}"><figcaption>{escape(text)}</figcaption></figure>'


def _results(records: list[dict]) -> str:
    newest = [changes.own_rows(rows)[-1] for group in changes.groups(records).values() for rows in group.values()]
    heads = ("machine", "workload", *_HEADS[:-1])
    rows = [[figures.machine_name(row), figures.workload_name(row), *_row(row, None)[:-1]] for row in newest]
    return _table("newest record of each group", heads, rows)


def _log(records: list[dict]) -> str:
    parts = []
    for machine, workloads in changes.groups(records).items():
        for rows in workloads.values():
            name = f"{machine}: {figures.workload_name(rows[0])}"
            lines = [_row(row, changes.compared_with(rows, index)) for index, row in enumerate(rows)]
            parts.append(f"<h3>{escape(name)}</h3>{_table(name, _HEADS, lines)}")
    return "".join(parts)


def render(records: list[dict]) -> str:
    """The page, from records in order of number. ValueError if there are none, or if matplotlib is missing."""
    if not records:
        raise ValueError("there is no record to report yet")
    plots = ""
    if history.series(records):
        plots += _picture(history.timeline, records, "Decode speed over vanilla's, commit by commit, with the spread")
    if drawn := curve.points(records):
        plots += _picture(curve.curve, drawn, "Decode speed against the bytes of a token, under the memory's ceiling")
    sections = [("results", "Newest results", _results(records)), ("log", "The log", _log(records))]
    if plots:
        sections.insert(1, ("plots", "Plots", plots))
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in sections)
    body = "".join(
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>{text}</section>'
        for name, title, text in sections
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>fastllama: measurements</title><style>{_STYLE}</style></head><body>"
        f'<header><h1>fastllama: measurements</h1><nav aria-label="sections">{links}</nav></header>'
        f"<main>{body}</main><footer><p>{len(records)} records. Speeds are medians, with the smallest and largest "
        "sample behind them; ~ claims nothing, because the runs overlap.</p></footer></body></html>\n"
    )


def arguments(commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("report", help="write the log, tables and plots as one HTML page")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="default: report.html")


def run(arguments, records: list[dict]) -> int:
    """Write the page; the exit code."""
    if not arguments.output.resolve().parent.is_dir():
        raise ValueError(f"{arguments.output}: there is no folder {arguments.output.parent}")
    words.write_atomically(arguments.output, render(records))
    print(arguments.output)
    return 0
