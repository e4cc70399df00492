"""Which formulation of a product to use: chosen by a short measurement, remembered on disk.

This file and the laboratory are the only ones that read a clock.
"""

import contextlib
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastllama.kernels import native
from fastllama.kernels.attention import PromptAttention, attend_causal, attend_prompt, has_native_attention
from fastllama.kernels.linear import (
    NATIVE_DTYPES,
    NATIVE_ROWS,
    Native,
    Packed,
    Stock,
    can_pack,
    hold,
    let_go,
    native_rows,
    pack,
)
from fastllama.kernels.small_kinds import Run, SmallWork
from fastllama.kernels.small_packed import packed_obstacle
from fastllama.kernels.small_product import native_obstacle
from fastllama.kernels.whole_file import whole

PRODUCTS = ("auto", "stock", "native", "packed")
_PASSES = 5
_NEVER = 1e12  # microseconds of what does not run
_SLICE = 32 * 2**20  # bytes of a weight that are timed
_TOTAL = 128 * 2**20  # bytes that are walked through in turn: more than the caches hold
_PROMPT = 256  # tokens of a prompt whose attention is timed
_MARGIN = 1.05  # a packed weight is a copy that others cannot read: it has to be worth it


class Chooser:
    """Answers with a formulation for each weight of a model that decodes `rows` rows at a time.

    `wanted` is one of `PRODUCTS`; `model_bytes` tells whether the model as a whole fits the caches, `run` how its steps
    run, and `small` whether its weights are in few bits. Raises `ValueError` where a formulation that was asked for by
    name does not exist.
    """

    def __init__(
        self,
        wanted: str,
        rows: int,
        model_bytes: int,
        weight: torch.Tensor,
        run: Run | None = None,
        small: bool = False,
    ):
        self.run = run or Run()
        self.wanted, self.rows, self.model_bytes, self.dtype = wanted, rows, model_bytes, weight.dtype
        self.device = weight.device
        on_cpu = weight.device.type == "cpu"
        self.native = on_cpu and wanted in ("auto", "native", "packed") and native.load() is None
        if wanted == "native" and not self.native:
            raise ValueError(f"products='native' cannot be honoured: {native.load() if on_cpu else 'it is for CPUs'}")
        if wanted == "native" and weight.dtype not in NATIVE_DTYPES:
            raise ValueError(f"products='native' cannot be honoured: it has no {weight.dtype}")
        if wanted == "native" and rows > native_rows(weight.dtype):
            most = native_rows(weight.dtype)
            raise ValueError(f"products='native' cannot be honoured: {rows} rows are more than the {most} it is for")
        if wanted == "packed" and not small and not can_pack(weight):
            raise ValueError(
                f"products='packed' cannot be honoured: this torch packs no {weight.dtype} on {weight.device.type}"
            )

    def __call__(self, weight: torch.Tensor, may_pack: bool) -> str:
        candidates = ["stock"]
        if self.native and self.rows <= native_rows(weight.dtype) and weight.dtype in NATIVE_DTYPES:
            candidates.append("native")
        if may_pack and can_pack(weight):
            candidates.append("packed")
        if self.wanted != "auto":
            fallback = candidates[1] if self.wanted == "packed" and "native" in candidates else "stock"
            return self.wanted if self.wanted in candidates else fallback
        return candidates[0] if len(candidates) == 1 else self._fastest(weight, candidates)

    def require_small(self, format: str, columns: int) -> None:
        """Raises `ValueError` where the formulation that was asked for does not take weights in few bits."""
        if self.wanted == "packed":
            why = packed_obstacle(format, self.device, self.dtype, columns)
            if why is not None:
                raise ValueError(
                    f"products='packed' cannot be honoured: weights in {format} have no packed form: {why}"
                )
        why = native_obstacle(format, self.device)
        if self.wanted == "native" and why is not None:
            raise ValueError(f"products='native' cannot be honoured: {why}")

    def small(self, format: str, rows: int, columns: int, may_pack: bool) -> str:
        """How a weight [N, K] in few bits is multiplied: "native"; "packed" for torch's own kernel; "summed" as it is
        read, in one kernel that torch compiles; or "expanded" to floats for torch's product."""
        self.require_small(format, columns)
        native = native_obstacle(format, self.device) is None
        if native and self.wanted in ("auto", "native"):
            return "native"  # which expands, tile by tile, where rows are many
        if self.wanted == "packed" and may_pack:
            return "packed"
        if self.wanted != "auto":
            return "native" if native and self.wanted != "stock" else "expanded"
        candidates = ["expanded"]
        if may_pack and packed_obstacle(format, self.device, self.dtype, columns) is None:
            candidates.append("packed")
        if (may_pack or format == "float8") and self.run.compiles and self.rows <= NATIVE_ROWS:
            candidates.append("summed")
        return candidates[0] if len(candidates) == 1 else self._fastest_small(format, rows, columns, candidates)

    def _fastest_small(self, format: str, rows: int, columns: int, candidates: list[str]) -> str:
        nbytes = min(self.model_bytes, _TOTAL)
        sizes = (f"{format} {rows}x{columns}", f"rows {self.rows}", f"of {nbytes >> 20} MiB")
        what = (*sizes, _name(self.device), f"compile {self.run.mode}")
        work = SmallWork(format, rows, columns, self.rows, self.dtype, self.device, nbytes)
        times = _known(what, self.dtype, candidates, lambda: self._measure_small(work, candidates))
        return min(candidates, key=times.__getitem__)

    def _measure_small(self, work: SmallWork, candidates: list[str]) -> dict[str, float]:
        """Microseconds of one product, by formulation. One that does not run here is left out, with a warning."""
        x = work.x()
        walks: dict[str, Callable] = {}

        def walk(name: str) -> None:
            walks[name](x)
            if self.device.type != "cpu":
                torch.accelerator.synchronize(self.device)

        for name in candidates:
            try:
                walks[name] = self.run.prepare(work.products(name))
                walk(name)  # compiles
            except Exception as fault:  # whatever a compiler or a kernel can do wrong
                if name == "expanded":
                    raise
                words = (str(fault).strip().splitlines() or [type(fault).__name__])[0]
                warnings.warn(f"fastllama: {work.format} weights are not multiplied {name}: {words}", stacklevel=2)
                walks.pop(name, None)
        times = _interleaved(list(walks), walk)
        return {name: times[name] / work.copies if name in times else _NEVER for name in candidates}

    def attention(self, heads: int, kv_heads: int, dim: int) -> PromptAttention:
        """Which attention a prompt takes. Of later chunks torch's own needs a mask, which the C++ does without."""
        if not self.native or not has_native_attention(dim, self.dtype):
            return PromptAttention("stock", "stock")
        if self.wanted == "native":
            return PromptAttention("native", "native")
        candidates = ["stock", "native"]
        sizes = f"attention of {heads} heads over {kv_heads} of {dim}"
        times = _known((sizes,), self.dtype, candidates, lambda: _time_attention(heads, kv_heads, dim, self.dtype))
        return PromptAttention(min(candidates, key=times.__getitem__), "native")

    def _fastest(self, weight: torch.Tensor, candidates: list[str]) -> str:
        held = f"of {min(self.model_bytes, _TOTAL) >> 20} MiB"
        what = ("x".join(map(str, weight.shape)), f"rows {self.rows}", held)
        times = _known(what, weight.dtype, candidates, lambda: self._measure(weight, candidates))
        best = min(candidates, key=times.__getitem__)
        if best == "packed":
            loose = min((name for name in candidates if name != "packed"), key=times.__getitem__)
            best = loose if times[loose] <= _MARGIN * times["packed"] else best
        return best

    def _measure(self, weight: torch.Tensor, candidates: list[str]) -> dict[str, float]:
        """Microseconds of one product with (a part of) a weight of this shape, by formulation."""
        columns = weight.shape[1]
        out = max(1, min(weight.shape[0], _SLICE // (columns * weight.itemsize)))
        copies = max(1, min(_TOTAL, self.model_bytes) // (out * columns * weight.itemsize))
        x = torch.randn(self.rows, 1, columns).to(weight.dtype)
        plain = [weight[:out].clone() for _ in range(copies)]
        products: dict[str, list[Any]] = {
            "stock": [Stock(w, None) for w in plain],
            "native": [Native(w, None) for w in plain],
        }
        if "packed" in candidates:
            products["packed"] = [Packed(hold(pack(w)), None, out) for w in plain]

        def walk(name: str) -> None:
            for product in products[name]:
                product(x)

        times = {name: total / copies for name, total in _interleaved(candidates, walk).items()}
        for product in products.get("packed", ()):
            let_go(product.handle)
        return times


def _interleaved(candidates: list[str], work: Callable[[str], None]) -> dict[str, float]:
    """The least microseconds of `work` with each candidate; in turns, so that a busy moment falls on all of them."""
    times = dict.fromkeys(candidates, float("inf"))
    for _ in range(_PASSES):
        for name in candidates:
            start = time.perf_counter()
            work(name)
            times[name] = min(times[name], (time.perf_counter() - start) * 1e6)
    return times


def _time_attention(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> dict[str, float]:
    """Microseconds that a prompt of `_PROMPT` tokens attends for, by formulation."""
    query = torch.randn(1, _PROMPT, heads, dim).to(dtype)
    key, value = (torch.randn(1, _PROMPT, kv_heads, dim).to(dtype) for _ in range(2))
    stored_key, stored_value = [x.transpose(1, 2).contiguous() for x in (key, value)]  # what a cache holds anyway

    def attend(name: str) -> None:
        if name == "native":
            attend_prompt(query, stored_key, stored_value, 0, dim**-0.5)
        else:
            attend_causal(query, key, value, dim**-0.5)

    return _interleaved(["stock", "native"], attend)


def _known(
    what: tuple[str, ...], dtype: torch.dtype, candidates: list[str], measure: Callable[[], dict[str, float]]
) -> dict[str, float]:
    """Microseconds by candidate: as an earlier measurement on this machine left them, or measured now."""
    key = " ".join((str(dtype).removeprefix("torch."), *what, f"threads {torch.get_num_threads()}", *candidates))
    times = _read().get(key)
    if times is None or not _are_times(times, candidates):
        times = measure()
        _write({**_read(), key: times})
    return times


def _name(device: torch.device) -> str:
    """What a measurement depends on besides the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _are_times(times, candidates: list[str]) -> bool:
    return isinstance(times, dict) and all(isinstance(times.get(name), (int, float)) for name in candidates)


def _path() -> Path:
    """One file for this machine and this C++: times of other code would go on choosing by what it was."""
    return native.cache_folder() / "products" / native.machine() / f"{native.library_name()}.json"


def _read() -> dict[str, dict[str, float]]:
    try:
        known = json.loads(_path().read_text())
        return known if isinstance(known, dict) else {}
    except (OSError, ValueError):  # none yet, or not ours: measured anew
        return {}


def _write(known: dict[str, dict[str, float]]) -> None:
    path = _path()
    with contextlib.suppress(OSError):  # where it cannot be written, the next process measures again
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as unfinished:
            unfinished.write_text(json.dumps(known, indent=1))
