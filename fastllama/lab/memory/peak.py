"""Peak memory, predicted from a model's configuration and a point, before anything is loaded.

B rows, P prompt tokens, S reserved positions, E hidden size, I intermediate size, Q and K columns of queries and keys
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
from transformers import LlamaConfig

from fastllama.cache.budget import available_bytes
from fastllama.decode.chunks import automatic_chunk
from fastllama.lab.measuring import checkpoint, drafting
from fastllama.lab.memory import memory
from fastllama.lab.points.assistance import Assistance
from fastllama.lab.points.point import Point
from fastllama.lab.points.workload import Workload
from fastllama.model.footprint import cache_shape, head_dim, prefill_bytes, rotary_bytes, weight_bytes

# A prediction is good to this share of the peak that memory.py here measures, for contestants that are not compiled
# (a compiler's own memory is not predicted); tests/test_peak.py holds it to that. Of prompts that go through in
# chunks, with the base measured, it is good to the smaller share.
MARGIN = 0.25
CHUNKED_MARGIN = 0.05
# A CPU's heap keeps what passing tensors leave behind: up to about as much again.
_HEAP = 2
# Where a whole prompt passes at once, what it keeps differs from run to run, a fifth as much again to all of it (64
# rows of 400 tokens of the demo: 0.81 to 1.14 GB): the middle is predicted.
_WHOLE_HEAP = 1.6
_FIRST_USE = 50_000_000  # bytes of tokenizer, text, threads and what libraries import when they are first used
_LOGITS = 3  # fp32 copies of one position's logits that choosing a token takes
# Tokens of the demo's prompts by which the base is measured: of one, loading is the peak; of the other, the prompt,
# which is the point's length up to this: with each chunk the heap keeps more of passing tensors.
_SHORT, _LONG = 64, 8191
_CHUNK = 512  # of the long one, where the point does not say
_demo_peaks: dict[tuple[str, str], int] = {}  # bytes, by command and contestant


@dataclass(frozen=True)
class Peak:
    """Bytes that one contestant takes alone in a new process.

    base: the interpreter and the libraries, on a CPU. work: what a forward pass holds beside weights and cache.
    """

    base: int
    weights: int
    cache: int
    work: int

    @property
    def nbytes(self) -> int:
        return self.base + self.weights + self.cache + self.work


@dataclass(frozen=True)
class Base:
    """Bytes of a process beside its model: while that is loaded, texts and tokenizer too, and while it generates."""

    loading: int
    running: int

    def beside(self, held: int) -> int:
        """What to add to `held` bytes of cache and work, which come after loading."""
        return max(self.running, self.loading - held)


@dataclass(frozen=True)
class Fit:
    """What measuring a point needs beyond what this process holds already, and what is free, in bytes."""

    point: Point
    needed: float
    free: float

    @property
    def fits(self) -> bool:
        return self.needed <= self.free

    def __str__(self) -> str:
        work = self.point.workload
        return (
            f"batch {work.batch_size} and {self.point.positions} positions are predicted to need "
            f"{self.needed / 1e9:.1f} GB, and {self.free / 1e9:.1f} GB are free on {self.point.device}"
        )


@cache
def base_bytes() -> int:
    """What a process holds that has imported the laboratory and loaded nothing, as this one when it is first asked."""
    return memory.own_bytes() + _FIRST_USE


def measured_base(point: Point, name: str) -> Base:
    """A process that generates with next to no model: the demo's peaks, less what is predicted for the demo.

    New processes measure it, once for each kind of contestant and length of prompt; 0 on an accelerator, where only
    tensors count.
    """
    if torch.device(point.device).type != "cpu":
        return Base(0, 0)
    kept = {field: value for field, value in point.switches.items() if field in ("compile", "products")}
    kept["prefill_chunk"] = point.prefill_chunk or _CHUNK
    demo = replace(point, model="demo", switches=kept, runs=1, warmup=0, cache_length=None, assistance=Assistance())
    prompt = min(point.workload.prompt_length, _LONG)
    short, long = (replace(demo, workload=Workload(1, tokens, 1)) for tokens in (_SHORT, prompt))
    loading = _demo_bytes(short, name) - predict(short, name, base=0).weights
    return Base(loading, _demo_bytes(long, name) - predict(long, name, base=0).nbytes)


def _demo_bytes(demo: Point, name: str) -> int:
    key = (demo.command(), name)
    if key not in _demo_peaks:
        _demo_peaks[key] = int(memory.peaks(demo, name).max_mem_mb * 1e6)
    return _demo_peaks[key]


@cache
def _sizes(model: str, dtype: torch.dtype) -> tuple[LlamaConfig, int]:
    """(configuration, parameters)"""
    found = checkpoint.outline(model, dtype)
    return found.config, found.parameter_count


def predict(point: Point, name: str, base: Base | int | None = None) -> Peak:
    """The peak of contestant `name`. Nothing is loaded or built; raises as `checkpoint.outline` does.

    `base`: as `measured_base` gives it; without it, what this process held when it was first asked.
    """
    own = _without_base(point, name)
    if base is None:
        base = base_bytes() if torch.device(point.device).type == "cpu" else 0
    return replace(own, base=base.beside(own.cache + own.work) if isinstance(base, Base) else base)


def _without_base(point: Point, name: str) -> Peak:
    config, parameters = _sizes(point.model, point.torch_dtype)
    if name == "ours":
        own = _ours(point, config)
        # A draft on another kind of device takes none of this one's memory.
        return _with_draft(point, own) if point.assistance.drafts and not drafting.is_elsewhere(point) else own
    weights = parameters * point.torch_dtype.itemsize
    return Peak(0, weights, *(_static if name == "static" else _vanilla)(point, config))


def _ours(point: Point, config: LlamaConfig) -> Peak:
    device, dtype, work, switches = torch.device(point.device), point.torch_dtype, point.workload, point.config
    formats = (switches.cache_k, switches.cache_v)
    shape = cache_shape(config, work.batch_size, point.positions, dtype, device, *formats)
    tokens = switches.prefill_chunk or automatic_chunk(work.batch_size, work.prompt_length, device.type)
    tokens = min(tokens, work.prompt_length)
    past = work.prompt_length - tokens
    if device.type != "cpu" and switches.cache_device == "cpu":
        # Keys, values and attention are on the CPU, whose memory is not counted here.
        plain = cache_shape(config, work.batch_size, point.positions, dtype, device)
        passing = prefill_bytes(config, plain, tokens, 0, switches.weights)
        return Peak(0, weight_bytes(config, switches.weights, dtype).total, rotary_bytes(plain), passing)
    passing = prefill_bytes(config, shape, tokens, past, switches.weights, switches.products)
    passing *= _HEAP if device.type == "cpu" else 1
    return Peak(0, weight_bytes(config, switches.weights, dtype).total, shape.nbytes + rotary_bytes(shape), passing)


def _with_draft(point: Point, own: Peak) -> Peak:
    """The draft has weights and a cache of its own; target and draft compute in turns."""
    switches = {name: value for name, value in point.switches.items() if name not in ("weights", "cache_k", "cache_v")}
    switches |= {"weights": bits} if (bits := point.assistance.draft_weights) is not None else {}
    model = point.assistance.draft_model(point.model)
    draft = _without_base(replace(point, model=model, switches=switches, assistance=Assistance()), "ours")
    return Peak(0, own.weights + draft.weights, own.cache + draft.cache, max(own.work, draft.work))


def _sizes_of(point: Point, config: LlamaConfig) -> tuple[int, int, float]:
    """(columns of queries, bytes of a position's keys and values, heap factor) of transformers' own model."""
    position = checkpoint.position_bytes(config, point.torch_dtype.itemsize)
    return config.num_attention_heads * head_dim(config), position, _HEAP if point.device == "cpu" else 1


def _passing(point: Point, config: LlamaConfig) -> tuple[int, int]:
    """(tokens of a row in one pass, bytes between its products) of transformers' own model."""
    work, itemsize = point.workload, point.torch_dtype.itemsize
    queries, _, heap = _sizes_of(point, config)
    tokens = min(point.prefill_chunk or work.prompt_length, work.prompt_length)
    heap = min(heap, _WHOLE_HEAP) if tokens == work.prompt_length else heap
    attention = 2 * config.hidden_size + 6 * queries
    mlp = 2 * config.hidden_size + 3 * config.intermediate_size
    logits = work.batch_size * config.vocab_size * (itemsize + 4 * _LOGITS)
    return tokens, int(heap * work.batch_size * tokens * max(attention, mlp) * itemsize) + logits


def _vanilla(point: Point, config: LlamaConfig) -> tuple[int, int]:
    """(cache, work) with the cache that grows."""
    work, itemsize = point.workload, point.torch_dtype.itemsize
    _, position, _ = _sizes_of(point, config)
    tokens, held = _passing(point, config)
    if work.batch_size > 1 or tokens < work.prompt_length:
        # Rows of different length, or a chunk: a mask of tokens x P a row, and as numbers inside the attention.
        held += work.batch_size * tokens * work.prompt_length * (1 + itemsize)
    # The last layer's keys and values are held twice while a token is added to them.
    return int(position * work.batch_size * work.total_length * (1 + 1 / config.num_hidden_layers)), held


def _static(point: Point, config: LlamaConfig) -> tuple[int, int]:
    """(cache, work) with transformers' StaticCache, all of whose positions each pass attends to."""
    work, itemsize, positions = point.workload, point.torch_dtype.itemsize, point.positions
    queries, position, _ = _sizes_of(point, config)
    tokens, held = _passing(point, config)
    mask = work.batch_size * tokens * positions  # of truths, a byte each; each layer makes numbers of it
    repeated = 0
    if config.num_attention_heads != config.num_key_value_heads:  # for each query head, a layer at a time
        repeated = work.batch_size * positions * queries * itemsize
    # While the mask is made there are three of truths, which is no more than this.
    return position * work.batch_size * positions, held + mask * (1 + itemsize) + 2 * repeated


def fit(point: Point, only_memory: bool = False) -> Fit:
    """Whether a point can be measured now: its contestants together, on one copy of the weights where both hold floats,
    or each by itself.

    only_memory: nothing but the subject's peak is measured.
    """
    free = available_bytes(torch.device(point.device))
    if only_memory:
        return Fit(point, predict(point, point.contestants[0]).nbytes, free)
    peaks = [predict(point, name) for name in point.contestants]
    if point.world_size > 1:
        return Fit(point, _together(point, peaks), free)
    weights = peaks[0].weights if point.weights is None else sum(peak.weights for peak in peaks)
    together = weights + sum(peak.cache for peak in peaks) + max(peak.work for peak in peaks)
    # The contestants are gone when each is measured in a process of its own.
    alone = max(peak.nbytes for peak in peaks)
    return Fit(point, max(together, alone), free)


def _together(point: Point, peaks: list[Peak]) -> int:
    """Bytes of contestants that processes hold together: all of it on a CPU, which they share, or each one's part."""
    size = point.world_size
    held = sum(peak.weights + peak.cache for peak in peaks)
    if torch.device(point.device).type == "cpu":
        return held + size * max(peak.base + peak.work for peak in peaks)
    return held // size + max(peak.base + peak.work for peak in peaks)
