"""The table of options: the parser, --help and the translation of llama.cpp's command lines are made from it."""

from fastllama.lab.cli import table_cache, table_drawing, table_model, table_printed, table_text
from fastllama.lab.cli.option import Option

_FILES = (table_text, table_model, table_drawing, table_cache, table_printed)
GROUPS = {title: options for file in _FILES for title, options in file.GROUPS.items()}
OPTIONS = {option.name: option for options in GROUPS.values() for option in options}
_BY_NAME = {name: option for option in OPTIONS.values() for name in (*option.names, *option.off)}


def find(name: str) -> Option | None:
    """The option of a name as it is typed; - and _ are the same within long names."""
    return _BY_NAME.get(plain(name))


def plain(name: str) -> str:
    """The name as the table has it."""
    return name.replace("_", "-") if name.startswith("--") else name
