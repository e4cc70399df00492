"""The blocks of README.md that are figures: rendered from records, never typed."""

import re
from dataclasses import MISSING, fields
from pathlib import Path

from fastllama.lab.devices import paper
from fastllama.lab.measuring import arguments
from fastllama.lab.memory import memory_table
from fastllama.lab.options import summary as options_summary
from fastllama.lab.points import figures, points_file
from fastllama.lab.quality import score_file, score_table
from fastllama.lab.records import assisted_table, lossy, suite_table, words
from fastllama.lab.records.changes import cell, gain, number, own_rows, speed, table, times_vanilla
from fastllama.lab.records.sources import ROOT

NAME = "README.md"
NOT_MEASURED = "not measured"


def _switch_fields():
    # FastConfig comes with the whole model, and a log can be rendered without it.
    from fastllama.model.config import FastConfig

    return fields(FastConfig)


def _show(value) -> str:
    return {True: "on", False: "off"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _same_but(name: str, first: dict, second: dict) -> bool:
    """True if two records of one commit, machine and workload differ in switch `name` alone."""
    if first["commit"] != second["commit"] or first["cache_length"] != second["cache_length"]:
        return False
    if figures.workload(first) != figures.workload(second):
        return False
    if figures.machine_name(first) != figures.machine_name(second):
        return False
    ours, theirs = first["switches"], second["switches"]
    differing = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    return differing == {name}


def _change(gain: str) -> str:
    return "no difference" if gain == "~" else f"{gain} decode speed"


def _where(record: dict) -> str:
    return f"{cell(figures.workload_name(record))}; {figures.machine_name(record)}"


def effect(name: str, default, records: list[dict]) -> str:
    """Measured effect of a switch on decode tok/s: for each model, value and machine the newest pair of records.

    The pair has one commit and one workload and differs in this switch alone, one of the two at its default; both
    are preallocated, since what `compile` does to vanilla is not our switch's effect.
    """
    found = {}
    for record in records:
        value = record["switches"].get(name)
        if value == default or record["decode_tok_per_s"] is None or not record["switches"]["preallocate"]:
            continue
        for plain in records:
            if plain["switches"].get(name, default) != default or not _same_but(name, record, plain):
                continue
            if not plain["decode_tok_per_s"]:
                continue
            change = _change(gain(record, plain))
            key = (figures.machine_name(record), record["model"], record["dtype"], _show(value))
            found[key] = f"`{_show(value)}`: {change} ({_where(record)}; {record['id']} beside {plain['id']})"
    return "<br>".join(found.values()) or NOT_MEASURED


def effect_of_preallocate(records: list[dict], defaults: dict) -> str:
    """As `effect`, against the vanilla that was timed in turns with it, all other switches at their defaults."""
    found = {}
    for record in records:
        plain = all(record["switches"].get(name, value) == value for name, value in defaults.items())
        baseline = record["baseline"]
        if not (plain and record["switches"]["preallocate"] and baseline) or not baseline["decode_tok_per_s"]:
            continue
        if record["decode_tok_per_s"] is None:
            continue
        change = _change(gain(record, {**record, "baseline": None, "decode_speedup": 1.0}))
        key = (figures.machine_name(record), record["model"], record["dtype"])
        found[key] = f"`on`: {change} ({_where(record)}; {record['id']} beside vanilla)"
    return "<br>".join(found.values()) or NOT_MEASURED


def _flag(name: str) -> str:
    """The command line's flag for a field, if run_llama.py has it."""
    flag = "--" + name.replace("_", "-")
    return f"`{flag}`" if flag in arguments.flags() else "Python only"


def switches(records: list[dict], root: Path = ROOT) -> str:
    """A table of every switch: what it does, values, default, lossless or lossy, measured effect."""
    declared = _switch_fields()
    defaults = {field.name: field.default for field in declared if field.default is not MISSING}
    measured = effect_of_preallocate(records, defaults)
    text = "reserve cache and mask before the first token (`model.preallocate(...)`)"
    rows = [["`preallocate`", "`--preallocate`", text, "on, off", "off", "lossless", measured]]
    for field in declared:
        about = field.metadata
        rows.append(
            [
                f"`{field.name}`",
                _flag(field.name),
                cell(about["help"]),
                cell(about["allowed"]),
                f"`{_show(field.default)}`",
                "lossless" if about["lossless"] else "lossy",
                effect(field.name, field.default, records),
            ]
        )
    return table(["switch", "flag", "what it does", "values", "default", "tokens", "measured effect"], rows)


_RESULT_HEADS = ["model", "workload", "vanilla decode tok/s", "fastllama decode tok/s", "x", "of ceiling"]
_RESULT_HEADS += ["time to first token, ms (vanilla / ours)", "max MB (vanilla / ours)", "parity", "record"]
_RESULT_RIGHT = (
    "vanilla decode tok/s",
    "fastllama decode tok/s",
    "x",
    "of ceiling",
    "time to first token, ms (vanilla / ours)",
    "max MB (vanilla / ours)",
)


_WORKLOAD = ("batch_size", "prompt_length", "new_tokens")


def result(records: list[dict], root: Path = ROOT) -> str:
    """A table per machine: of each model and dtype the newest row that has vanilla beside it.

    A model keeps the workload that it was first recorded with there: a later row of an easier one says nothing of it.
    """
    newest: dict[str, dict[tuple, dict]] = {}
    for record in own_rows(records):
        if record["baseline"] is not None and record["switches"]["preallocate"] and "assisted" not in record:
            models = newest.setdefault(figures.machine_name(record), {})
            shown = models.setdefault((record["model"], record["dtype"]), record)
            if all(shown[name] == record[name] for name in _WORKLOAD):
                models[record["model"], record["dtype"]] = record
    if not newest:
        return "No record yet: see `changes.md`.\n"
    parts = []
    for machine, models in newest.items():
        rows = []
        for record in models.values():
            vanilla, share = record["baseline"], record["ceiling_fraction"]
            rows.append(
                [
                    f"{cell(record['model'])} {record['dtype']}",
                    f"batch {record['batch_size']}, prompt {record['prompt_length']}, {record['new_tokens']} new",
                    speed(vanilla["decode_tok_per_s"], figures.spread(record, baseline=True)),
                    speed(record["decode_tok_per_s"], figures.spread(record)),
                    times_vanilla(record),
                    "-" if share is None else f"{100 * share:.0f} %",
                    f"{number(vanilla['ttft_ms'])} / {number(record['ttft_ms'])}",
                    f"{number(vanilla['max_mem_mb'])} / {number(record['max_mem_mb'])}",
                    record["parity"],
                    f"[{record['id'].split('-')[0]}]({words.LOGS}/{record['id']}/record.json)",
                ]
            )
        parts.append(f"{cell(machine)}:\n\n{table(_RESULT_HEADS, rows, _RESULT_RIGHT)}")
    return "\n".join(parts)


def quality(records: list[dict], root: Path = ROOT) -> str:
    """The scores that `eval` left in tb_logs/quality, a table for each file, model and text."""
    parts = [
        f"[{path.stem}]({path.relative_to(root).as_posix()}): {score_table.in_markdown(lines)}"
        for path, lines in score_file.kept(root).items()
        if lines
    ]
    return "\n".join(parts) or "No score is kept yet: `python -m fastllama.lab eval --json FILE`.\n"


def memory(records: list[dict], root: Path = ROOT) -> str:
    """The peaks by context length that tb_logs/memory-table holds, predicted beside measured, a table for each file."""
    parts = []
    for path in sorted((Path(root) / words.LOGS / "memory-table").glob("*.jsonl")):
        where = f"[{path.stem}]({path.relative_to(root).as_posix()})"
        parts.append(f"{where}: {memory_table.words(points_file.read(path))}")
    return (
        "\n".join(parts)
        or "No table is kept yet: `python run_llama.py --sweep memory-table --memory-only --json FILE`.\n"
    )


BLOCKS = {
    "switches": switches,
    "result": result,
    "suite": suite_table.table,
    "lossy": lossy.table,
    "quality": quality,
    "memory": memory,
    "assisted": assisted_table.table,
    "options": options_summary.table,
    "spread": paper.in_markdown,
}


def render(text: str, records: list[dict], root: Path = ROOT) -> str:
    """`text` with the inside of every "<!-- begin:NAME -->" ... "<!-- end:NAME -->" rendered anew.

    ValueError on an unknown name, or on a marker without its partner.
    """
    marker = re.compile(r"<!-- (begin|end):([\w-]+) -->")
    parts, position, opened = [], 0, None
    for match in marker.finditer(text):
        kind, name = match.groups()
        if name not in BLOCKS:
            raise ValueError(f"{NAME}: unknown block {name!r}; the blocks are {', '.join(BLOCKS)}")
        if kind == "begin" and opened is None:
            parts.append(text[position : match.end()])
            opened = name
        elif kind == "end" and opened == name:
            parts.append("\n" + BLOCKS[name](records, root) + match.group())
            opened = None
        else:
            raise ValueError(f"{NAME}: marker {match.group()} has no partner")
        position = match.end()
    if opened is not None:
        raise ValueError(f"{NAME}: block {opened!r} does not end")
    return "".join(parts) + text[position:]


def write(records: list[dict], root: Path = ROOT, check: bool = False) -> bool:
    """Render README.md in place, or with `check` only compare; True if it was up to date already."""
    path = Path(root) / NAME
    if not path.exists():
        raise FileNotFoundError(f"there is no {path} to render")
    text = path.read_text(encoding="utf-8")
    rendered = render(text, records, root)
    if rendered != text and not check:
        words.write_atomically(path, rendered)
    return rendered == text
