"""The prompts of each task: short beginnings of code, long texts, and inputs that the answer repeats.

P prompt tokens
"""

import ast
import re
import textwrap
from dataclasses import dataclass

from fastllama.demo.text import HELD_OUT_DIR
from fastllama.lab.points import workload
from fastllama.lab.points.workload import Prompt, Workload

NAMES = ("decode", "benchmark", "lookup")
NEW_TOKENS = {"decode": 30, "benchmark": 60, "lookup": 60}
LENGTHS = (256, 512, 1024, 1968)  # tokens of the benchmark's prompts
# 5 to 10 tokens each by the demo's tokenizer, the one that begins a text among them.
DECODE = (
    "for name in self",
    "    raise ValueError(",
    "def main(args):",
    "for line in lines:",
    "import os\nimport sys\n",
    "    def close(self):",
    "def __init__(self, name",
    "while True:\n    line =",
    "if __name__ == '__main__':",
    "@property\ndef name(self):\n   ",
)

# (kind, module, function) of edits and summaries of held-out functions: of all of them those whose answers repeat most
# of their input, as `grounding` ranks them. Of these, a quarter to four fifths is repeated.
CHOSEN = (
    ("rename", "statistics", "multimode"),
    ("name", "textwrap", "_munge_whitespace"),
    ("name", "difflib", "_plain_replace"),
    ("name", "difflib", "_check_types"),
    ("summary", "textwrap", "indent"),
    ("name", "calendar", "itermonthdays3"),
    ("name", "fractions", "from_float"),
    ("name", "fractions", "reverse"),
    ("summary", "difflib", "_format_line"),
    ("name", "configparser", "_write_section"),
)
_SHOWN = 0.4  # of the edited function's lines, so that what follows continues an edit


@dataclass(frozen=True)
class Example:
    """One prompt of a task: `prompt` has a single row without padding."""

    task: str
    name: str
    prompt: Prompt
    new_tokens: int

    @property
    def length(self) -> int:
        """P"""
        return self.prompt.input_ids.shape[1]


def _function(module: str, name: str) -> tuple[ast.FunctionDef, str]:
    """(the tree, the source without indentation) of a function or method of a held-out file."""
    source = (HELD_OUT_DIR / f"{module}.py.txt").read_text(encoding="utf-8")
    found = next(
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef) and node.name == name
    )
    return found, textwrap.dedent(" " * found.col_offset + ast.get_source_segment(source, found))


def _begun(text: str) -> str:
    lines = text.splitlines()
    return "\n".join(lines[: max(1, int(_SHOWN * len(lines)))]) + "\n"


def renamed(module: str, name: str) -> str | None:
    """A function, and the beginning of the same one with its first parameter renamed; None where it has none."""
    tree, source = _function(module, name)
    parameter = next((argument.arg for argument in tree.args.args if argument.arg != "self"), None)
    if parameter is None:
        return None
    edited = re.sub(rf"\b{parameter}\b", "item", source)
    return f"{source}\n\n\n# the same function with {parameter} renamed to item:\n\n{_begun(edited)}"


def named(module: str, name: str) -> str:
    """A function, and the beginning of the same one under another name."""
    _, source = _function(module, name)
    edited = source.replace(name, f"new_{name}", 1)
    return f"{source}\n\n\n# the same function under the name new_{name}:\n\n{_begun(edited)}"


def summarised(module: str, name: str) -> str | None:
    """A function, and the beginning of its summary, signature and first line of its documentation; None without any."""
    tree, source = _function(module, name)
    documentation = ast.get_docstring(tree)
    if not documentation:
        return None
    first = documentation.splitlines()[0]
    parameters = ", ".join(argument.arg for argument in tree.args.args)
    return f'{source}\n\n\n# summary of {name}:\n\ndef {name}({parameters}):\n    """{first}\n'


KINDS = {"rename": renamed, "name": named, "summary": summarised}


def lookup_texts() -> dict[str, str]:
    """{name: prompt} of the task whose answers repeat their input."""
    return {f"{kind} {name}": KINDS[kind](module, name) for kind, module, name in CHOSEN}


def _of_text(tokenizer, text: str) -> Prompt:
    found = tokenizer(text, return_tensors="pt")
    return Prompt(found.input_ids, found.attention_mask)


def examples(task: str, tokenizer, seed: int = 0) -> list[Example]:
    """The task's examples in order. The benchmark's texts are cut from the held-out text at places of the seed.

    `ValueError` on an unknown task.
    """
    if task not in NAMES:
        raise ValueError(f"there is no task {task!r}; there are {', '.join(NAMES)}")
    new_tokens = NEW_TOKENS[task]
    if task == "benchmark":
        prompts = {
            f"{length} tokens": workload.prompt(Workload(1, length, new_tokens, seed), tokenizer) for length in LENGTHS
        }
    else:
        texts = {" ".join(text.split()): text for text in DECODE} if task == "decode" else lookup_texts()
        prompts = {name: _of_text(tokenizer, text) for name, text in texts.items()}
    return [Example(task, name, prompt, new_tokens) for name, prompt in prompts.items()]
