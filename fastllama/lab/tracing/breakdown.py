"""A breakdown: where the time of a traced generation went, by phase, part, layer and operator.

On a CPU a part's time is that of its operators; on an accelerator that of the kernels which they started. What no
operator accounts for is the Python between them (with the profiler's own cost), or the wait of the accelerator for it.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from torch.autograd import DeviceType

from fastllama.lab.tracing.marks import LAYER, PREFIX
from fastllama.lab.tracing.parts import PARTS, PRODUCTS, Shape

# Frames of compiled code: what they do themselves is theirs, and what they call is an operator.
_REGION = "Torch-Compiled Region"
_FRAMES = (_REGION, LAYER, "## Call CompiledFxGraph", "CompiledFunction", "AOTDispatcher", "TorchDynamo", "Pregraph")
_GRAPH = "cudaGraphLaunch"
_PRODUCT_OPERATORS = {
    *(f"aten::{name}" for name in ("linear", "addmm", "mm", "matmul", "addmv", "mv")),
    "mkldnn::_linear_pointwise",
    "fastllama::linear_packed",
    "fastllama_native::linear_rows",
    "fastllama_native::linear_small",
}
_WHOLE = ("sampling", "native step")  # parts that do more than call operators


@dataclass
class Row:
    """One part in one phase. Times in microseconds; `calls` of the part, `operators` by their name."""

    calls: int = 0
    us: float = 0.0
    operators: Any = field(default_factory=Counter)  # microseconds by name


@dataclass
class Phase:
    """Prefill, or all decode steps. `us` is the time of the whole phase, of which `rows` are the parts."""

    us: float
    steps: int
    rows: dict[str, Row]
    layers_us: dict[int, float]  # of the products and norms, which know their layer
    told_apart: bool = True  # False if products in compiled code could not be


def _starts(event) -> float:
    return event.time_range.start


def _costs(event, on_device: bool) -> list[tuple[str, float]]:
    """(name, microseconds) of the operator, or of the kernels that it and what it calls started."""
    if not on_device:
        return [(event.name, event.time_range.elapsed_us())]
    own = [(kernel.name, kernel.duration) for kernel in event.kernels]
    return own + [cost for child in event.cpu_children for cost in _costs(child, True)]


class _Walk:
    """Adds up the operators below marks."""

    def __init__(self, shape: Shape, on_device: bool):
        self.shape, self.on_device = shape, on_device
        self.rows = {part: Row() for part in PARTS}
        self.layers_us: dict[int, float] = defaultdict(float)
        self.told_apart = True
        self.by_layer = False  # the head is then outside of what is compiled

    def add(self, part: str, costs: list[tuple[str, float]], layer: int | None = None) -> None:
        for name, us in costs:
            self.rows[part].us += us
            self.rows[part].operators[name] += us
            if layer is not None:
                self.layers_us[layer] += us

    def add_event(self, part: str, event, layer: int | None = None) -> None:
        self.add(part, _costs(event, self.on_device), layer)

    def below(self, event, part: str, layer: int | None = None) -> None:
        """The operators that `event` calls, which belong to `part` unless a mark says otherwise."""
        compiled: list = []
        for child in sorted(event.cpu_children, key=_starts):
            if child.name.startswith(PREFIX):
                inner, _, number = child.name.removeprefix(PREFIX).partition(":")
                self.rows[inner].calls += 1
                self.under(child, inner, int(number) if number else None)
            elif child.name.startswith(_FRAMES):
                self.frame(child, compiled)
            else:
                part_of_it = part
                if child.name.startswith(_GRAPH):
                    part_of_it = "captured"
                    self.rows["captured"].calls += 1
                self.add_event(part_of_it, child, layer)
        if compiled:
            self.sort(compiled)

    def under(self, mark, part: str, layer: int | None) -> None:
        if part not in _WHOLE:
            return self.below(mark, part, layer)
        costs = _costs(mark, self.on_device)
        self.add(part, costs if self.on_device else [(PARTS[part], us) for _, us in costs], layer)

    def frame(self, frame, found: list) -> None:
        """Time of compiled code itself; what it calls goes to `found`."""
        children = sorted(frame.cpu_children, key=_starts)
        own = [(kernel.name, kernel.duration) for kernel in frame.kernels]
        if not self.on_device:
            inside = sum(child.time_range.elapsed_us() for child in children)
            own = [("fused kernels", frame.time_range.elapsed_us() - inside)]
        self.rows["compiled"].calls += frame.name.startswith((_REGION, LAYER))
        self.by_layer = self.by_layer or frame.name == LAYER
        self.add("compiled", own)
        for child in children:
            if child.name.startswith(_FRAMES):
                self.frame(child, found)
            else:
                found.append(child)

    def sort(self, operators: list) -> None:
        """Operators that compiled code calls. Products run in a known order, so each is known by its place."""
        products = [event for event in operators if event.name in _PRODUCT_OPERATORS]
        sequence = [part for part in self.shape.sequence if not (self.by_layer and part == "head")]
        self.told_apart = self.told_apart and len(products) == len(sequence)
        places = dict(zip(map(id, products), sequence, strict=True)) if len(products) == len(sequence) else {}
        for event in operators:
            part = places.get(id(event), "attention" if "attention" in event.name else "compiled")
            self.rows[part].calls += part != "compiled"
            self.add_event(part, event)


def _phase(walk: _Walk, us: float, steps: int, kernels_us: float) -> Phase:
    rows = walk.rows
    if walk.on_device:
        told = sum(row.us for row in rows.values())
        # Rounding of thousands of kernels is no captured graph.
        if kernels_us > 1.001 * told:
            walk.add("captured", [("kernels that no operator started", kernels_us - told)])
            rows["captured"].calls = steps
    rows["between"].us = us - sum(row.us for row in rows.values())
    used = {part: row for part, row in rows.items() if row.us or row.calls}
    return Phase(us, steps, used, dict(walk.layers_us), walk.told_apart)


def breakdown(events: list, shape: Shape, on_device: bool) -> tuple[Phase, Phase | None]:
    """(prefill, decode) of one generate call under marks, from a profiler's events; no decode for one new token.

    The prefill lasts from the call's beginning to the first step, decoding from there to the call's end; the parts of
    each add up to its time. Raises `ValueError` if the events hold no call or no prefill.
    """
    calls = [event for event in events if event.name.startswith("ProfilerStep") and event.device_type == DeviceType.CPU]
    if len(calls) != 1:
        raise ValueError(f"a trace of one call was expected, and it holds {len(calls)}")
    (call,) = calls
    children = sorted(call.cpu_children, key=_starts)
    steps = [event for event in children if event.name == f"{PREFIX}step"]
    if not any(event.name == f"{PREFIX}prefill" for event in children):
        raise ValueError("the trace holds no prefill")
    border = steps[0].time_range.start if steps else call.time_range.end
    kernels = [event for event in events if event.device_type != DeviceType.CPU and not event.is_user_annotation]
    phases = []
    for begin, end, count in ((call.time_range.start, border, 0), (border, call.time_range.end, len(steps))):
        walk = _Walk(shape, on_device)
        for event in children:
            if not begin <= _starts(event) < end:
                continue
            if event.name in (f"{PREFIX}step", f"{PREFIX}prefill"):
                walk.below(event, "other")
            elif event.name == f"{PREFIX}sampling":
                walk.rows["sampling"].calls += 1
                walk.under(event, "sampling", None)
            else:
                # Before the first pass generate prepares its arguments; after a pass it chooses.
                before = begin == call.time_range.start and _starts(event) < _starts(_prefill(children))
                walk.add_event("other" if before else "sampling", event)
        inside = [event for event in kernels if begin <= _starts(event) < end]
        phases.append(_phase(walk, end - begin, count, sum(event.time_range.elapsed_us() for event in inside)))
    return phases[0], phases[1] if steps else None


def _prefill(children: list):
    return next(event for event in children if event.name == f"{PREFIX}prefill")


def bytes_of(phase: Phase, shape: Shape) -> dict[str, int]:
    """Bytes that one step, or the prefill, moves, by part; where a call is the whole step, in one row."""
    if not phase.steps and "native step" in phase.rows:
        passes = phase.rows["native step"].calls
        moved = shape.prefill_bytes({part: passes * shape.calls(part) for part in (*PRODUCTS, "norm")})
        return {"native step": sum(moved.values())}
    if not phase.steps:
        calls = {part: phase.rows[part].calls for part in (*PRODUCTS, "norm")}
        return shape.prefill_bytes(calls)
    moved = shape.step_bytes()
    if "native step" in phase.rows:
        return {"native step": sum(moved.values())}
    whole = next((part for part in ("captured", "compiled") if part in phase.rows), None)
    if whole is not None:
        # What has no row of its own is in there.
        moved[whole] = sum(moved.pop(part) for part in list(moved) if part not in phase.rows)
    return moved
