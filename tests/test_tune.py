"""Which product is used, where that is remembered, and how the native ones are built, or why they are not."""

import json
import os
import runpy
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import setuptools
import torch

from fastllama.kernels import linear, native
from fastllama.kernels.linear import NATIVE_ROWS, can_pack
from fastllama.kernels.tune import PRODUCTS, Chooser
from tests.tiny import GREEDY, generate, pair, prompt

ROOT = Path(__file__).parents[1]
ENVIRONMENT = dict(os.environ)  # with the cache where it is
REASON = "it was not built: no compiler today"


@pytest.fixture(scope="module")
def built():
    """Loaded before anything points the cache elsewhere: a library is loaded once a process."""
    if native.load() is not None:
        pytest.skip(native.load())


@pytest.fixture
def packs():
    if not can_pack(weight()):
        pytest.skip("this torch packs nothing")


@pytest.fixture(autouse=True)
def folder(built, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def weight(dtype=torch.float32) -> torch.Tensor:
    return torch.ones(32, 16, dtype=dtype)


def chooser(wanted: str, rows: int = 1, dtype=torch.float32) -> Chooser:
    return Chooser(wanted, rows, 32 * 16 * 4, weight(dtype))


def answer(monkeypatch, **times) -> list:
    """Makes every measurement end in `times`; returns the list of what was measured."""
    calls = []

    def measure(self, weight, candidates):
        calls.append(tuple(candidates))
        return {name: times[name] for name in candidates}

    monkeypatch.setattr(Chooser, "_measure", measure)
    return calls


def refuse_to_measure(monkeypatch) -> None:
    def measure(self, weight, candidates):
        raise AssertionError("measured although the answer is known")

    monkeypatch.setattr(Chooser, "_measure", measure)


def cache_file(folder: Path) -> Path:
    (path,) = folder.rglob("*.json")
    return path


# names


@pytest.mark.parametrize("wanted", ["stock", "native", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_name_is_honoured_without_measuring(wanted, dtype, packs, folder, monkeypatch):
    if wanted == "packed" and not can_pack(weight(dtype)):
        pytest.skip(f"this CPU packs no {dtype}")
    refuse_to_measure(monkeypatch)
    assert chooser(wanted, dtype=dtype)(weight(dtype), True) == wanted
    assert not list(folder.rglob("*.json"))


def test_what_may_not_be_packed_is_the_next_best(packs, monkeypatch):
    assert chooser("packed")(weight(), False) == "native"
    assert chooser("packed", NATIVE_ROWS + 1)(weight(), False) == "stock"
    monkeypatch.setattr(native, "load", lambda: REASON)
    assert chooser("packed")(weight(), False) == "stock"


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_small_weights_stay_in_cpp_for_any_number_of_rows(format):
    """Which expands them itself where that is faster; torch's own expansion takes many times as long."""
    assert chooser("auto", 1).small(format, 64, 128, False) == "native"
    assert chooser("auto", NATIVE_ROWS + 1).small(format, 64, 128, False) == "native"
    assert chooser("stock", NATIVE_ROWS + 1).small(format, 64, 128, False) == "expanded"


def test_the_native_product_takes_few_rows():
    assert chooser("native", NATIVE_ROWS)(weight(), True) == "native"
    with pytest.raises(ValueError, match="products='native' cannot be honoured: 17 rows are more than the 16"):
        chooser("native", NATIVE_ROWS + 1)


def test_a_matrix_unit_takes_more_rows_in_bf16(monkeypatch):
    monkeypatch.setattr(native, "has_matrix_unit", True)
    assert chooser("native", 64, dtype=torch.bfloat16)(weight(torch.bfloat16), True) == "native"
    with pytest.raises(ValueError, match="products='native' cannot be honoured: 65 rows are more than the 64"):
        chooser("native", 65, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="17 rows are more than the 16"):
        chooser("native", 17)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_packed_is_refused_where_it_does_not_exist(dtype):
    with pytest.raises(ValueError, match=f"products='packed' cannot be honoured: this torch packs no {dtype} on cpu"):
        chooser("packed", dtype=dtype)


def test_native_is_refused_where_it_does_not_exist():
    with pytest.raises(ValueError, match="products='native' cannot be honoured"):
        chooser("native", dtype=torch.float64)


def test_native_is_for_cpus():
    with pytest.raises(ValueError, match="products='native' cannot be honoured: it is for CPUs"):
        Chooser("native", 1, 0, weight().to("meta"))


# measuring


@pytest.mark.parametrize(
    ("times", "best"),
    [
        ({"stock": 10.0, "native": 20.0, "packed": 20.0}, "stock"),
        ({"stock": 20.0, "native": 10.0, "packed": 20.0}, "native"),
        ({"stock": 20.0, "native": 20.0, "packed": 10.0}, "packed"),
        ({"stock": 20.0, "native": 10.4, "packed": 10.0}, "native"),  # a copy has to be worth it
        ({"stock": 10.4, "native": 20.0, "packed": 10.0}, "stock"),
        ({"stock": 20.0, "native": 10.6, "packed": 10.0}, "packed"),
        ({"stock": 10.4, "native": 10.2, "packed": 10.0}, "native"),
    ],
    ids=str,
)
def test_the_fastest_is_chosen_and_packing_only_beyond_the_margin(times, best, packs, monkeypatch):
    answer(monkeypatch, **times)
    assert chooser("auto")(weight(), True) == best
    assert chooser("auto")(weight(), False) != "packed"


def test_an_answer_is_remembered_on_disk(packs, folder, monkeypatch):
    calls = answer(monkeypatch, stock=3.0, native=2.0, packed=1.0)
    assert chooser("auto")(weight(), True) == "packed"
    assert calls == [("stock", "native", "packed")]
    refuse_to_measure(monkeypatch)
    assert chooser("auto")(weight(), True) == "packed"
    assert [list(times) for times in json.loads(cache_file(folder).read_text()).values()] == [list(calls[0])]
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")], "a temporary file was left"


def test_each_circumstance_is_measured_by_itself(packs, folder, monkeypatch):
    calls = answer(monkeypatch, stock=3.0, native=2.0, packed=1.0)
    for _ in range(2):
        chooser("auto")(weight(), True)
        chooser("auto")(weight(), False)  # other candidates
        chooser("auto", rows=2)(weight(), True)
        chooser("auto")(weight()[:8], True)
        chooser("auto", dtype=torch.float16)(weight(torch.float16), True)
        Chooser("auto", 1, 2**30, weight())(weight(), True)  # does not fit the caches
        before = torch.get_num_threads()
        torch.set_num_threads(before + 1)
        chooser("auto")(weight(), True)
        torch.set_num_threads(before)
    assert len(calls) == 7 == len(json.loads(cache_file(folder).read_text()))


def test_times_of_other_code_are_not_used(packs, folder, monkeypatch):
    answer(monkeypatch, stock=1.0, native=2.0, packed=3.0)
    assert chooser("auto")(weight(), True) == "stock"
    monkeypatch.setattr(native, "library_name", lambda: "fastllama_native_of_tomorrow")
    calls = answer(monkeypatch, stock=2.0, native=1.0, packed=3.0)
    assert chooser("auto")(weight(), True) == "native"
    assert len(calls) == 1 and len(list(folder.rglob("*.json"))) == 2


BROKEN = {
    "empty": lambda text: b"",
    "cut off": lambda text: text[: len(text) // 2],
    "not text": lambda text: b"\xff\xfe\x00",
    "a list": lambda text: b"[1, 2]",
    "no times": lambda text: json.dumps(dict.fromkeys(json.loads(text))).encode(),
    "times of others": lambda text: json.dumps({key: {"stock": 1.0} for key in json.loads(text)}).encode(),
    "times that are words": lambda text: json.dumps(
        {key: dict.fromkeys(times, "fast") for key, times in json.loads(text).items()}
    ).encode(),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_file_is_measured_anew_and_mended(how, packs, folder, monkeypatch):
    answer(monkeypatch, stock=3.0, native=2.0, packed=1.0)
    chooser("auto")(weight(), True)
    path = cache_file(folder)
    path.write_bytes(BROKEN[how](path.read_bytes()))
    calls = answer(monkeypatch, stock=3.0, native=1.0, packed=2.0)
    assert chooser("auto")(weight(), True) == "native"
    assert len(calls) == 1
    refuse_to_measure(monkeypatch)
    assert chooser("auto")(weight(), True) == "native"


def test_a_file_that_cannot_be_read_is_measured_anew(packs, folder, monkeypatch):
    answer(monkeypatch, stock=3.0, native=2.0, packed=1.0)
    chooser("auto")(weight(), True)
    path = cache_file(folder)
    path.unlink()
    path.mkdir()
    calls = answer(monkeypatch, stock=3.0, native=1.0, packed=2.0)
    assert chooser("auto")(weight(), True) == "native"
    assert len(calls) == 1
    assert list(path.parent.iterdir()) == [path], "a temporary file was left"


@pytest.mark.parametrize("where", ["under a file", "read-only"])
def test_a_folder_that_cannot_be_written_only_forgets(where, packs, folder, monkeypatch):
    if where == "under a file":
        folder.write_text("a file")
    else:
        folder.mkdir()
        folder.chmod(0o500)
        if os.access(folder, os.W_OK):
            pytest.skip("nothing is read-only for this user")
    calls = answer(monkeypatch, stock=3.0, native=1.0, packed=2.0)
    for _ in range(2):
        assert chooser("auto")(weight(), True) == "native"
    assert len(calls) == 2


def test_a_real_measurement_times_every_candidate_and_keeps_nothing(packs):
    before = len(linear._packed)
    for rows in (1, 3):
        times = chooser("auto", rows)._measure(weight(), ["stock", "native", "packed"])
        assert list(times) == ["stock", "native", "packed"]
        assert all(0 < time < float("inf") for time in times.values())
    assert len(linear._packed) == before
    assert chooser("auto")(weight(), True) in PRODUCTS[1:]


# no compiler


def test_without_a_compiler_the_others_serve(packs, monkeypatch):
    monkeypatch.setattr(native, "load", lambda: REASON)
    calls = answer(monkeypatch, stock=2.0, packed=1.0)
    assert chooser("auto")(weight(), True) == "packed"
    assert chooser("auto")(weight(), False) == "stock"
    assert calls == [("stock", "packed")]  # one candidate needs no measurement
    assert chooser("packed")(weight(), True) == "packed"
    with pytest.raises(ValueError, match=f"^products='native' cannot be honoured: {REASON}$"):
        chooser("native")


def test_without_a_compiler_generate_is_vanillas_and_asking_for_native_says_why(monkeypatch):
    monkeypatch.setattr(native, "load", lambda: REASON)
    vanilla, ours = pair()
    inputs = prompt("padded")
    ours.preallocate(3, 64)
    expected = generate(vanilla, inputs, max_new_tokens=10, **GREEDY)
    assert torch.equal(generate(ours, inputs, max_new_tokens=10, **GREEDY), expected)
    assert "native" not in ours.path
    cache = ours._engine.cache
    for switches in ({"products": "native"}, {"compile": "native"}):
        with pytest.raises(ValueError, match=f"'native' cannot be honoured: {REASON}$"):
            ours.preallocate(3, 64, **switches)
        assert ours._engine.cache is cache, "the earlier reservation is kept"


def load_anew() -> str | None:
    return native.load.__wrapped__()


def script(folder: Path, body: str) -> str:
    path = folder / "cxx"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


COMPILERS = {
    "none": lambda folder: str(folder / "missing"),
    "not a program": lambda folder: str(folder),
    "one that fails": lambda folder: script(folder, "echo 'in file x:' >&2; echo 'x:1: error: no luck' >&2; exit 1"),
    "one that fails silently": lambda folder: script(folder, "exit 3"),
    "one that writes nothing": lambda folder: script(folder, "exit 0"),
}
WORDS = {"one that fails": "x:1: error: no luck", "one that fails silently": "the compiler failed"}


@pytest.mark.parametrize("how", COMPILERS)
def test_a_compiler_that_does_not_work_gives_a_reason_of_one_line(how, tmp_path, folder, monkeypatch):
    monkeypatch.setenv("CXX", COMPILERS[how](tmp_path))
    reason = load_anew()
    assert reason.startswith("it was not built: ") and len(reason.splitlines()) == 1
    assert WORDS.get(how, "") in reason
    assert not [path for path in folder.rglob("*") if path.is_file()], "something unfinished was left"


@pytest.mark.parametrize("fault", [MemoryError(), OSError(28, "No space left"), RuntimeError("a\nb"), ValueError("  ")])
def test_any_fault_of_building_gives_a_reason_of_one_line(fault, monkeypatch):
    def build(*arguments):
        raise fault

    monkeypatch.setattr(native, "_build", build)
    reason = load_anew()
    assert reason.startswith("it was not built: ") and len(reason.splitlines()) == 1


def test_a_cache_that_cannot_be_written_is_a_reason(folder):
    folder.write_text("a file")
    assert load_anew().startswith("it was not built: ")


def test_other_systems_have_a_reason(monkeypatch):
    monkeypatch.setattr(native.platform, "machine", lambda: "riscv64")
    assert load_anew() == "it is written for x86-64 Linux"


def test_an_empty_cache_home_is_no_cache_home(monkeypatch):
    """As the XDG specification has it; the current folder is nobody's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert native.cache_folder() == Path.home() / ".cache" / "fastllama"


_DENORMALS = """
import torch
from fastllama.kernels import native
assert native.load() is None
assert 1e-310 * 1.0 != 0, "doubles of Python"
assert (torch.full((64,), 1e-40) * 1).count_nonzero() == 64, "a tensor's floats"
"""


@pytest.mark.usefixtures("forked")
def test_the_library_leaves_small_numbers_alone():
    """-ffast-math may flush denormal numbers to zero for a whole process, whatever else runs in it."""
    done = subprocess.run([sys.executable, "-c", _DENORMALS], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr


def test_the_sources_are_part_of_the_package(monkeypatch):
    found = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: found.update(arguments))
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    patterns = found["package_data"].get("fastllama.kernels", [])
    for path in native._SOURCES:
        name = path.relative_to(ROOT / "fastllama" / "kernels").as_posix()
        assert any(fnmatch(name, pattern) for pattern in patterns), f"{name} is not installed"
