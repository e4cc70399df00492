"""The products that are written in C++: built with torch's headers on first use, and optional.

Without a compiler nothing is lost but speed: `load` says why, and the other formulations serve.
"""

import functools
import hashlib
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from fastllama.kernels.whole_file import one_process, whole

_SOURCES = sorted(Path(__file__).with_name("native_code").iterdir())
# Sums may be taken in any order. Not -ffast-math: it would take infinities for numbers, and flush the smallest numbers
# to zero in the whole process.
_FLAGS = ["-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"]
_FLAGS += ["-fassociative-math", "-freciprocal-math"]


def cache_folder() -> Path:
    """Where compiled and measured things are kept: ~/.cache/fastllama, or under XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastllama"


@functools.cache
def machine() -> str:
    """What compiled code and measurements depend on, as 12 hex digits: processor, torch and Python."""
    processor = platform.machine() + platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor += "".join(sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))}))
    except OSError:
        pass
    words = (processor, torch.__version__, platform.python_version(), platform.platform())
    return hashlib.sha256(repr(words).encode()).hexdigest()[:12]


@functools.cache
def library_name() -> str:
    """The library's, by its sources and how they are compiled."""
    code = b"".join(path.read_bytes() for path in _SOURCES) + repr(_FLAGS).encode()
    return f"fastllama_native_{hashlib.sha256(code).hexdigest()[:12]}"


_shapes = torch.library.Library("fastllama_native", "IMPL")  # for the compiler; they hold as long as this lives
# Of which integers the processor sums products in one instruction: "bytes", "shorts" or "none"; known once the
# operators are loaded.
sums_products_of = "none"
# Whether it multiplies several rows of bf16 in a matrix unit (AMX); known likewise.
has_matrix_unit = False


@functools.cache
def load() -> str | None:
    """Builds (once per machine) and loads the operators; None when they are ready, else why they are not."""
    global sums_products_of, has_matrix_unit
    if platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux":
        return "it is written for x86-64 Linux"
    name = library_name()
    folder = cache_folder() / "native" / machine() / name
    library = folder / f"{name}.so"
    try:
        if not library.exists():
            with one_process(folder):
                if not library.exists():  # another process may have built it meanwhile
                    _build(name, folder, library)
        torch.ops.load_library(str(library))
    except Exception as fault:  # whatever a compiler can do wrong
        words = str(fault).strip().splitlines() or [type(fault).__name__]
        return f"it was not built: {words[0]}"
    _shapes.impl("linear_rows", _rows_shape, "Meta")
    _shapes.impl("linear_small", _small_shape, "Meta")
    sums_products_of = torch.ops.fastllama_native.sums_products_of()
    has_matrix_unit = torch.ops.fastllama_native.has_matrix_unit()
    return None


def _rows_shape(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _small_shape(x, quants, scales, bias, bits: int, out_features: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _build(name: str, folder: Path, library: Path) -> None:
    from torch.utils import cpp_extension  # a slow import that a machine with a built library does without

    compiler = shlex.split(cpp_extension.get_cxx_compiler())
    includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    sources = [path for path in _SOURCES if path.suffix == ".cpp"]
    # In a folder of its own, and renamed when it is whole.
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        objects = [f"{unfinished}/{path.stem}.o" for path in sources]

        def compile(source: Path, target: str) -> None:
            _call([*compiler, *_FLAGS, "-std=c++20", "-fPIC", *includes, "-c", str(source), "-o", target])

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(compile, sources, objects))
        linked = f"{unfinished}/{name}.so"
        paths = [f"-L{path}" for path in cpp_extension.library_paths()]
        _call([*compiler, *_FLAGS, "-shared", *objects, *paths, "-lc10", "-ltorch_cpu", "-o", linked])
        with whole(library) as place:
            os.replace(linked, place)


def _call(command: list[str]) -> None:
    """Raises `RuntimeError` with the compiler's first error."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise RuntimeError(next((line for line in done.stderr.splitlines() if "error" in line), "the compiler failed"))
