"""The doctor: what it finds, what it advises, and that it names nobody."""

import getpass
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fastllama.lab import __main__ as commands
from fastllama.lab.measuring import doctor, matrix, paths
from fastllama.lab.measuring.advice import advice

ROOT = Path(__file__).parent.parent
HEALTHY = {
    "device": "cpu",
    "threads": 8,
    "usable_cores": 8,
    "omp_num_threads": None,
    "governor": "performance",
    "cpu_bf16": True,
    "nvidia_driver": False,
    "compiler": "g++ 12",
    "native": True,
    "native_reason": None,
    "compile_reason": None,
    "onednn_packed": ["fp32", "bf16"],
    "matrix_tflop_per_s": {"fp32": 1.0, "bf16": 2.0, "fp16": 1.0},
    "missing_packages": [],
}


def test_a_healthy_machine_gets_no_advice():
    assert advice(HEALTHY) == []


@pytest.mark.parametrize(
    ("changes", "words", "command", "slows"),
    [
        ({"threads": 16}, "16 threads on 8 usable cores", "export OMP_NUM_THREADS=8", True),
        ({"threads": 1}, "torch uses 1 of 8 usable cores", "export OMP_NUM_THREADS=8", True),
        ({"omp_num_threads": "16"}, "torch takes 8, others may not", "export OMP_NUM_THREADS=8", False),
        ({"compiler": None, "native": False, "native_reason": "x"}, "no C++ compiler runs", "apt install g++", True),
        ({"native": False, "native_reason": "it was not built: no room"}, "no room", "apt install", True),
        ({"compile_reason": "Python.h is missing"}, "Python.h is missing", "python3-dev", True),
        ({"governor": "powersave"}, "governor is powersave", "cpupower", True),
        ({"nvidia_driver": True}, "this torch does not use it", "pip install --force-reinstall torch", True),
        ({"onednn_packed": []}, "no oneDNN", "pip install", True),
        ({"cpu_bf16": False}, "no bf16 products", "--dtype fp32", False),
        (
            {"matrix_tflop_per_s": {"fp32": 1.0, "bf16": 2.0, "fp16": 0.1}},
            "fp16 products are slow",
            "--dtype bf16",
            False,
        ),
        ({"missing_packages": ["matplotlib"]}, "matplotlib is not there", '".[plot]"', False),
    ],
    ids=str,
)
def test_what_is_wrong_gets_its_advice(changes, words, command, slows):
    (given,) = advice({**HEALTHY, **changes})
    assert words in given.what and command in given.command and given.slows is slows
    assert "\n" not in given.command


def test_a_machine_that_the_operators_are_not_for_needs_no_compiler_anew():
    assert advice({**HEALTHY, "native": False, "native_reason": "it is written for x86-64 Linux"}) == []


def test_what_slows_comes_first():
    given = advice({**HEALTHY, "missing_packages": ["scipy"], "threads": 1})
    assert [entry.slows for entry in given] == [True, False]


def test_paths_are_cut_down():
    said = "/home/someone/x/operators.cpp:3: error in '/tmp/a b' and /usr/bin/g++, 2/3 of fastllama/kernels"
    assert doctor.without_paths(said) == "operators.cpp:3: error in 'a b' and g++, 2/3 of fastllama/kernels"


def test_the_matrix_rate_grows_its_matrix_until_it_is_slow_enough(monkeypatch):
    import torch

    sizes = []

    def seconds(a, b, device):
        sizes.append(a.shape[0])
        return a.shape[0] / 1000

    monkeypatch.setattr(matrix, "_seconds", seconds)
    assert matrix.tflop_per_s(torch.float32, torch.device("cpu"), 0.5) == pytest.approx(2 * 512**3 / 0.512 / 1e12)
    assert sorted(set(sizes)) == [128, 256, 512]


@pytest.fixture
def found(monkeypatch):
    monkeypatch.setattr(paths, "compile_reason", lambda device: None)
    import torch

    return doctor.examine(torch.device("cpu"), rough=True)


def test_what_it_finds_names_nobody(found):
    text = json.dumps(found)
    assert str(Path.home()) + "/" not in text and socket.gethostname() not in text and str(ROOT) not in text
    assert f"/{getpass.getuser()}/" not in text
    assert found["bandwidth_gb_per_s"] > 0 and all(rate > 0 for rate in found["matrix_tflop_per_s"].values())
    asked = [(path["dtype"], path["switches"].split()[-1]) for path in found["paths"]]
    assert asked == [
        (dtype, way) for dtype in ("fp32", "bf16", "fp16") for way in ("none", "--preallocate", "static", "native")
    ]
    none, preallocated, static, native = (path["path"] for path in found["paths"][:4])
    assert none.startswith("preallocated on first use, no compile")
    assert preallocated.startswith("preallocated, no compile") and "static compile" in static
    assert ("native step" in native) is found["native"]


def test_a_reason_that_names_a_path_is_cut_down(monkeypatch):
    import torch

    monkeypatch.setattr(paths, "compile_reason", lambda device: "no /home/someone/x/g++")
    monkeypatch.setattr(doctor.native, "load", lambda: "it was not built: /home/someone/x/operators.cpp:3: error")
    found = doctor.examine(torch.device("cpu"), rough=True)
    assert "someone" not in json.dumps(found)
    assert found["native_reason"] == "it was not built: operators.cpp:3: error" and found["compile_reason"] == "no g++"


@pytest.mark.parametrize(("argv", "slows", "code"), [([], True, 0), (["--strict"], True, 1), (["--strict"], False, 0)])
def test_strict_is_an_exit_code(found, monkeypatch, capsys, argv, slows, code):
    entry = {"what": "something", "command": "do this", "slows": slows}
    monkeypatch.setattr(doctor, "examine", lambda *unused: {**found, "advice": [entry]})
    assert commands.main(["doctor", "--device", "cpu", *argv]) == code
    out = capsys.readouterr().out
    assert "something" in out and "do this" in out and "GB/s" in out and "--compile native" in out
    assert ("nothing found" in out) is not slows


def test_json_is_one_object(found, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda *unused: found)
    assert commands.main(["doctor", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found))


def test_a_device_that_is_not_there_is_one_sentence(capsys):
    assert commands.main(["doctor", "--device", "abacus"]) == 2
    assert capsys.readouterr().err.startswith("error: device 'abacus' cannot be used")


def test_a_broken_compiler_is_told(tmp_path):
    broken = {
        "CXX": "/bin/false",
        "XDG_CACHE_HOME": str(tmp_path),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
    }
    command = [sys.executable, "-m", "fastllama.lab", "doctor", "--json", "--rough", "--strict", "--device", "cpu"]
    environment = {**os.environ, **broken, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert found["compiler"] is None and found["native"] is False and found["compile_reason"]
    assert "it was not built: the compiler failed" in found["native_reason"]
    assert found["advice"][0]["slows"] and "no C++ compiler runs" in found["advice"][0]["what"]
    by_way = {(path["dtype"], path["switches"].split()[-1]): path["path"] for path in found["paths"]}
    assert by_way["fp32", "native"].startswith("refused: ") and "not built" in by_way["fp32", "native"]
    assert by_way["fp32", "static"].startswith("refused: ")
    assert "native" not in by_way["fp32", "--preallocate"]
    assert str(tmp_path) not in done.stdout
