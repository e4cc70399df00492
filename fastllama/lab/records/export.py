"""Points and records in other formats: `python -m fastllama.lab export`, and run_llama.py --format."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from fastllama.lab.points import points_file
from fastllama.lab.records import formats, record, tables, words


def check_output(name: str, output: Path | None, sources: tuple[Path, ...] = ()) -> None:
    """ValueError or OSError if nothing can be written there, or if it would take the place of what is read."""
    if output is None:
        if name == "sqlite":
            raise ValueError("a database is not for a terminal: name a file for --format sqlite with --output FILE")
        return
    output = Path(output)
    if any(output.resolve() == Path(source).resolve() for source in sources):
        raise ValueError(f"{output} is what is read; name another file for the output")
    if output.is_dir():
        raise IsADirectoryError(f"{output} is a folder; --output names a file")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {output.parent} to write {output.name} in")


def write(points: list[dict], name: str, output: Path | None = None, table: str = "points") -> None:
    """Write points or records as format `name` to `output`, whole or not at all, or to the terminal.

    table: which one csv and jsonl hold ("points", "runs", "options"); the other formats hold all. An existing
    file is replaced. Raises as check_output does.
    """
    check_output(name, output)
    made = tables.of(points)
    if name == "sqlite":
        formats.write_sqlite(made, output)
        return
    if name == "md" and output is None and sys.stdout.isatty():
        Console().print(formats.to_rich(made))
        return
    if name in ("csv", "jsonl"):
        text = (formats.to_csv if name == "csv" else formats.to_jsonl)(made[table])
    else:
        text = (formats.to_json if name == "json" else formats.to_markdown)(made)
    if output is None:
        sys.stdout.write(text)
    else:
        words.write_atomically(output, text)


def read(path: Path) -> list[dict]:
    """The points of a file of run_llama.py --json, or the record of a record.json."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    return [record.read(path)] if path.suffix == ".json" else points_file.read(path)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments to its parser."""
    parser.add_argument("file", type=Path, nargs="*", help="what run_llama.py --json wrote (default: every record)")
    parser.add_argument("--format", choices=formats.NAMES, required=True)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: the terminal")
    parser.add_argument(
        "--table", choices=tables.NAMES, default="points", help="which one csv and jsonl hold; the others hold all"
    )


def run(options: argparse.Namespace) -> int:
    """Export as the command line says; the exit code."""
    check_output(options.format, options.output, tuple(options.file))
    points = [point for path in options.file for point in read(path)] if options.file else record.read_all(options.root)
    write(points, options.format, options.output, options.table)
    if options.output is not None:
        print(f"{options.output}: {len(points)} {'points' if options.file else 'records'}")
    return 0
