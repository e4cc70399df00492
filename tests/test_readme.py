"""Every code block of README: Python runs on the demo, and commands run where that is cheap, else are parsed.

What is parsed only goes through the parser of its own program, so an option that is gone or misspelt fails here.
A command that nobody has classified fails.
"""

import ast
import io
import re
import shlex
import sys

import pytest

import fastllama
import run_llama
from fastllama.lab import __main__ as laboratory
from fastllama.lab.cli import command
from fastllama.lab.cli.parser import parse
from fastllama.lab.records.sources import ROOT
from fastllama.lab.suite import __main__ as suite

README = (ROOT / "README.md").read_text(encoding="utf-8")

TRANSLATED = (
    "fastllama generate --from-llama-cpp \"./main -m model.gguf -p 'def f(' -n 64 --temp 0.7 -ngl 99\" --dry-run"
)
# Cheap, so they run; what they print must hold the words.
RUN = {
    'fastllama generate -p "def main():" -n 64': "main",
    "fastllama generate -f prompt.txt --temperature 0.7 --top-p 0.9 -s 3": "",
    "cat prompt.txt | fastllama generate --json -q": '"text"',
    TRANSLATED: "-ngl",
    "python run_llama.py --sweep nightly.toml --dry-run": "batch_size=2",
    "python run_llama.py --prompts prompts.jsonl --out results.jsonl --slots 16 --compile native": "",
}
# Run by tests of their own.
ELSEWHERE = {
    'python -c "import fastllama; fastllama.register(); from lm_eval': "tests/test_lm_eval.py",
    'pip install -e ".[test]" && pytest -n auto': ".ci/run",
    "pip install build && python -m build": "tests/test_wheel.py",
    "fastllama serve": "tests/test_serve.py",
    "curl http://localhost:8000": "tests/test_serve.py",
    'python -c "import fastllama; model': "tests/test_exported_step.py",
}
# Programs that start ours, with their options that take a value.
LAUNCHERS = {"torchrun": ("--nproc-per-node",), "accelerate": ("--num_processes", "--config_file")}


_EXPORTED = "aoti_load_package"  # of the one block that runs without this package: tests/test_exported_step.py


def python_blocks() -> list[str]:
    """The insides of the fences, in order, but for what runs in a process of its own."""
    found = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return [block for block in found if _EXPORTED not in block]


def commands(text: str = README) -> list[str]:
    """The indented lines outside of fences and lists, without their comments; a backslash joins two."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = re.sub(r" *\\\n +", " ", text).splitlines()
    return [re.sub(r" +#.*", "", line).strip() for line in lines if re.match(r"    \S", line)]


BLOCKS, COMMANDS = python_blocks(), commands()


# Python


@pytest.fixture(scope="module")
def session():
    """(how many blocks ran, their names): a block goes on where the one before it ended, as for a reader."""
    yield [0, {}]
    fastllama.unregister()  # or every "vanilla" that a later test asks the package for is ours


@pytest.mark.parametrize("index", range(len(BLOCKS)), ids=lambda index: re.sub(r"\W+", "-", BLOCKS[index][:48]))
def test_a_python_block_runs(session, index, capsys):
    while session[0] <= index:
        session[0] += 1
        exec(compile(BLOCKS[session[0] - 1], f"README.md, block {session[0]}", "exec"), session[1])
    model = session[1]["model"]
    assert not model.path.startswith("parent"), model.path


def test_every_fence_is_one_of_python():
    assert (len(BLOCKS) + README.count(_EXPORTED)) * 2 == len(re.findall(r"^ *```", README, re.MULTILINE))


# commands


@pytest.fixture
def folder(tmp_path, monkeypatch, logs):
    """A current folder with the files that the commands name."""
    (tmp_path / "prompt.txt").write_text("import os\n\n\ndef ")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "import os", "max_new_tokens": 4}\n{"prompt": "def f("}\n' * 3)
    (tmp_path / "nightly.toml").write_text("batch_size = [1, 2]\nnew_tokens = 4\nprompt_length = 16\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("line", RUN)
def test_a_cheap_command_runs(line, folder, capsys, monkeypatch):
    assert line in COMMANDS, f"README has no such command any more: {line}"
    if line.startswith("cat prompt.txt | "):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((folder / "prompt.txt").read_bytes())))
        line = line.removeprefix("cat prompt.txt | ")
    words = shlex.split(line)
    assert (run_llama.main(words[2:]) if words[0] == "python" else command.main(words[1:])) == 0
    printed = capsys.readouterr()
    assert RUN.get(line, "") in printed.out + printed.err
    if "--out" in words:
        assert len((folder / "results.jsonl").read_text().splitlines()) == 6


def without_launcher(words: list[str]) -> list[str]:
    """The command that torchrun or accelerate starts, as if by python."""
    if words[0] not in LAUNCHERS:
        return words
    takes_value, place = LAUNCHERS[words[0]], 2 if words[:2] == ["accelerate", "launch"] else 1
    while words[place].startswith("-"):
        place += 2 if words[place] in takes_value else 1
    return ["python", *words[place:]]


def check(line: str, folder) -> None:
    """Fails where the program that a command names would not take its arguments."""
    if line in RUN or any(line.startswith(begin) for begin in ELSEWHERE):
        return
    if line.startswith("pip install -e . && "):
        line = line.removeprefix("pip install -e . && ")
    words = without_launcher(shlex.split(line))
    if words[:2] == ["python", "run_llama.py"]:
        # A hub's model stands for the reader's own, and is not here to be planned for.
        options = run_llama._parse(["demo" if word.startswith("huggingface/") else word for word in words[2:]])
        if options.task is None and options.prompts is None:
            run_llama._plan(options)
    elif words[:3] == ["python", "-m", "fastllama.lab"]:
        run_llama._parse(laboratory.parse(words[3:]).switches)
    elif words[:3] == ["python", "-m", "fastllama.lab.suite"]:
        suite._parser().parse_args(words[3:])
    elif words[:2] == ["fastllama", "generate"]:
        parse(words[2:])
    elif words[:2] == ["fastllama", "measure"]:
        run_llama._parse(words[2:])
    else:
        raise AssertionError(f"nobody has classified {line!r}: say in {__file__} how it is checked")


@pytest.mark.parametrize("line", COMMANDS, ids=lambda line: line[:70])
def test_a_command_is_taken_by_its_program(line, folder):
    try:
        check(line, folder)
    except SystemExit as end:
        pytest.fail(f"its parser refuses it with exit code {end.code}")


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("python run_llama.py --preallocat", SystemExit),
        ("python run_llama.py --sweep bukket=1", ValueError),
        ("python -m fastllama.lab evil", SystemExit),
        ("fastllama generate --temprature 1", ValueError),
        ("fastllama measure --fuse", SystemExit),
        ("torchrun --nproc-per-node 2 run_llama.py --preallocat", SystemExit),
        ("make install", AssertionError),
    ],
)
def test_a_wrong_command_is_found(line, error, folder):
    with pytest.raises(error):
        check(line, folder)


def test_what_is_run_elsewhere_is():
    for begin, place in ELSEWHERE.items():
        assert any(line.startswith(begin) for line in COMMANDS) and (ROOT / place).is_file()
    assert 'pip install -e ".[test]"' in (ROOT / ".ci/run").read_text() and "pytest" in (ROOT / ".ci/run").read_text()
    (lm_eval,) = [line for line in COMMANDS if "lm_eval" in line]
    ast.parse(shlex.split(lm_eval)[2])
