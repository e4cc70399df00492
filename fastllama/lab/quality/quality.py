"""Quality: a reference's logits over a text, and what the same positions give on our fast path with its cache.

T positions, V vocabulary, P prompts, N new tokens
"""

import functools
import gc
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch

from fastllama import demo
from fastllama.cache.budget import available_bytes
from fastllama.decode.context.choose import shifts
from fastllama.lab.measuring import checkpoint, contestant, parity
from fastllama.lab.measuring.checkpoint import Checkpoint
from fastllama.lab.measuring.contestant import Contestant
from fastllama.lab.measuring.parity import Divergence
from fastllama.lab.points import workload
from fastllama.lab.points.point import Point
from fastllama.lab.points.workload import Prompt, Workload
from fastllama.lab.quality import windows
from fastllama.lab.quality.score import Score, compare_logits, summarise
from fastllama.lab.quality.windows import Text, Window

WINDOW = 1024
# Tokens a step: as many as the native step and the product of few rows take, since those are what decodes.
STEP_TOKENS = 16
# Of a measured point: floating-point operations that each of the two models may take, and the positions within which
# that has to end. The demo is scored on 4,096, a model of a billion parameters on 1,024 in about a minute on two cores.
_OPERATIONS, _LEAST, _MOST = 2e12, 1024, 4096


@dataclass(frozen=True)
class Greedy:
    """What greedy decoding gives after each prompt: ids int64 [P, N], and top-1 minus top-2 before each [P, N]."""

    ids: torch.Tensor
    margins: torch.Tensor


@dataclass(frozen=True)
class Reference:
    """logits: of each window's predicted positions, fp32 [T, V] each, on the CPU."""

    text: Text
    logits: list[torch.Tensor]
    greedy: Greedy | None


def _vanilla_logits(model, window: Window) -> torch.Tensor:
    ids_1T = window.ids[None, :-1].to(model.device)
    return model(input_ids=ids_1T, use_cache=False, logits_to_keep=len(window.targets)).logits[0]


def _our_logits(model, window: Window, step_tokens: int) -> torch.Tensor:
    """A prefill up to the first token that is predicted, then steps: both read and write the cache."""
    ids_1T = window.ids[None].to(model.device)
    parts = [model.prefill(ids_1T[:, : window.first])]
    for start in range(window.first, len(window.ids) - 1, step_tokens):
        parts.append(model.step(ids_1T[:, start : min(start + step_tokens, len(window.ids) - 1)])[0])
    return torch.cat(parts)


@torch.no_grad()
def logits(model: Contestant, window: Window, step_tokens: int = STEP_TOKENS) -> torch.Tensor:
    """[T, V] of a window's predicted positions, in the model's dtype and on its device; ours by prefill and steps."""
    if model.name == "ours":
        return _our_logits(model.model, window, step_tokens)
    return _vanilla_logits(model.model, window)


@torch.no_grad()
def greedy(model: Contestant, prompts: Prompt, new_tokens: int) -> Greedy:
    """One prompt at a time, so that no padding takes part."""
    ids, margins = [], []
    for row_T, length in zip(prompts.input_ids, prompts.lengths, strict=True):
        ids_1T = row_T[None, -length:].to(model.model.device)
        out = model.model.generate(
            input_ids=ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            return_dict_in_generate=True,
            output_scores=True,
        )
        ids.append(out.sequences[0, length:].cpu())
        margins.append(torch.tensor([parity.top_margin(scores_1V[0]) for scores_1V in out.scores]))
    return Greedy(torch.stack(ids), torch.stack(margins))


def first_divergence(subject: Greedy, reference: Greedy) -> tuple[int, Divergence | None]:
    """(prompts whose ids are the same to the end, the earliest divergence of the others)."""
    firsts = parity.first_differences(subject.ids, reference.ids)
    same = len(reference.ids) - len(firsts)
    if not firsts:
        return same, None
    row, position = firsts[0]
    return same, Divergence(row, position, reference.margins[row, position].item())


