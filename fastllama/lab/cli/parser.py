"""The parser of `fastllama generate`: words in, values by option name out."""

import argparse
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastllama.lab.cli.option import Option
from fastllama.lab.cli.table import GROUPS, OPTIONS, find

_ABOUT = """Text in, text out. Options go by llama.cpp's names and by transformers', and - and _ are the same within \
them. Where the two use one name for different things, the option says so."""

_ASK_HELP = ("-h", "--help")
_BEFORE = ":"  # stands before each value, since argparse would take one that is -- for its own


@dataclass
class Parsed:
    """By option name: values, the name that each was typed by, and the words that were typed for it."""

    values: dict[str, Any] = field(default_factory=dict)
    typed: dict[str, str] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)

    def name(self, option: str) -> str:
        """An option as it was typed, else by the name that it has in messages."""
        return self.typed.get(option) or OPTIONS[option].canonical

    def under(self, other: "Parsed") -> "Parsed":
        """Both, of which `other` counts more."""
        return Parsed({**self.values, **other.values}, {**self.typed, **other.typed}, {**self.words, **other.words})


class _Store(argparse.Action):
    """Keeps the value, or refuses it by the name that was typed."""

    def __init__(self, option_strings, dest, option: Option, off: bool = False, **kwargs):
        self.option, self.off = option, off
        super().__init__(option_strings, dest, nargs=None if option.kind else 0, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        option = self.option
        if option.kind is None:
            value: Any = not self.off
        else:
            values = values.removeprefix(_BEFORE)
            try:
                value = option.kind.read(values)
            except ValueError as fault:
                raise ValueError(f"{option_string} {shown(values)} {fault}") from None
            namespace.parsed.words[option.name] = values
        if option.repeats:
            value = (*namespace.parsed.values.get(option.name, ()), value)
        namespace.parsed.values[option.name] = value
        namespace.parsed.typed[option.name] = option_string


def shown(text: str) -> str:
    """A value as a message names it."""
    shown = text if text.isascii() and text.isprintable() and text.strip() else ascii(text)
    return shown if len(shown) <= 60 else shown[:57] + "..."


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


class _Help(argparse.HelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=26, width=110)

    def _format_action_invocation(self, action):
        if not isinstance(action, _Store):
            return super()._format_action_invocation(action)
        option = action.option
        names = [*option.names, *option.off]
        return ", ".join(names) + (f" {option.kind.metavar}" if option.kind is not None else "")


@functools.cache
def parser() -> argparse.ArgumentParser:
    """An argparse parser with every option of the table."""
    made = _Parser(
        prog="fastllama generate", usage="%(prog)s [options]", description=_ABOUT, allow_abbrev=False,
        formatter_class=_Help,
    )  # fmt: skip
    for title, options in GROUPS.items():
        group = made.add_argument_group(title)
        for option in options:
            # One line of help for each; the names that turn it off are there and hidden.
            if option.names:
                group.add_argument(*_spellings(option.names), action=_Store, option=option, help=_help(option))
            if option.off:
                help = argparse.SUPPRESS if option.names else _help(option)
                group.add_argument(*_spellings(option.off), action=_Store, option=option, off=True, help=help)
    return made


def _spellings(names: Sequence[str]) -> list[str]:
    """Long names with - and with _."""
    found = dict.fromkeys(names)
    for name in names:
        if name.startswith("--"):
            found["--" + name[2:].replace("-", "_")] = None
    return list(found)


def _help(option: Option) -> str:
    default = f" ({option.default})" if option.default else ""
    return (option.help + default).replace("%", "%%")


def parse(argv: Sequence[str]) -> Parsed:
    """What the words say. `ValueError` in one sentence where they say nothing; `SystemExit` after --help."""
    found = argparse.Namespace(parsed=Parsed())
    parser().parse_args(joined(argv), found)
    return found.parsed


def joined(argv: Sequence[str]) -> list[str]:
    """The words with each value joined to its name: a value may begin with a dash then, as a text may.

    Raises `ValueError` for what is no option, and for a value that is missing or too much.
    """
    words, left = [], list(argv)
    while left:
        word = left.pop(0)
        name, equals, value = word.partition("=")
        option = find(name)
        if option is None and word not in _ASK_HELP:
            raise ValueError(f"{shown(word)} is not an option (--help lists them)")
        if option is None or option.kind is None:
            if equals:
                raise ValueError(f"{name} takes no value")
            words.append(word)
        elif not equals and not left:
            raise ValueError(f"{word} has no value")
        else:
            words.append(f"{name}={_BEFORE}{value if equals else left.pop(0)}")
    return words
