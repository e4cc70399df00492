"""The plan of a run: its points, each with a short name, from options and from what --sweep was given."""

from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from fastllama.lab.measuring import checkpoint
from fastllama.lab.points import option
from fastllama.lab.points.option import OPTIONS
from fastllama.lab.points.point import Point

# What is swept under a name of its own, unless its flag says which values.
NAMED = {
    "batch": ("batch_size", [1, 2, 4, 8, 16, 32, 64, 128]),
    "length": ("prompt_length", [100, 200, 400, 800, 1600]),
}
RUNS = 10
# The tables of a seed, each a file that one word reruns: --sweep memory-table.
SHIPPED = {path.stem: path for path in sorted((Path(__file__).parents[1] / "sweeps").glob("*.toml"))}
_CASES = "case"  # [[case]] in a file: options that go together, one point each for every point of the product
_SIZES = ("batch_size", "prompt_length", "new_tokens")


@dataclass(frozen=True)
class Planned:
    """A point and its name in its plan, such as "batch_size=8,prompt_length=128"."""

    name: str
    point: Point


@dataclass(frozen=True)
class Plan:
    """kind: what a file of its points is called. left_out: (name, reason) of combinations that no point can have."""

    kind: str
    axes: tuple[str, ...]
    planned: list[Planned]
    left_out: list[tuple[str, str]]

    def spread_over(self, world_size: int) -> "Plan":
        """The same points, each measured by so many processes together. `ValueError` for one that cannot be."""
        planned = [replace(each, point=replace(each.point, world_size=world_size)) for each in self.planned]
        return replace(self, planned=planned)

    @property
    def points(self) -> list[Point]:
        return [each.point for each in self.planned]

    @property
    def file_name(self) -> str:
        """Where a sweep keeps its points, when it is not told: what it sweeps, and what is the same for all of them."""
        first = self.points[0]
        same = {
            "model": first.model_name.replace(":", "-").replace("/", "-"),
            "dtype": first.dtype,
            "device": first.device.replace(":", "-"),
            "preallocate": "preallocate" if first.preallocate else "vanilla",
            "compile": first.compile,
        }
        return "-".join([self.kind, *(word for name, word in same.items() if name not in self.axes)]) + ".jsonl"

    def find(self, name: str) -> Point:
        """The point of that name, its parts in any order. `ValueError` lists the names that there are."""
        wanted = _parts(name)
        for each in self.planned:
            if _parts(each.name) == wanted:
                return each.point
        names = "; ".join(each.name for each in self.planned)
        raise ValueError(f"there is no point {name!r} in this sweep; there are {names}")


def _parts(name: str) -> frozenset[str]:
    return frozenset("".join(part.split()) for part in name.split(","))


def name_of(values: dict) -> str:
    """The name of a point that has these values of the options that its plan varies."""
    return ",".join(f"{name}={option.words(value)}" for name, value in values.items())


