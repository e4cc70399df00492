"""What a sweep varies, as the axis and the series of a picture."""

from dataclasses import dataclass
from numbers import Real

from fastllama.lab.points import figures, option
from fastllama.lab.points.option import OPTIONS

SERIES = 8  # as many kinds of marker as there are
# Numbers that have no order.
_NAMES = ("seed",)
_UNITS = {
    "batch_size": "rows",
    "prompt_length": "tokens",
    "cache_length": "positions",
    "bucket": "positions",
    "prefill_chunk": "tokens",
}


@dataclass(frozen=True)
class Swept:
    """points: measured, one of each combination, in the order of the file.

    axis: the option along the axis, series: the other one that varies, None if there is none. missing: a name and the
    reason of each point that has no figure.
    """

    axis: str
    series: str | None
    points: list[dict]
    missing: list[str]

    def values(self, name: str) -> list:
        """The values of an option, numbers in their order and words as they come."""
        found = list(dict.fromkeys(value(point, name) for point in self.points))
        return sorted(found) if is_numeric(name, found) else found

    @property
    def is_numeric(self) -> bool:
        """Whether the axis is one of numbers."""
        return is_numeric(self.axis, self.values(self.axis))

    @property
    def is_size(self) -> bool:
        """Whether the axis is one of whole numbers above zero, which grow by factors."""
        whole = int in OPTIONS[self.axis].kinds
        return self.is_numeric and whole and min(self.values(self.axis)) > 0

    @property
    def label(self) -> str:
        """The axis in words, with its unit."""
        unit = _UNITS.get(self.axis)
        return self.axis.replace("_", " ") + (f", {unit}" if unit else "")

    def of(self, series) -> list[dict]:
        """The points of one series, in the order of the axis."""
        chosen = [point for point in self.points if self.series is None or value(point, self.series) == series]
        order = self.values(self.axis)
        return sorted(chosen, key=lambda point: order.index(value(point, self.axis)))


def value(point: dict, name: str):
    """An option of a stored point; a cache_length that was not given is what prompt and new tokens need."""
    found = option.stored(point, name)
    if name == "cache_length" and found is None and point["switches"]["preallocate"]:
        return point["prompt_length"] + point["new_tokens"]
    return found


def is_numeric(name: str, values: list) -> bool:
    """Whether all values of an option are numbers that have an order."""
    return name not in _NAMES and all(isinstance(one, Real) and not isinstance(one, bool) for one in values)


def _varied(points: list[dict]) -> list[str]:
    """The options in which points differ; ours alone have switches and a cache length, which others do not lack."""
    ours = [point for point in points if point["switches"]["preallocate"]]

    def counts(name: str) -> bool:
        is_ours = (OPTIONS[name].place == "switch" and name != "compile") or name == "cache_length"
        # Of one length that was chosen, the one that a point would have had anyway is stored no other way.
        return not is_ours or all(len({of(point, name) for point in ours}) > 1 for of in (option.stored, value))

    return [name for name in option.varied(points) if counts(name)]


def _newest(entries: list[dict]) -> list[dict]:
    """Of entries with the same options the last that was measured, or the last where none was."""
    newest = {}
    for entry in sorted(entries, key=lambda entry: "status" not in entry):
        newest[tuple(option.stored(entry, name) for name in OPTIONS)] = entry
    return [entry for entry in entries if any(entry is kept for kept in newest.values())]


def _named(entry: dict, names: list[str], why: str) -> str:
    words = ", ".join(f"{name}={option.words(option.stored(entry, name))}" for name in names)
    return f"{words or 'a point'}: {why}"


def _chosen(names: list[str], points: list[dict], axis: str | None) -> tuple[str, str | None]:
    """(axis, series): the axis that was asked for, or the option of numbers, or of more values."""
    if axis is not None:
        wanted = option.option(axis).name
        if wanted not in names:
            raise ValueError(f"{wanted} does not vary between the points; what varies: {', '.join(names)}")
        return wanted, next((name for name in names if name != wanted), None)

    def rank(name: str) -> tuple[bool, int]:
        values = {value(point, name) for point in points}
        return is_numeric(name, list(values)), len(values)

    first = max(names, key=rank)
    return first, next((name for name in names if name != first), None)


def swept(entries: list[dict], figure: str, axis: str | None = None) -> Swept:
    """What the entries of a file vary, as points_file.read gives them; of points measured twice the last counts.

    axis: the option along the axis; without it one of numbers, and of two such the one with more values.
    ValueError, one sentence, if no point has the figure, if they are of several machines, or if nothing or more than
    two options vary.
    """
    newest = _newest(entries)
    points = [entry for entry in newest if "status" not in entry and entry[figure] is not None]
    machines = list(dict.fromkeys(figures.machine_name(entry) for entry in entries if "status" not in entry))
    if len(machines) > 1:
        raise ValueError(f"the points are of {len(machines)} machines, which are not compared: {'; '.join(machines)}")
    every = _varied(newest)
    missing = [
        _named(entry, every, entry.get("status", f"no {figure}"))
        for entry in newest
        if not any(entry is point for point in points)
    ]
    aside = f" ({'; '.join(missing)})" if missing else ""
    if not points:
        raise ValueError(f"no measured point has {figure}, so there is nothing to draw{aside}")
    names = _varied(points)
    if not names:
        raise ValueError(f"nothing varies between the measured points, so there is no curve{aside}")
    if len(names) > 2:
        raise ValueError(f"a picture shows at most two options, and here {len(names)} vary: {', '.join(names)}")
    found = Swept(*_chosen(names, points, axis), points, missing)
    if found.series is not None and len(found.values(found.series)) > SERIES:
        count = len(found.values(found.series))
        raise ValueError(f"a picture shows at most {SERIES} series, and {found.series} has {count} values")
    return found
