"""A command line of llama.cpp's main, in our options: what each of its words is here, or why it is nothing."""

import re
import shlex
from dataclasses import dataclass, field
from pathlib import PurePath

from fastllama.lab.cli.option import Option, read_number
from fastllama.lab.cli.parser import Parsed, parse
from fastllama.lab.cli.table import OPTIONS, find, plain
from fastllama.lab.cli.unmapped import OPTIONAL, UNMAPPED

_MAINS: tuple[str, ...] = ("main", "llama", "llama-cli", "llama-completion", "llama-simple", "simple")
_MAINS += ("speculative", "llama-speculative", "parallel", "llama-parallel")
_GGUF = "a .gguf file is not loaded here: name a checkpoint with --model"
_SHELL = re.compile(r"[|<>&;]+|\d?>>?.*")
_IN_PROMPT = re.compile(r"\\[nt\\'\"]")


@dataclass
class Translation:
    """`rows`: (llama.cpp's words, ours or None, a note); `argv`: what is mapped, by
    their names, which our parser knows too; `notes`: about the whole line."""

    rows: list[tuple[str, str | None, str]] = field(default_factory=list)
    argv: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def table(self) -> list[str]:
        """Lines for people."""
        width = max((len(row[0]) for row in self.rows), default=0)
        ours = [f"not mapped: {note}" if ours is None else f"{ours} {note}".rstrip() for _, ours, note in self.rows]
        lines = [f"{row[0]:<{width}}  {words}" for row, words in zip(self.rows, ours, strict=True)]
        return [*lines, *self.notes]


def translate(line: str) -> Translation:
    """Of a command line. `ValueError` where a shell could not read it, or where a value is wrong."""
    words = _words(line)
    made = Translation(argv=["--defaults", "llama.cpp"])
    words = _without_program(words, made)
    while words:
        word = words.pop(0)
        if _SHELL.fullmatch(word):
            made.notes.append(f"{shlex.join([word, *words])}: what a shell does is not part of it")
            break
        name, equals, value = word.partition("=") if word.startswith("--") else (word, "", "")
        option = find(name)
        option = option if option is not None and plain(name) in (*option.llama_cpp, *option.off) else None
        given = [value] if equals else []
        if option is not None:
            _add_option(made, option, name, given, words)
        else:
            _add_unmapped(made, name, given, words)
    _check(made)
    return made


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line.replace("\\\n", " "))
    except ValueError as fault:
        raise ValueError(f"--from-llama-cpp: a shell could not read this line: {str(fault).lower()}") from None


def _without_program(words: list[str], made: Translation) -> list[str]:
    rest = list(words)
    while rest and re.fullmatch(r"\w+=.*", rest[0]):
        made.notes.append(f"{rest.pop(0).partition('=')[0]}: a variable of the environment is not part of it")
    if rest and not rest[0].startswith("-"):
        program = PurePath(rest.pop(0)).name
        if program.removesuffix(".exe") not in _MAINS:
            made.notes.append(f"{program} is not a name of llama.cpp's main: its options are read as main's")
    return rest


def _add_option(made: Translation, option: Option, name: str, given: list[str], words: list[str]) -> None:
    if option.kind is None:
        off = plain(name) in option.off
        ours = next(each for each in option.off if each.startswith("--")) if off else option.canonical
        made.rows.append((name, ours, ""))
        made.argv.append(name)
        return
    if not given and not words:
        raise ValueError(f"--from-llama-cpp: {name} has no value")
    value = given[0] if given else words.pop(0)
    theirs = shlex.join([name, value])
    value, reason = _ours(option, value)
    if reason is not None:
        made.rows.append((theirs, None, reason))
        return
    made.rows.append((theirs, shlex.join([option.canonical, value]), _note(option, value)))
    made.argv += [name, value]


def _ours(option: Option, value: str) -> tuple[str, str | None]:
    """(the value in our words, None), or why there is none."""
    if option.name in ("model", "draft_model") and value.lower().endswith(".gguf"):
        return value, _GGUF if option.name == "model" else _GGUF.replace("--model", "--draft-model")
    if option.name in ("device", "draft_device"):
        card = re.fullmatch(r"cuda(\d+)", value.lower())
        if card is not None:
            return f"cuda:{card[1]}", None
        if value.lower() in ("none", "cpu"):
            return "cpu", None
        return value, "devices go by torch's names: use --device"
    return value, None


def _note(option: Option, value: str) -> str:
    """What is not quite the same."""
    if option.name == "temperature":
        try:
            return "(greedy)" if read_number(value) <= 0 else ""
        except ValueError:
            return ""
    if option.name == "seed" and value == "-1":
        return "(another one each time)"
    return ""


def _add_unmapped(made: Translation, name: str, given: list[str], words: list[str]) -> None:
    count, reason = UNMAPPED.get(plain(name), (None, "not an option that is known here"))
    if plain(name) in OPTIONAL and words and words[0] in OPTIONAL[plain(name)]:
        count = 1
    if count is None:  # nobody knows whether it has a value: what does not look like an option is taken for one
        count = 1 if name.startswith("-") and words and not words[0].startswith("-") else 0
    values = given or [words.pop(0) for _ in range(min(count, len(words)))]
    made.rows.append((shlex.join([name, *values]), None, reason))


def _check(made: Translation) -> None:
    """Notes on what llama.cpp does by itself. `ValueError` where one of the values is wrong."""
    try:
        values = parse(made.argv).values
    except ValueError as fault:
        raise ValueError(f"--from-llama-cpp: {fault}") from None
    if "context_shift" not in values and values.get("grp_attn_n", 1) == 1:
        made.notes.append("main shifts a full context by itself in older versions: here --context-shift does")
    if "prompt" in values and "escape" not in values and _IN_PROMPT.search(values["prompt"]):
        made.notes.append("newer versions read escapes such as \\n in the prompt: here --escape does")
    if "model" not in values:
        made.notes.append(f"the model is {OPTIONS['model'].default} unless --model names another")


def under(made: Translation, beside: Parsed) -> Parsed:
    """The translation with the options beside it, which count more."""
    return parse(made.argv).under(beside)
