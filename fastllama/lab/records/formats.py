"""Tables of points as text or as a database: one function per format, from tables to what a file holds."""

import csv
import io
import json
import re
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console, Group
from rich.table import Table as RichTable
from rich.text import Text

from fastllama.kernels.whole_file import whole
from fastllama.lab.records.columns import Column
from fastllama.lab.records.tables import Table

NAMES = ("md", "csv", "json", "jsonl", "sqlite")
_SQL = {str: "TEXT", int: "INTEGER", bool: "INTEGER", float: "REAL", object: ""}
_WIDE = 100_000
_HEAD = 10


def _csv_cell(value):
    # As JSON writes them; csv has no null, which is an empty cell.
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else value


def to_csv(table: Table) -> str:
    """A header and a line per row; figures have all their digits, and null is an empty cell."""
    out = io.StringIO()
    writer = csv.writer(out)  # ends lines with CRLF, as RFC 4180 has it, so that either character in a cell is quoted
    writer.writerow(table.header)
    writer.writerows([_csv_cell(value) for value in row] for row in table.rows)
    return out.getvalue()


def to_json(tables: dict[str, Table]) -> str:
    """One object with a list of objects per table."""
    content = {name: table.objects for name, table in tables.items()}
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def to_jsonl(table: Table) -> str:
    """An object a line, in ASCII, since some readers take other characters for ends of lines."""
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in table.objects)


def write_sqlite(tables: dict[str, Table], path: Path) -> None:
    """A database with these tables, which takes the place of `path` when it is whole. OSError if it cannot be made."""
    path = Path(path)
    try:
        _fill(tables, path)
    except sqlite3.Error as fault:
        raise OSError(f"{path} cannot be written: {fault}") from fault
    except OverflowError:
        raise ValueError(f"{path} cannot be written: a number has more than the 63 bits of a database's") from None


def _fill(tables: dict[str, Table], path: Path) -> None:
    with whole(path) as unfinished:
        unfinished.unlink(missing_ok=True)
        database = sqlite3.connect(unfinished)
        try:
            for name, table in tables.items():
                declared = ", ".join(f'"{column.name}" {_SQL[column.kind]}'.strip() for column in table.columns)
                database.execute(f'CREATE TABLE "{name}" ({declared})')
                places = ", ".join("?" * len(table.columns))
                database.executemany(f'INSERT INTO "{name}" VALUES ({places})', table.rows)
            database.commit()
        finally:
            database.close()
            unfinished.with_name(unfinished.name + "-journal").unlink(missing_ok=True)


def _for_people(value, column: Column) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:,.{column.digits}f}"
    return " ".join(str(value).split())


@dataclass(frozen=True)
class _Shown:
    """A column for people: a median has the smallest and the largest with it, in its cell."""

    column: Column
    values: list[tuple]  # of each row: (value,) or (median, smallest, largest)

    @property
    def varies(self) -> bool:
        return len(set(map(repr, self.values))) > 1

    def in_words(self, row: int, in_lines: bool = False) -> str:
        """The cell of a row; "-" where there is no such row."""
        value, *ends = self.values[row] if row < len(self.values) else (None,)
        words = [_for_people(each, self.column) for each in (value, *ends)]
        if not ends or ends[0] == ends[1]:
            return words[0]
        return "\n".join(words) if in_lines else f"{words[0]} ({words[1]}..{words[2]})"

    def cells(self, markdown: bool) -> list[str]:
        shown = [self.in_words(row, in_lines=not markdown) for row in range(len(self.values))]
        # A bar would end a cell of markdown.
        return [cell.replace("|", "\\|") for cell in shown] if markdown else shown


def _for_reading(table: Table) -> list[_Shown]:
    places = {column.name: index for index, column in enumerate(table.columns)}
    shown = []
    for column in table.columns:
        if column.name.endswith(("_min", "_max")) and column.name[:-4] in places:
            continue
        ends = [column.name + end for end in ("_min", "_max") if column.name + end in places]
        taken = [places[name] for name in (column.name, *ends)]
        shown.append(_Shown(column, [tuple(row[index] for index in taken) for row in table.rows]))
    return shown


def _head(name: str) -> str:
    """A column's name, in lines of about ten characters."""
    lines = [""]
    for part in re.findall(r"[^_]+_?", name):
        if lines[-1] and len(lines[-1] + part) > _HEAD:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _drawn(title: str, columns: list[_Shown], markdown: bool) -> Group:
    drawn = RichTable(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD, padding=(0, 1) if markdown else (0, 1, 0, 0))
    for shown in columns:
        name = shown.column.name
        is_number = shown.column.kind in (int, float)
        head = Text(name if markdown else _head(name))
        drawn.add_column(head, justify="right" if is_number else "left", overflow="fold")
    for cells in zip(*(shown.cells(markdown) for shown in columns), strict=True):
        drawn.add_row(*map(Text, cells))  # not as markup: a path may hold brackets
    return Group(Text(f"## {title}" if markdown else title, "" if markdown else "bold"), drawn, Text(""))


def to_rich(tables: dict[str, Table], markdown: bool = False) -> Group:
    """Everything but the single runs, for a person: the options' medians, a table for each group of the columns that
    vary, and as a list what all points share."""
    options, points = tables["options"], tables["points"]
    parts = [_drawn("per option", _for_reading(options), markdown)] if options.rows else []
    compared = {row[0] for row in options.rows}
    columns = _for_reading(points)
    keys = [shown for shown in columns if shown.column.name == "point" or shown.column.name in compared]
    rest = [shown for shown in columns if shown not in keys]
    for group in dict.fromkeys(shown.column.group for shown in rest if shown.varies):
        chosen = [shown for shown in rest if shown.varies and shown.column.group == group]
        parts.append(_drawn(f"points: {group}", [*keys, *chosen], markdown))
    same = [shown for shown in rest if not shown.varies]
    lists = [
        _Shown(Column("column", str, "", None), [(shown.column.name,) for shown in same]),
        _Shown(Column("value", str, "", None), [(shown.in_words(0),) for shown in same]),
    ]
    return Group(*parts, _drawn(f"the same in all {len(points.rows)} points", lists, markdown))


def to_markdown(tables: dict[str, Table]) -> str:
    """The same as text, in tables of markdown of any width."""
    out = io.StringIO()
    Console(file=out, width=_WIDE, color_system=None).print(to_rich(tables, markdown=True))
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    return "".join(line + "\n" for line, before in zip(lines, [None, *lines], strict=False) if line or before)
