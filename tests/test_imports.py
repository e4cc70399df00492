"""The house of DESIGN: a floor imports only from floors above it."""

import argparse
import ast
import gc
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import fastllama
from fastllama.lab import __main__ as lab

PACKAGE = Path(__file__).parent.parent / "fastllama"
# The last hands over to the command line, in lab/cli.
FLOORS = ["kernels", "cache", "model", "decode", "llama", "exporting", "registration", "demo", "lab", "__main__"]
_CLOCKS = ("kernels/tune.py", "demo/train.py", "demo/refine.py", "decode/assisted/clock.py")
FILES = sorted(PACKAGE.rglob("*.py"))


def floor_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} uses a relative import"
            modules.add(node.module)
            modules.update(f"{node.module}.{alias.name}" for alias in node.names)
    return modules


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_floor_imports_only_from_above(path):
    own = floor_of(path)
    if own == "__init__":
        return
    for module in imported_modules(path):
        if module.startswith("fastllama."):
            other = module.split(".")[1]
            if other in FLOORS:
                assert FLOORS.index(other) <= FLOORS.index(own), f"{own} must not import {module}"
            else:
                assert own == "lab", f"{own} must not import through fastllama/__init__"
        elif module == "fastllama":
            assert own in ("demo", "lab"), f"{own} must not import the package's public names"


def test_every_floor_is_known():
    assert {floor_of(path) for path in FILES} == {*FLOORS, "__init__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_owners_are_alone(path):
    floor, text = floor_of(path), path.read_text()
    modules = imported_modules(path)
    if floor == "kernels":
        assert not any(module.split(".")[0] == "transformers" for module in modules)
    # Training reports how long it took, and an adaptive draft follows what its rounds cost; everything else that reads
    # a clock is in lab/ or kernels/tune.py.
    if floor != "lab" and path.relative_to(PACKAGE).as_posix() not in _CLOCKS:
        assert "time" not in modules
    if path != PACKAGE / "model" / "compiled.py" and floor != "lab":
        assert "torch.compile(" not in text


def test_importing_fastllama_changes_nothing_in_transformers():
    code = """
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig
names = {name: getattr(transformers, name) for name in ("LlamaForCausalLM", "LlamaConfig", "LlamaModel")}
members = dict(vars(transformers.LlamaForCausalLM))
generation = dict(vars(transformers.GenerationMixin))
mapped = AutoModelForCausalLM._model_mapping[LlamaConfig]
import fastllama
every = [getattr(fastllama, name) for name in fastllama.__all__]  # each is imported when it is asked for
assert all(getattr(transformers, name) is value for name, value in names.items())
assert dict(vars(transformers.LlamaForCausalLM)) == members
assert dict(vars(transformers.GenerationMixin)) == generation
assert AutoModelForCausalLM._model_mapping[LlamaConfig] is mapped
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_public_name_comes_from_where_a_type_checker_finds_it():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    homes = {alias.name: node.module for node in checked.body for alias in node.names}
    assert homes == {name: f"fastllama.{home}" for name, home in fastllama._HOMES.items()}
    assert list(homes) and set(homes) == set(fastllama.__all__) <= set(dir(fastllama))
    for name, home in homes.items():
        assert getattr(fastllama, name) is getattr(importlib.import_module(home), name)
    with pytest.raises(AttributeError, match="module 'fastllama' has no attribute 'nothing'"):
        fastllama.__getattr__("nothing")


@pytest.mark.parametrize("collects", [True, False])
def test_importing_leaves_the_collection_of_garbage_as_it_was(collects, monkeypatch):
    def while_importing(name):
        assert not gc.isenabled()
        raise ImportError(name)

    monkeypatch.setattr(fastllama.importlib, "import_module", while_importing)
    before = gc.isenabled()
    try:
        (gc.enable if collects else gc.disable)()
        with pytest.raises(ImportError, match=r"fastllama\.llama"):
            fastllama.__getattr__("LlamaForCausalLM")
        assert gc.isenabled() == collects
    finally:
        (gc.enable if before else gc.disable)()


def test_help_and_a_refusal_wait_for_no_torch():
    code = """
import sys
import fastllama, run_llama
from fastllama.lab import __main__ as lab
from fastllama.lab.cli import command
for argv in (["--help"], ["--bogus"], ["--profile", "--json", "x"]):
    try:
        run_llama.main(argv)
    except SystemExit as end:
        print(argv[0], end.code)
for argv in (["--help"], ["bogus"]):
    try:
        lab.main(argv)
    except SystemExit as end:
        print("lab", argv[0], end.code)
assert command.main(["--version"]) == command.main(["--help"]) == 0 and command.main(["measure", "--bogus"]) == 2
assert not {"torch", "transformers", "rich"} & set(sys.modules)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = ("--help 0", "--bogus 2", "--profile 2", "lab --help 0", "lab bogus 2")
    codes = [line for line in done.stdout.splitlines() if line in said]
    assert len(codes) == 5 and done.stderr.count("error: ") == 4


@pytest.mark.parametrize("name", sorted(lab._COMMANDS))
def test_each_command_of_the_laboratory_is_a_module_with_its_arguments(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # argparse breaks words at hyphens
    with pytest.raises(SystemExit) as end:
        lab.main([name, "--help"])
    assert end.value.code == 0 and callable(lab._module(name).run)
    said = " ".join(capsys.readouterr().out.split())
    assert f"python -m fastllama.lab {name}" in said and lab._COMMANDS[name][1].split(":")[0] in said
    own = argparse.ArgumentParser()
    lab._module(name).arguments(own)
    assert len(own._actions) > 1 or name == "board"
    shown = [action for action in own._actions if action.help != argparse.SUPPRESS and action.option_strings]
    assert all(action.option_strings[-1] in said for action in shown)
