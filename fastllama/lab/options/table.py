"""The option table: a text file, or a folder of `option_NAME.txt`, with a line `flags/name` for each setting.

[temp]
--temp 0/temp_0

An option is named by the [heading] above its lines, or by its file. Lines under [default] have no name: they set what
holds where a setting says nothing. Empty lines, and what follows a # at the start of a line, are not read.
"""

import re
from dataclasses import dataclass, field
from itertools import combinations, product
from pathlib import Path

from fastllama.lab.options import flags
from fastllama.lab.options.setting import DEFAULT, Setting, joined
from fastllama.lab.points import workload

SHIPPED = Path(__file__).parent / "table.txt"
MOST_COMBINED = 4
_NAME = re.compile(r"[\w.=-]+")
_HEADING = re.compile(r"\[(.*)\]")


@dataclass
class OptionTable:
    """Settings by option, in order, and what holds where they say nothing."""

    options: dict[str, list[Setting]] = field(default_factory=dict)
    defaults: dict = field(default_factory=lambda: dict(flags.DEFAULTS))

    def chosen(self, names: list[str] | None) -> "OptionTable":
        """The table of these options. Raises `ValueError` for one that it does not have."""
        for name in names or []:
            if name not in self.options:
                raise ValueError(f"unknown option {name!r}; the table has: {', '.join(self.options)}")
        kept = {name: lines for name, lines in self.options.items() if names is None or name in names}
        return OptionTable(kept, self.defaults)

    def settings(self, combine: int = 1) -> list[Setting]:
        """The default, then every product of the settings of `combine` different options.

        Raises `ValueError` where there are not so many options.
        """
        if not 1 <= combine <= MOST_COMBINED:
            raise ValueError(f"--combine {combine} is not allowed; allowed: 1 to {MOST_COMBINED}")
        others = [lines for option, lines in self.options.items() if option != DEFAULT]
        if combine > 1 and combine > len(others):
            raise ValueError(f"--combine {combine} needs as many options, and there are {len(others)}")
        made = [Setting(DEFAULT, DEFAULT, "")]
        for together in combinations(others, combine):
            made += [joined(settings) for settings in product(*together)]
        return made


def read(path: str | Path | None = None) -> OptionTable:
    """The table that ships, or one's own. Raises `FileNotFoundError`, or `ValueError` naming file and line."""
    found, path = OptionTable(), SHIPPED if path is None else Path(path)
    if path.is_dir():
        files = sorted(path.glob("option_*.txt"))
        if not files:
            raise FileNotFoundError(f"the folder {path} has no option_NAME.txt")
    else:
        files = [path]
    for file in files:
        _read_into(found, file, file.stem.removeprefix("option_"))
    if not found.options:
        raise ValueError(f"the option table {path} has no line")
    names = [setting.name for lines in found.options.values() for setting in lines]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"the option table {path} has two settings named {twice!r}")
    return found


def _read_into(table: OptionTable, file: Path, option: str) -> None:
    for number, line in enumerate(workload.read_text(file, "option table").splitlines(), 1):
        line, where = line.strip(), f"{file} line {number}"
        if not line or line.startswith("#"):
            continue
        heading = _HEADING.fullmatch(line)
        if heading:
            option = _named(heading.group(1).strip(), where)
            continue
        try:
            if option == "default":
                table.defaults |= flags.parse(line)
                flags.check(table.defaults)
                continue
            words, slash, name = line.rpartition("/")
            if not slash:
                raise ValueError(f"{line!r} has no name: a line is flags/name")
            setting = Setting(option, _named(name.strip(), where), words.strip(), flags.parse(words))
        except ValueError as fault:
            words = str(fault)
            raise ValueError(words if words.startswith(where) else f"{where}: {words}") from None
        if option == DEFAULT and setting.given:
            raise ValueError(f"{where}: {DEFAULT} is the default itself and sets nothing")
        table.options.setdefault(option, []).append(setting)


def _named(name: str, where: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{where}: {name!r} is no name; allowed: letters, digits and _ . = -")
    return name
