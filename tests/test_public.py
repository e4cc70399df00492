"""What users import: each name has a docstring of its own, and each argument and result a type.

Read from the sources, since a wrapped method shows its parent's words.
"""

import ast
import dataclasses
import inspect
from pathlib import Path

import pytest

import fastllama
from fastllama import demo
from fastllama.decode.assisted.report import Assisted

# `model.assisted` gives one.
OBJECTS = {f"fastllama.{name}": getattr(fastllama, name) for name in fastllama.__all__}
OBJECTS |= {f"fastllama.demo.{name}": getattr(demo, name) for name in demo.__all__} | {"Assisted": Assisted}
CLASSES = {name: each for name, each in OBJECTS.items() if inspect.isclass(each)}


def definition(each) -> ast.ClassDef | ast.FunctionDef:
    """The statement that defines a public class or function."""
    tree = ast.parse(Path(inspect.getsourcefile(each)).read_text(encoding="utf-8"))
    return next(node for node in tree.body if getattr(node, "name", None) == each.__name__)


def functions() -> dict[str, ast.FunctionDef]:
    """Every public function, and of every public class each method and property that it defines or overrides."""
    found = {}
    for name, each in OBJECTS.items():
        node = definition(each)
        if isinstance(node, ast.FunctionDef):
            found[name] = node
            continue
        for inner in node.body:
            if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                found[f"{name}.{inner.name}"] = inner
    return found


FUNCTIONS = functions()


def test_what_is_public_is_found():
    assert {"fastllama.FastConfig", "fastllama.LlamaForCausalLM", "fastllama.Sampling"} <= CLASSES.keys()
    assert {"fastllama.register", "fastllama.LlamaForCausalLM.generate_many", "fastllama.demo.resolve"} <= (
        FUNCTIONS.keys()
    )


@pytest.mark.parametrize("name", OBJECTS)
def test_a_public_name_has_a_docstring(name):
    words = ast.get_docstring(definition(OBJECTS[name]))
    assert words and words.strip(), f"{name} has no docstring"
    assert inspect.cleandoc(OBJECTS[name].__doc__) == words, f"help({name}) shows other words"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_method_has_a_docstring(name):
    words = ast.get_docstring(FUNCTIONS[name])
    assert words and words.strip(), f"{name} has no docstring"
    owner, _, method = name.rpartition(".")
    if owner in CLASSES:
        shown = inspect.getattr_static(CLASSES[owner], method)
        shown = getattr(shown, "fget", getattr(shown, "__func__", shown)).__doc__
        assert words.splitlines()[0] in shown, f"help({name}) shows other words"


@pytest.mark.parametrize("name", [name for name, each in CLASSES.items() if dataclasses.is_dataclass(each)])
def test_a_public_field_is_explained(name):
    words = ast.get_docstring(definition(CLASSES[name]))
    for field in dataclasses.fields(CLASSES[name]):
        told = field.metadata.get("help", "").strip() and field.metadata.get("allowed", "").strip()
        assert told or f"`{field.name}`" in words, f"{name}.{field.name}: neither its metadata nor the class says what"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_function_is_annotated(name):
    node = FUNCTIONS[name]
    given = node.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    if name.rpartition(".")[0] in CLASSES and every and every[0].arg in ("self", "cls"):
        every = every[1:]
    untyped = [argument.arg for argument in every if argument.annotation is None]
    assert not untyped, f"{name} has arguments without a type: {', '.join(untyped)}"
    assert node.returns is not None, f"{name} does not say what it returns"


@pytest.mark.parametrize("name", CLASSES)
def test_a_public_class_is_annotated(name):
    for inner in definition(CLASSES[name]).body:
        if isinstance(inner, ast.FunctionDef) and inner.name in ("__init__", "__call__"):
            untyped = [argument.arg for argument in inner.args.args[1:] if argument.annotation is None]
            assert not untyped, f"{name}.{inner.name} has arguments without a type: {', '.join(untyped)}"


def test_types_are_said_to_be_there():
    assert (Path(fastllama.__file__).parent / "py.typed").is_file()
