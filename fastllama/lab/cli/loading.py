"""Loading: the prompt's ids, how long the cache is for them, and the model reserved for both."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fastllama.decode.context.choose import shifts
from fastllama.lab.cli.run import INTERACTIVE_LENGTH, NEW_TOKENS
from fastllama.lab.cli.settings import Settings, in_typed_words
from fastllama.lab.measuring import checkpoint, contestant, drafting
from fastllama.lab.measuring.checkpoint import Checkpoint
from fastllama.lab.points import workload
from fastllama.lab.points.point import DTYPES, Point
from fastllama.lab.points.workload import Workload


@dataclass(frozen=True)
class Place:
    """Which checkpoint, as what numbers, and where it will run."""

    found: Checkpoint
    dtype: str
    device: str
    tokenizer: Any

    @property
    def longest(self) -> int:
        """Positions that the model was made for."""
        return self.found.config.max_position_embeddings


@dataclass(frozen=True)
class Loaded:
    """A model that is ready, and arguments of `generate` for its draft."""

    model: torch.nn.Module
    eos: tuple[int, ...]
    cache_length: int
    assistance: dict


def find(settings: Settings, say: Callable[[str], None]) -> Place:
    """The checkpoint, looked at and not loaded. Raises `ValueError` or `OSError` in one sentence."""
    run = settings.run
    device = checkpoint.auto_device() if run.device == "auto" else checkpoint.check_device(run.device)
    if run.no_kv_offload and torch.device(device).type == "cpu":
        say(f"warning: {settings.parsed.name('no_kv_offload')} has no effect: weights and cache are on the CPU")
    dtype = checkpoint.auto_dtype(run.model, device) if run.dtype == "auto" else run.dtype
    found = checkpoint.find(run.model, DTYPES[dtype])
    return Place(found, dtype, device, checkpoint.tokenizer(found))


def lengths(settings: Settings, place: Place, prompt: int) -> tuple[int, int | None]:
    """(positions to reserve, new tokens at most) behind a prompt of so many tokens; None: no end of them.

    Raises `ValueError` where they do not fit.
    """
    run, named = settings.run, settings.parsed.name
    new, shifting = run.new_tokens, shifts(settings.config)
    reserved = place.longest if run.cache_length == 0 else run.cache_length
    if reserved is None:
        if run.interactive:
            reserved = min(place.longest, INTERACTIVE_LENGTH)
        elif new < 0:
            reserved = min(place.longest, max(INTERACTIVE_LENGTH, prompt + NEW_TOKENS))
        else:
            reserved = max(min(prompt + new, place.longest), prompt + 1) if shifting else prompt + new
    if run.interactive:
        return reserved, None if new == -1 else new if new > 0 else reserved
    if prompt >= reserved:
        raise ValueError(
            f"a cache of {reserved} positions ({named('cache_length')}) is too short for a prompt of {prompt} tokens "
            "and a new one"
        )
    if new == -1 and shifting:
        return reserved, None
    room = reserved - prompt
    if new < 0 or (run.n_predict is None and not shifting):
        return reserved, room if new < 0 else min(new, room)
    if new > room and not shifting:
        raise ValueError(
            f"a cache of {reserved} positions ({named('cache_length')}) is too short for a prompt of {prompt} and "
            f"{new} new tokens ({named('n_predict')}): --context-shift goes on when it is full"
        )
    return reserved, new


def load(settings: Settings, place: Place, rows: int, prompt: int, reserved: int, new: int | None) -> Loaded:
    """The model and its draft, reserved for `rows` texts. Raises `ValueError`, `OSError` or `MemoryError`."""
    new = min(reserved - prompt if new is None else new, reserved - prompt)
    offloads = settings.run.no_kv_offload and torch.device(place.device).type != "cpu"
    with _named(settings):
        point = Point(
            settings.run.model,
            place.dtype,
            place.device,
            Workload(rows, prompt, new),
            preallocate=True,
            switches=settings.switches | ({"cache_device": "cpu"} if offloads else {}),
            cache_length=reserved,
            assistance=settings.assistance,
        )
        drafting.require_match(point, place.tokenizer)
        if point.weights is None:
            checkpoint.require_room(place.found, point)
        ours = contestant.load_alone(point, place.found, "ours", workload.pad_id(place.tokenizer))
    eos = ours.model.generation_config.eos_token_id
    eos = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    return Loaded(ours.model, eos, reserved, ours.assistance)


@contextmanager
def _named(settings: Settings):
    """Names fields in messages as the command line does."""
    try:
        yield
    except ValueError as fault:
        raise ValueError(in_typed_words(str(fault), settings.parsed, "config")) from fault
