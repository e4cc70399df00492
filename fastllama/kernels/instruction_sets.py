"""Which vector instructions the compiler has for this processor: what torch asks first is asked once on a machine.

torch asks in every process that compiles, by starting a Python process for each set of instructions and for what some
sets have beyond their name (torch/_inductor/cpu_vec_isa.py). The former takes most of the time and is remembered here;
the latter torch goes on asking.
"""

import contextlib
import functools
import json
import os
import shutil
import sys
import threading
from pathlib import Path

from fastllama.kernels.native import cache_folder, machine
from fastllama.kernels.whole_file import whole

_lock = threading.Lock()  # torch changes what it asks with while it asks


def are_good() -> bool:
    """Whether code for every set that the processor names compiles and loads, now or when this machine was asked last.

    False also where torch does not ask, where that cannot be found out, or where torch was told
    (TORCHINDUCTOR_VEC_ISA_OK).
    """
    from torch._inductor import config

    with _lock:
        return getattr(config.cpp, "vec_isa_ok", False) is None and _are_good()


@functools.cache
def _are_good() -> bool:
    try:
        return sys.platform == "linux" and _were_or_are()
    except Exception:  # torch's own affair, which a version may arrange otherwise: it asks by itself then
        return False


def _were_or_are() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.cpu_vec_isa import supported_vec_isa_list, valid_vec_isa_list, x86_isa_checker

    has = set(x86_isa_checker())
    named = [isa for isa in supported_vec_isa_list if set(str(isa).split()) <= has]
    if not named:
        return False
    compiler = _stamp(get_cpp_compiler())
    path = cache_folder() / "instruction-sets" / f"{machine()}.json"
    if compiler is not None and _read(path) == compiler:
        return True
    good = len(valid_vec_isa_list()) == len(named)
    if good and compiler is not None:
        with contextlib.suppress(OSError):  # where it cannot be written, the next process asks again
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole(path) as unfinished:
                unfinished.write_text(json.dumps(compiler))
    return good


def _stamp(compiler: str) -> list | None:
    """What changes with the compiler's file; None where there is none."""
    found = shutil.which(compiler)
    if found is None:
        return None
    real = Path(found).resolve()
    status = os.stat(real)
    return [str(real), status.st_size, status.st_mtime_ns]


def _read(path: Path) -> list | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):  # none yet, or not ours: asked anew
        return None