def _read_toml(path: Path) -> dict:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib  # type: ignore[no-redef]
    if not path.is_file():
        raise FileNotFoundError(f"there is no sweep file {path}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as fault:
        raise ValueError(f"{path}: not valid TOML: {fault}") from None


def _list(found: option.Option, given: list) -> list:
    if not given:
        raise ValueError(f"{found.name} has no value to sweep; allowed: {found.allowed}")
    return [found.value(one) for one in given]


def _cases(given) -> list[dict]:
    if not isinstance(given, list) or not given or not all(isinstance(case, dict) and case for case in given):
        raise ValueError(f"{_CASES} must be one or more tables [[{_CASES}]] of options")
    return [
        {found.name: found.value(value) for found, value in ((option.option(name), case[name]) for name in case)}
        for case in given
    ]


def _of_file(path: Path) -> tuple[dict, dict, list[dict]]:
    axes, fixed, cases = {}, {}, []
    for name, given in _read_toml(path).items():
        try:
            if name == _CASES:
                cases = _cases(given)
                continue
            found = option.option(name)
            if isinstance(given, list):
                axes[found.name] = _list(found, given)
            else:
                fixed[found.name] = found.value(given)
        except ValueError as fault:
            raise ValueError(f"{path}: {fault}") from None
    return axes, fixed, cases


def _of_word(word: str) -> tuple[str, dict, dict, list[dict]]:
    """(kind, axes, fixed values, cases) of one --sweep."""
    if "=" in word:
        name, _, values = word.partition("=")
        found = option.option(name)
        return found.name, {found.name: _list(found, [one for one in values.split(",") if one.strip()])}, {}, []
    if word in SHIPPED:
        return word, *_of_file(SHIPPED[word])
    if word.endswith(".toml"):
        return Path(word).stem, *_of_file(Path(word))
    if word not in NAMED:
        known = ", ".join((*NAMED, *SHIPPED))
        raise ValueError(f"--sweep {word!r} is not {known}, name=value,value,... or a .toml file")
    return word, dict([NAMED[word]]), {}, []


def _add(target: dict, new: dict, taken: dict) -> None:
    for name in new:
        if name in taken or name in target:
            raise ValueError(f"{name} is given twice: leave it out of --sweep, or give it there only")
    target.update(new)


def make(given: dict, sweeps: list[str], defaults: dict[str, list], runs: int, warmup: int) -> Plan:
    """The plan of what the command line says.

    given: by option name, a value (or its word), or for the three sizes a list of them. sweeps: the words of each
    --sweep. defaults: lists of the sizes for when nothing names them. Raises `ValueError` or `OSError` in one
    sentence, before any model is looked at; a product leaves out what does not go together, unless nothing is left.
    """
    lists = {name: _list(OPTIONS[name], given[name]) for name in _SIZES if name in given}
    fixed = {name: OPTIONS[name].value(value) for name, value in given.items() if name not in lists}
    kinds = []
    swept: dict[str, Any] = {}
    cases: list[dict] = []
    for word in sweeps:
        kind, axes, values, found = _of_word(word)
        kinds.append(kind)
        if word in NAMED:
            axes = {name: lists.pop(name, values) for name, values in axes.items()}
        _add(swept, axes, fixed | lists)
        _add(fixed, values, swept | lists)
        if found:
            if cases:
                raise ValueError(f"two of the --sweep files have [[{_CASES}]]: give one of them")
            names = {name for case in found for name in case}
            _add({}, dict.fromkeys(names), fixed | swept | lists)
            cases = found
    sizes = {name: lists.get(name, defaults[name]) for name in _SIZES if name not in swept and name not in fixed}
    axes = {name: values for name, values in sizes.items() if len(values) > 1} | swept
    fixed |= {name: values[0] for name, values in sizes.items() if len(values) == 1}
    varied = tuple(dict.fromkeys((*axes, *(name for case in cases for name in case))))
    return Plan("-".join(kinds), varied, *_product(axes, cases or [{}], fixed, runs, warmup))


def _product(
    axes: dict[str, list], cases: list[dict], fixed: dict, runs: int, warmup: int
) -> tuple[list[Planned], list[tuple[str, str]]]:
    device = cache(lambda name: checkpoint.auto_device() if name == "auto" else checkpoint.check_device(name))
    made, left_out, reasons = [], [], []
    for *combination, case in product(*axes.values(), cases):
        swept = dict(zip(axes, combination, strict=True)) | case
        values = {"model": "demo", "dtype": "auto", "device": "auto"} | fixed | swept
        values["device"] = device(values["device"])
        if values.get("draft_device") is not None:
            checkpoint.check_device(values["draft_device"])
        name = name_of(swept or {size: values[size] for size in _SIZES})
        try:
            # Whatever can be refused is refused before a model is looked at.
            made.append((name, values["dtype"], option.point(values | {"dtype": "fp32"}, runs, warmup)))
        except ValueError as fault:
            left_out.append((name, str(fault)))
            reasons.append(fault)
    if not made:
        raise reasons[0]
    dtype = cache(checkpoint.auto_dtype)
    planned = [
        Planned(name, replace(point, dtype=dtype(point.model, point.device) if word == "auto" else word))
        for name, word, point in made
    ]
    _refuse_twins(planned)
    return planned, left_out


def _refuse_twins(planned: list[Planned]) -> None:
    """Two points with one command line could not be told apart in a file."""
    names: dict[str, str] = {}
    for each in planned:
        twin = names.setdefault(each.point.command(), each.name)
        if twin is not each.name:
            raise ValueError(f"{twin} and {each.name} are the same point: leave one of them out")
