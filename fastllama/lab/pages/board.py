"""What TensorBoard shows of records: charts, a table of switches and figures, and what was generated.

A run per record, the record's number as its step.
"""

import html
from datetime import datetime
from pathlib import Path

from fastllama.lab.pages import events
from fastllama.lab.points import figures
from fastllama.lab.quality import score
from fastllama.lab.records import columns

FIGURES = (
    "tok_per_s",
    "decode_tok_per_s",
    "speedup",
    "decode_speedup",
    "ttft_ms",
    "max_mem_mb",
    "max_reserved_mb",
    "ceiling_fraction",
)
# The figures of the hparams table, which reads a column from scalars of one tag, whatever the workload.
METRICS = ("decode_tok_per_s", "decode_speedup", "ttft_ms", "max_mem_mb", "ceiling_fraction", "speedup")
EVERY = "every workload"
# Sizes follow from the model in most of the log, and would take the place of switches.
_LATER = ("batch_size", "prompt_length", "new_tokens", "cache_length", "seed")


def tag(record: dict, name: str) -> str:
    """The chart a figure belongs to: "<workload>/<figure>", where TensorBoard groups by what precedes the slash."""
    keys = ("model", "dtype", "device", "batch_size", "prompt_length", "new_tokens")
    workload = "{} {} {} b{} p{} n{}".format(*(record[key] for key in keys))
    *_, assistance, sampler = figures.workload(record)
    workload += "" if assistance is None else f" {assistance}"
    workload += "" if sampler == "greedy" else f" {sampler}"
    return f"{workload.replace('/', '_')}/{name}"


def step(record: dict) -> int:
    """The record's number."""
    return int(record["id"].split("-")[0])


def as_text(text: str, element: str = "pre") -> str:
    """Markdown that shows `text` as it is, markup and white space and all; other control characters as escapes.

    element: "pre", or "p" for words of one line, which are wrapped.
    """
    # A fence can be ended by the text, and an indented block loses white space at its ends. Without the inner
    # element a browser drops a first newline.
    return f"<{element}><code>{''.join(map(_shown, text))}</code></{element}>"


def _shown(character: str) -> str:
    if character in "\n\t":
        return f"&#{ord(character)};"
    return html.escape(character) if character.isprintable() else ascii(character)[1:-1]


def hparams(records: list[dict]) -> dict[str, list]:
    """The hparams table's columns: workload, sampler, switches, machine; each a value (or None) per record.

    A column has values of one kind. One that no record has a value for is left out.
    """
    options = [*columns.options(records), columns.Column("machine", str, "machine", figures.machine_name)]
    made = {}
    for option in options:
        values = [option.value(record) for record in records]
        if option.kind is str:
            values = [None if value is None else str(value) for value in values]
        if any(value is not None for value in values):
            made[option.name] = values
    return made


def _charts_and_texts(record: dict) -> list:
    found = {name: record[name] for name in FIGURES if record[name] is not None}
    made = [events.scalar(tag(record, name), value) for name, value in found.items()]
    made += [events.scalar(f"{EVERY}/{name}", found[name]) for name in METRICS if name in found]
    # One entry, since TensorBoard shows twelve of a workload at a time, sorted by name.
    head = f"hash {record['hash']}, parity {record['parity']}, commit {record['commit'][:7]}"
    head += f"; {quality}" if (quality := score.of_record(record)) else ""
    parts = (head, as_text(record["text_sample"]), as_text(record["what"], "p"), as_text(record["command"], "p"))
    made.append(events.text(tag(record, "text_sample"), "\n\n".join(parts)))
    return made


def write_all(records: list[dict], logs: Path) -> int:
    """Write what TensorBoard shows of all records under `logs`, in place of what it showed; how many records.

    The columns of the hparams table are in each record's events, so a record alone brings only its own.
    """
    table = hparams(records)
    shown = events.hparams_columns(table, {f"{EVERY}/{name}": name for name in METRICS}, _LATER)
    for index, record in enumerate(records):
        time = datetime.fromisoformat(record["recorded_at"]).timestamp()
        row = {name: values[index] for name, values in table.items() if values[index] is not None}
        summaries = [shown, *events.hparams_row(row, time), *_charts_and_texts(record)]
        events.write(Path(logs) / record["id"], summaries, step(record), time)
    return len(records)
