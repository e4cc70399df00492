"""What the compiler can do is asked once on a machine, and again where anything that it depends on has changed."""

import sys

import pytest
import torch
from torch._inductor import config, cpp_builder, cpu_vec_isa

from fastllama.kernels import instruction_sets
from fastllama.model import compiled

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not cpu_vec_isa.x86_isa_checker(), reason="torch asks on x86-64 Linux"
)
CPU = torch.device("cpu")


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """How often torch was asked, by a process that knows nothing yet; and its answer, which a test may change."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    has = set(cpu_vec_isa.x86_isa_checker())
    named = [isa for isa in cpu_vec_isa.supported_vec_isa_list if set(str(isa).split()) <= has]
    found = {"times": 0, "answer": named}

    def answer():
        found["times"] += 1
        return found["answer"]

    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", answer)
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: sys.executable)  # any program will do
    instruction_sets._are_good.cache_clear()
    with config.patch({"cpp.vec_isa_ok": None}):
        yield found
    instruction_sets._are_good.cache_clear()


def in_a_new_process() -> bool:
    instruction_sets._are_good.cache_clear()
    return instruction_sets.are_good()


def test_torch_is_asked_once(asked):
    assert asked["answer"] and [in_a_new_process() for _ in range(3)] == [True] * 3
    assert asked["times"] == 1


def test_another_compiler_is_asked(asked, tmp_path, monkeypatch):
    compiler = tmp_path / "a-compiler"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: str(compiler))
    assert in_a_new_process() and in_a_new_process() and asked["times"] == 1
    compiler.write_text("#!/bin/sh\n# newer\n")
    assert in_a_new_process() and asked["times"] == 2
    compiler.unlink()  # none that could be told from another: asked each time
    assert in_a_new_process() and in_a_new_process() and asked["times"] == 4


def test_what_does_not_compile_is_not_said_to(asked, tmp_path):
    asked["answer"] = asked["answer"][1:]
    assert not in_a_new_process() and not in_a_new_process() and asked["times"] == 2
    assert not list((tmp_path / "cache").rglob("*.json"))


def test_nobody_is_asked_where_the_user_has_said_it(asked):
    with config.patch({"cpp.vec_isa_ok": False}):
        assert not in_a_new_process() and asked["times"] == 0


@pytest.mark.parametrize("content", ["", "{", "[1]", "null"])
def test_a_file_that_is_not_ours_is_asked_over(asked, tmp_path, content):
    in_a_new_process()
    (path,) = (tmp_path / "cache").rglob("*.json")
    path.write_text(content)
    assert in_a_new_process() and asked["times"] == 2
    assert in_a_new_process() and asked["times"] == 2


def test_where_nothing_can_be_written_torch_is_asked_each_time(asked, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    assert in_a_new_process() and in_a_new_process() and asked["times"] == 2


@pytest.mark.parametrize(("device", "good"), [("cpu", True), ("cpu", False), ("cuda", True)])
def test_a_compiled_step_is_told_what_is_known(monkeypatch, device, good):
    given = {}
    monkeypatch.setattr(instruction_sets, "are_good", lambda: good)
    monkeypatch.setattr(compiled.torch, "compile", lambda function, **how: given.update(how) or function)
    compiled.compiled_step("dynamic", torch.device(device), capture=False, by_layer=False)
    assert given["options"] == ({"cpp.vec_isa_ok": True} if device == "cpu" and good else None)
    assert given["fullgraph"] and given["dynamic"] is True


def test_the_options_are_ones_that_torch_takes():
    if not instruction_sets.are_good():
        pytest.skip("nothing is known here")
    doubled = compiled._compiled(lambda x: 2 * x, "static", CPU)
    assert torch.equal(doubled(torch.ones(3)), torch.full((3,), 2.0))
    assert config.cpp.vec_isa_ok is None  # nobody else's setting


@pytest.mark.parametrize("fault", [RuntimeError, FileNotFoundError, AttributeError, ImportError])
def test_what_goes_wrong_in_asking_leaves_it_to_torch(asked, monkeypatch, fault):
    def fails():
        raise fault

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", fails)
    assert not in_a_new_process()


def test_what_the_user_says_later_counts_too(asked):
    assert instruction_sets.are_good()
    with config.patch({"cpp.vec_isa_ok": False}):
        assert not instruction_sets.are_good()
    assert instruction_sets.are_good()
