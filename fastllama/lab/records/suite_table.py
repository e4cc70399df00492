"""README's table of the suite: a row for each claim, a column for each machine, rendered from the suite's records."""

from pathlib import Path

from fastllama.lab.points import figures
from fastllama.lab.records import changes
from fastllama.lab.records.sources import ROOT
from fastllama.lab.suite import suite_file

_BREAK = "<br>"


def _measured(path: Path, record: dict, root: Path) -> str:
    """What a machine measured of a line, in the order of what is asked, with its parity and its run."""
    run = f"[{path.stem}]({path.relative_to(root).as_posix()})"
    if record["not_measured"] is not None:
        return f"not measured: {changes.cell(record['not_measured'])}{_BREAK}{run}"
    shown = []
    for name in [bound["figure"] for bound in record["asked"]] or record["measured"]:
        value = figures.figure(record["measured"].get(name))
        value = value if record["reached_by_figure"].get(name, True) else f"**{value}**"
        shown.append(value if record["asked"] else f"{name} {value}")
    return _BREAK.join([*shown, f"{record['parity'] or 'no parity'}, {run}"])


def _verdict(machine: str, lines: dict[str, tuple[Path, dict]]) -> str:
    asked = [record for _, record in lines.values() if record["asked"]]
    return f"- {changes.cell(machine)}: {sum(bool(each['reached']) for each in asked)} of {len(asked)} lines reached"


def table(records: list[dict], root: Path = ROOT) -> str:
    """The newest measurement of each line on each machine, what was not measured included; a table for each device."""
    current, parts = suite_file.current(root), []
    for device in dict.fromkeys(record["device"] for lines in current.values() for _, record in lines.values()):
        machines = {
            machine: lines
            for machine, lines in current.items()
            if any(record["device"] == device for _, record in lines.values())
        }
        newest: dict[str, dict] = {}
        for lines in machines.values():
            for name, (_, record) in lines.items():
                if name not in newest or newest[name]["recorded_at"] < record["recorded_at"]:
                    newest[name] = record
        rows = []
        for name, record in newest.items():
            bounds = [f"{bound['figure']} {bound['op']} {bound['bound']:g}" for bound in record["asked"]]
            cells = [_measured(*lines[name], root) if name in lines else "-" for lines in machines.values()]
            rows.append([f"`{name}`: {changes.cell(record['what'])}", _BREAK.join(bounds) or "-", *cells])
        parts.append("\n".join(_verdict(*each) for each in machines.items()) + "\n")
        parts.append(changes.table(["line", "asked", *map(changes.cell, machines)], rows))
    return "\n".join(parts) or "No whole run of the suite yet: `python -m fastllama.lab.suite cpu`.\n"
