"""Tables of points as text or as a database: one function per format, from tables to what a file holds."""

import csv
import io
import json
import os
import sqlite3
from pathlib import Path

from rich import box
from rich.console import Console, Group
from rich.table import Table as RichTable
from rich.text import Text

from fastllama.lab.columns import Column
from fastllama.lab.tables import Table

NAMES = ("md", "csv", "json", "jsonl", "sqlite")
_SQL = {str: "TEXT", int: "INTEGER", bool: "INTEGER", float: "REAL", object: ""}
_WIDE = 100_000


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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        database = sqlite3.connect(temporary)
        try:
            for name, table in tables.items():
                declared = ", ".join(f'"{column.name}" {_SQL[column.kind]}'.strip() for column in table.columns)
                database.execute(f'CREATE TABLE "{name}" ({declared})')
                places = ", ".join("?" * len(table.columns))
                database.executemany(f'INSERT INTO "{name}" VALUES ({places})', table.rows)
            database.commit()
        finally:
            database.close()
        os.replace(temporary, path)
    except sqlite3.Error as fault:
        raise OSError(f"{path} cannot be written: {fault}") from fault
    except OverflowError:
        raise ValueError(f"{path} cannot be written: a number has more than the 63 bits of a database's") from None
    finally:
        temporary.unlink(missing_ok=True)
        temporary.with_name(temporary.name + "-journal").unlink(missing_ok=True)


def _for_people(value, column: Column) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:,.{column.digits}f}"
    return " ".join(str(value).split())


def _shown(columns: list[Column], rows: list[list], title: str, markdown: bool) -> Group:
    shown = RichTable(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD, padding=(0, 1) if markdown else (0, 1, 0, 0))
    for column in columns:
        right = column.kind in (int, float)
        shown.add_column(Text(column.name), justify="right" if right else "left", overflow="fold")
    for row in rows:
        cells = [_for_people(value, column) for value, column in zip(row, columns, strict=True)]
        # Not as markup: a path may hold brackets. A bar would end a cell of markdown.
        shown.add_row(*(Text(cell.replace("|", "\\|") if markdown else cell) for cell in cells))
    return Group(Text(f"## {title}\n" if markdown else title, "" if markdown else "bold"), shown, Text(""))


def _points(table: Table, keys: list[str], markdown: bool) -> list[Group]:
    """What all points share once, as a list; a table for each group of the columns that vary."""
    by_name = dict(zip(table.header, zip(*table.rows, strict=True), strict=True)) if table.rows else {}
    varying = [column for column in table.columns if len(set(map(repr, by_name.get(column.name, ())))) > 1]
    key_columns = [column for column in table.columns if column.name == "point" or column.name in keys]
    shown = []
    for group in dict.fromkeys(column.group for column in varying):
        rest = [column for column in varying if column.group == group and column not in key_columns]
        if rest:
            chosen = [*key_columns, *rest]
            rows = list(zip(*(by_name[column.name] for column in chosen), strict=True))
            shown.append(_shown(chosen, rows, f"points: {group}", markdown))
    same = [column for column in table.columns if column not in varying and column.name != "point"]
    rows = [[column.name, _for_people(by_name[column.name][0], column)] for column in same if by_name]
    heads = [Column("column", str, "", None), Column("value", str, "", None)]
    return [*shown, _shown(heads, rows, f"the same in all {len(table.rows)} points", markdown)]


def to_rich(tables: dict[str, Table], markdown: bool = False) -> Group:
    """Everything but the single runs for a person; the options' medians come first."""
    options = tables["options"]
    parts = [] if not options.rows else [_shown(options.columns, options.rows, "per option", markdown)]
    keys = [row[0] for row in options.rows]
    return Group(*parts, *_points(tables["points"], keys, markdown))


def to_markdown(tables: dict[str, Table]) -> str:
    """The same as text, in tables of markdown of any width."""
    out = io.StringIO()
    Console(file=out, width=_WIDE, color_system=None).print(to_rich(tables, markdown=True))
    return "".join(line.rstrip() + "\n" for line in out.getvalue().rstrip().splitlines())
