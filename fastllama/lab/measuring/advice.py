"""Advice: what a machine lacks, why that matters, and the command that changes it."""

import importlib.util
from dataclasses import asdict, dataclass

# What the extras bring: (module, what for, command)
_PACKAGES = {
    "matplotlib": ("plots and the picture of a memory timeline", 'pip install -e ".[plot]"'),
    "scipy": ("the verdicts of a comparison", "pip install scipy"),
}


@dataclass(frozen=True)
class Advice:
    """`slows`: decoding is slower as long as nothing is done."""

    what: str
    command: str
    slows: bool

    def as_json(self) -> dict:
        return asdict(self)


def missing_packages() -> list[str]:
    """Names of the optional packages that are not there."""
    return [name for name in _PACKAGES if importlib.util.find_spec(name) is None]


def advice(found: dict) -> list[Advice]:
    """What to do about what `doctor.examine` found; what slows decoding comes first."""
    given = []

    def add(what: str, command: str, slows: bool = True) -> None:
        given.append(Advice(what, command, slows))

    on_cpu, usable, threads = found["device"] == "cpu", found["usable_cores"], found["threads"]
    x86 = found["native_reason"] is None or "x86-64" not in found["native_reason"]
    if on_cpu and found["nvidia_driver"]:
        add(
            "there is an NVIDIA driver, and this torch does not use it",
            "pip install --force-reinstall torch",
        )
    if on_cpu and found["compiler"] is None:
        add("no C++ compiler runs: no native step, and no torch.compile", "sudo apt install g++ && unset CXX")
    elif on_cpu and not found["native"] and x86:
        add(
            f"the C++ operators are not there ({found['native_reason']})",
            "sudo apt install --reinstall g++ && unset CXX",
        )
    elif found["compile_reason"] is not None:
        add(f"torch.compile does not work here ({found['compile_reason']})", "sudo apt install g++ python3-dev")
    if threads > usable:
        add(f"{threads} threads on {usable} usable cores wait for each other", f"export OMP_NUM_THREADS={usable}")
    elif on_cpu and threads < usable:
        add(f"torch uses {threads} of {usable} usable cores", f"export OMP_NUM_THREADS={usable}")
    asked = found["omp_num_threads"] or ""
    if asked.isdigit() and int(asked) > usable >= threads:
        what = f"OMP_NUM_THREADS is {asked} and {usable} cores are usable: torch takes {threads}, others may not"
        add(what, f"export OMP_NUM_THREADS={usable}", False)
    if on_cpu and found["governor"] not in (None, "performance"):
        add(
            f"the frequency governor is {found['governor']}",
            "sudo cpupower frequency-set --governor performance",
        )
    rates = {name: rate for name, rate in found["matrix_tflop_per_s"].items() if rate}
    if on_cpu and not found["cpu_bf16"]:
        add("this processor has no bf16 products: a prompt in bf16 is slow", "python run_llama.py --dtype fp32", False)
    elif on_cpu and "fp32" in rates and rates.get("fp16", 0.0) < rates["fp32"] / 2:
        add("fp16 products are slow here; bf16 has as few bytes", "python run_llama.py --dtype bf16", False)
    if on_cpu and "fp32" not in found["onednn_packed"]:
        add("this torch has no oneDNN, and packs no weights", "pip install --force-reinstall torch")
    for name in found["missing_packages"]:
        purpose, command = _PACKAGES[name]
        add(f"{name} is not there: it is for {purpose}", command, False)
    return sorted(given, key=lambda entry: not entry.slows)