def point(model: str, dtype: str, device: str, positions: int, switches: dict | None = None) -> Point:
    """One row with so many positions: ours with these switches, or vanilla where they are None."""
    work = Workload(1, 1, max(positions - 1, 1))
    return Point(model, dtype, device, work, switches is not None, switches or {})


@contextmanager
def loaded(point: Point, found: Checkpoint):
    """The point's contestant, which gives back what it took."""
    pad = workload.pad_id(checkpoint.tokenizer(found))
    model = contestant.load_alone(point, found, point.contestants[0], pad)
    try:
        yield model
    finally:
        if model.name == "ours":
            model.model.free()
        del model
        gc.collect()


def require_room(found: Checkpoint, dtype: torch.dtype, positions: int, device: torch.device) -> None:
    """Raises `MemoryError` before any work if a reference's weights and logits cannot fit."""
    weights = found.parameter_count * dtype.itemsize
    kept = 4 * positions * found.config.vocab_size
    free, main = available_bytes(device), available_bytes(torch.device("cpu"))
    need = weights + kept if device.type == "cpu" else weights
    if need > free or kept > main:
        raise MemoryError(
            f"the reference takes {weights / 1e9:.1f} GB of weights and {kept / 1e9:.1f} GB for the logits of "
            f"{positions} positions, and {min(free, main) / 1e9:.1f} GB are free: score fewer tokens or a smaller model"
        )


def make_reference(
    point: Point, found: Checkpoint, text: Text, prompts: Prompt | None = None, new_tokens: int = 0
) -> Reference:
    """Loads the point's contestant, takes its logits, and lets it go."""
    require_room(found, point.torch_dtype, text.positions, torch.device(point.device))
    with loaded(point, found) as model:
        kept = [logits(model, window).float().cpu() for window in text.windows]
        return Reference(text, kept, None if prompts is None else greedy(model, prompts, new_tokens))


def compare(subject: Contestant, reference: Reference, step_tokens: int = STEP_TOKENS) -> Score:
    """The subject's score. Raises `ValueError` where its logits are not finite."""
    parts = []
    for window, reference_TV in zip(reference.text.windows, reference.logits, strict=True):
        subject_TV = logits(subject, window, step_tokens)
        device = subject_TV.device
        parts.append(compare_logits(subject_TV, reference_TV.to(device), window.targets.to(device)))
    return summarise(parts)


# of measured points


def tokens_of(parameters: int) -> int:
    """How many tokens of the held-out text a measured point of a model of that size is scored on."""
    affordable = int(_OPERATIONS / (2 * parameters)) // _LEAST * _LEAST
    return min(max(affordable, _LEAST), _MOST)


@functools.lru_cache(maxsize=1)  # the points of a sweep have one reference
def _reference_of(place: str, model: str, dtype: str, device: str) -> Reference:
    found = checkpoint.find(model, Point(model, dtype, device, Workload()).torch_dtype)
    length = min(WINDOW, found.config.max_position_embeddings)
    text = windows.text(checkpoint.tokenizer(found), tokens_of(found.parameter_count), length)
    return make_reference(point(model, "fp32", device, length), found, text)


def of_point(measured: Point, found: Checkpoint) -> tuple[dict | None, str | None]:
    """(the score of a lossy point against vanilla in fp32, None) or (None, why there is none).

    On the start of the held-out text, as much as `tokens_of` says. Of `compile` only "native" counts: what else it
    may be would be compiled anew here, for the same numbers.
    """
    if demo.is_random(measured.model):
        return None, "random weights say nothing about quality"
    if shifts(measured.config):
        return None, "windows of a text never fill the cache: python -m fastllama.lab context scores context_shift"
    switches = {**measured.switches, "compile": "native" if measured.compile == "native" else "no"}
    try:
        reference = _reference_of(found.place, measured.model, measured.dtype, measured.device)
        subject = point(measured.model, measured.dtype, measured.device, reference.text.window, switches)
        with loaded(subject, found) as model:
            return asdict(compare(model, reference)), None
    except (ValueError, MemoryError) as fault:
        return None, str(fault)
