"""README's table of lossy switches: speed, memory and quality of each recorded one, beside ours without it."""

from pathlib import Path

from fastllama.lab.measuring import statistics
from fastllama.lab.points import figures
from fastllama.lab.quality import score
from fastllama.lab.records import changes as log
from fastllama.lab.records import words
from fastllama.lab.records.schema2 import LOSSY_SWITCHES, lossy_switches
from fastllama.lab.records.sources import ROOT

_HEADS = ["lossy switch", "decode tok/s", "without", "x", "MB a token", "without", "max MB", "without"]
_HEADS += ["perplexity", "change", "mean KL", "top-1", "record"]
_NONE = (
    'No lossy switch is recorded yet: `python run_llama.py --preallocate --weights int8 --record "what"` adds one.\n'
)


def float_twin(record: dict, records: list[dict]) -> dict | None:
    """The newest record of the same sources, machine, workload and cache length that differs in lossy switches alone,
    of which it has none; None if there is no such record."""
    own = _without(record)
    twins = [other for other in records if not lossy_switches(other) and _without(other) == own]
    return twins[-1] if twins else None


def _without(record: dict) -> tuple:
    """What two records have to share for their lossy switches to be what makes the difference."""
    switches = {name: value for name, value in record["switches"].items() if name not in LOSSY_SWITCHES}
    same = (record["source_sha256"], figures.machine_name(record), figures.workload(record), record["cache_length"])
    return (*same, switches)


def _over(record: dict, twin: dict | None) -> str:
    """Decode speed over the twin's, through the vanilla of each one's run; "~" where the rule finds no difference."""
    if twin is None or not record["decode_speedup"] or not twin["decode_speedup"]:
        return "-"
    verdict = statistics.compare_points(record, twin)
    return f"{verdict.ratio:.2f}" + (" ~" if verdict.word == statistics.NO_DIFFERENCE else "")


def _step_mb(record: dict | None) -> str:
    read, steps_per_s = (None, None) if record is None else (record["read_gb_per_s"], record["row_tok_per_s"])
    return log.number(None if read is None or not steps_per_s else 1000 * read / steps_per_s)


def _quality(record: dict) -> list[str]:
    found = record["score"]
    if found is None:
        return [f"not scored: {log.cell(record['not_scored'])}", "-", "-", "-"]
    return [
        f"{found['perplexity']:.4g}",
        score.change(found),
        score.small(found["mean_kl"]),
        f"{100 * found['top1_agreement']:.1f} %",
    ]


def _row(record: dict, twin: dict | None) -> list[str]:
    switches = ", ".join(f"`{name}` {value}" for name, value in lossy_switches(record).items())
    compiled = record["switches"]["compile"]
    return [
        switches + ("" if compiled == "no" else f", `compile` {compiled}"),
        log.speed(record["decode_tok_per_s"], figures.spread(record)),
        "-" if twin is None else log.speed(twin["decode_tok_per_s"], figures.spread(twin)),
        _over(record, twin),
        _step_mb(record),
        _step_mb(twin),
        log.number(record["max_mem_mb"]),
        "-" if twin is None else log.number(twin["max_mem_mb"]),
        *_quality(record),
        f"[{record['id'].split('-')[0]}]({words.LOGS}/{record['id']}/record.json)",
    ]


def table(records: list[dict], root: Path = ROOT) -> str:
    """A table per machine and workload: of each combination of switches the newest record."""
    newest: dict[tuple, dict[tuple, dict]] = {}
    for record in records:
        if record["parity"] == "lossy":
            group = newest.setdefault((figures.machine_name(record), figures.workload_name(record)), {})
            group[tuple(sorted((name, str(value)) for name, value in record["switches"].items()))] = record
    parts = []
    for (machine, workload), rows in newest.items():
        lines = [_row(record, float_twin(record, records)) for record in rows.values()]
        parts.append(f"{log.cell(workload)}; {log.cell(machine)}:\n\n{log.table(_HEADS, lines, tuple(_HEADS[1:-1]))}")
    return "\n".join(parts) or _NONE
