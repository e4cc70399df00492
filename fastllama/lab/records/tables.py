"""Points as three tables: a row per point, per run, and per value of each option that varies among the points."""

from dataclasses import dataclass
from statistics import median

from fastllama.lab.points import figures
from fastllama.lab.records import columns
from fastllama.lab.records.columns import Column

NAMES = ("points", "runs", "options")


@dataclass(frozen=True)
class Table:
    """rows: one value per column each, as the record has it and not rounded."""

    name: str
    columns: list[Column]
    rows: list[list]

    @property
    def header(self) -> list[str]:
        return [column.name for column in self.columns]

    @property
    def objects(self) -> list[dict]:
        """Each row by the names of the columns."""
        return [dict(zip(self.header, row, strict=True)) for row in self.rows]


def _table(name: str, made: list[Column], sources: list[dict]) -> Table:
    return Table(name, made, [[column.value(source) for column in made] for source in sources])


def _samples(point: dict, number: int, contestant: str, runs: list[dict]) -> list[dict]:
    rows = []
    for index, run in enumerate(runs, 1):
        derived = figures.samples([run], point["batch_size"], point["new_tokens"])
        rows.append(
            {
                "point": number,
                "contestant": contestant,
                "run": index,
                **run,
                **{name: values[0] if values else None for name, values in derived.items()},
            }
        )
    return rows


def _runs(points: list[dict]) -> list[dict]:
    rows = []
    for number, point in enumerate(points, 1):
        if "runs" not in point:
            continue  # it failed, or was skipped
        baseline = point["baseline"]
        rows += _samples(point, number, figures.subject_name(point), point["runs"])
        rows += [] if baseline is None else _samples(point, number, "vanilla", baseline["runs"])
    return rows


def varying(points: list[dict]) -> list[Column]:
    """The options that have more than one value among the points.

    A cache that is always as long as prompt and new tokens was not chosen, and is none.
    """
    found = []
    for column in columns.options(points):
        values = {(type(column.value(point)), column.value(point)) for point in points}
        derived = column.name == "cache_length" and all(
            point["cache_length"] in (None, point["prompt_length"] + point["new_tokens"]) for point in points
        )
        if len(values) > 1 and not derived:
            found.append(column)
    return found


def _options(points: list[dict]) -> list[dict]:
    rows = []
    for column in varying(points):
        groups: dict[tuple, list[dict]] = {}
        for point in points:
            value = column.value(point)
            groups.setdefault((type(value), value), []).append(point)
        # Numbers in their order; words in the order in which they were measured.
        if all(kind in (int, float) for kind, _ in groups):
            groups = {key: groups[key] for key in sorted(groups, key=lambda key: key[1])}
        for (_, value), members in groups.items():
            row = {"option": column.name, "value": value, "points": len(members)}
            for name in columns.COMPARED:
                found = [figure for point in members if (figure := point.get(name)) is not None]
                ends = (median(found), min(found), max(found)) if found else (None, None, None)
                row |= {name + end: figure for end, figure in zip(("", "_min", "_max"), ends, strict=True)}
            rows.append(row)
    return rows


def of(points: list[dict]) -> dict[str, Table]:
    """The three tables, by name; points are numbered from 1 in their order."""
    numbered = [Column("point", int, "options", lambda point: point["_number"]), *columns.of_points(points)]
    rows = [{**point, "_number": number} for number, point in enumerate(points, 1)]
    return {
        "points": _table("points", numbered, rows),
        "runs": _table("runs", columns.OF_RUNS, _runs(points)),
        "options": _table("options", columns.OF_OPTIONS, _options(points)),
    }
