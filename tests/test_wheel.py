"""A wheel built from a copy of the sources: everything that the package is, and nothing else; and it runs the main job.

It is installed into an environment that finds the packages of this one, and not the sources.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import fastllama
from fastllama.lab.records.sources import ROOT

if int(version("setuptools").split(".")[0]) < 77:
    pytest.skip("setuptools is older than 77: pip install -U setuptools", allow_module_level=True)


def run(command: list, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """A process in `folder` that does not see the sources."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    command = [str(word) for word in command]
    return subprocess.run(command, cwd=folder, env={**kept, **environment}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(the wheel, the sdist), built without a network."""
    folder = tmp_path_factory.mktemp("build")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "run_llama.py"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "fastllama", folder / "fastllama", ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "from setuptools import build_meta; import sys; "
        "print(build_meta.build_sdist('dist')); print(build_meta.build_wheel('dist'))"
    )
    done = run([sys.executable, "-c", code], folder)
    assert done.returncode == 0, done.stderr[-2000:]
    [wheel], [sdist] = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    return wheel, sdist


def sources() -> set[str]:
    """The files of the package and the command line, relative to the repository."""
    found = {path for path in (ROOT / "fastllama").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    return {path.relative_to(ROOT).as_posix() for path in found} | {"run_llama.py"}


def test_the_wheel_is_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
        assert held == sources()
        assert all(wheel.read(name) == (ROOT / name).read_bytes() for name in held)


def test_the_sdist_builds_the_same_wheel(built):
    with tarfile.open(built[1]) as sdist:
        held = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    files = {name for name in held if name.startswith("fastllama/") and Path(name).suffix}
    assert files == {name for name in sources() if name.startswith("fastllama/")}
    assert {"run_llama.py", "setup.py", "pyproject.toml", "README.md", "LICENSE"} <= held
    assert not any(name.startswith(("tests", "tb_logs")) for name in held)


def test_the_version_is_said_once(built):
    assert re.fullmatch(r"\d+\.\d+\.\d+", fastllama.__version__)
    assert built[0].name.startswith(f"fastllama-{fastllama.__version__}-")
    assert fastllama.__version__ not in (ROOT / "setup.py").read_text(encoding="utf-8")
    told = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Changes for users\n")[1]
    assert told.lstrip().startswith(f"**{fastllama.__version__}**"), "the README does not say what this version changed"
    assert not re.search(r"^version", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """(folder of programs, an empty folder) of an environment in which the wheel is installed."""
    home = tmp_path_factory.mktemp("environment")
    venv.EnvBuilder(with_pip=False).create(home)
    place = {"base": str(home), "platbase": str(home)}
    packages = Path(sysconfig.get_path("purelib", "venv", place))
    # Lines of a .pth are folders to look in, whose own .pth files (an editable install, say) are not followed.
    (packages / "the_others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    programs = Path(sysconfig.get_path("scripts", "venv", place))
    pip = [sys.executable, "-m", "pip", "--python", programs / "python", "install", "--no-deps", "--no-index"]
    # --ignore-installed: what the others hold of the same name stays theirs.
    done = run([*pip, "--ignore-installed", built[0]], home)
    assert done.returncode == 0, done.stderr[-2000:]
    return programs, packages


MAIN = ["--preallocate", "--compile", "native", "--prompt-length", 8, "--new-tokens", 3, "--runs", 1, "--warmup", 0]


def test_the_main_job_runs_from_an_empty_folder(installed, tmp_path):
    programs, packages = installed
    done = run([programs / "fastllama", "measure", *MAIN, "--sweep", "seed=0"], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    [kept] = tmp_path.rglob("*.jsonl")
    assert kept.parent == tmp_path / "tb_logs" / "sweeps"
    assert json.loads(kept.read_text())["parity"] == "exact"
    found = run([programs / "python", "-c", "import fastllama, run_llama; print(fastllama.__file__)"], tmp_path)
    assert Path(found.stdout.strip()).is_relative_to(packages)
    # Neither the record nor the tree beside the packages was touched.
    assert not (packages / "tb_logs").exists()


REFUSALS = """
import sys
import run_llama
from fastllama.lab import __main__ as laboratory
from fastllama.lab.cli import command
from fastllama.lab.suite import __main__ as suite

codes = [
    run_llama.main(["--preallocate", "--record", "what"]),
    command.main(["measure", "--record", "what"]),
    laboratory.main(["predict", "what", "text"]),
    laboratory.main(["changes"]),
    suite.main(["cpu", "--quick"]),
]
assert codes == [2, 2, 2, 2, 2], codes
assert command.main(["--version"]) == 0
"""


def test_what_needs_a_clone_says_so(installed, tmp_path):
    done = run([installed[0] / "python", "-c", REFUSALS], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == f"fastllama {fastllama.__version__}\n" and not list(tmp_path.iterdir())
    said = done.stderr.splitlines()
    assert len(said) == 5 and all("in a clone of the repository" in line and "setup.py" in line for line in said)
