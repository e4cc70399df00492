"""README's table of assistance: of each target, assistance and machine the newest record."""

from pathlib import Path

from fastllama.lab.points import figures
from fastllama.lab.records import changes
from fastllama.lab.records.sources import ROOT
from fastllama.lab.records.words import LOGS

NONE_YET = (
    'No assistance is recorded yet: `python run_llama.py --preallocate --draft demo-draft --record "what"` adds one.\n'
)
_HEADS = ["target", "assisted by", "unassisted tok/s", "assisted tok/s", "x end to end", "acceptance"]
_HEADS += ["tokens per target forward", "switched off", "ids", "record"]
_RIGHT = tuple(_HEADS[2:8])


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def _row(record: dict) -> list[str]:
    found = record["assisted"]
    return [
        changes.cell(figures.workload_name({name: value for name, value in record.items() if name != "assisted"})),
        changes.cell(figures.assistance(record)),
        changes.speed(found["unassisted"]["tok_per_s"]),
        changes.speed(record["tok_per_s"], figures.spread(record, "tok_per_s")),
        changes.number(found["speedup_end_to_end"], 2),
        _share(found["acceptance"]),
        changes.number(found["tokens_per_target_forward"], 2),
        str(found["switched_off"]),
        found["parity"],
        f"[{record['id'].split('-')[0]}]({LOGS}/{record['id']}/record.json)",
    ]


def table(records: list[dict], root: Path = ROOT) -> str:
    """A table per machine; one sentence where no record is assisted."""
    newest: dict[str, dict] = {}
    for record in records:
        if "assisted" in record:
            newest.setdefault(figures.machine_name(record), {})[figures.workload(record)] = record
    parts = [
        f"{changes.cell(machine)}:\n\n{changes.table(_HEADS, [_row(one) for one in found.values()], _RIGHT)}"
        for machine, found in newest.items()
    ]
    return "\n".join(parts) or NONE_YET
