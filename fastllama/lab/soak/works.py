"""What a soak runs again and again: reservations, and short generations of every kind in each of them.

Legend: B batch, N new tokens.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastllama import Sampling
from fastllama.lab.prompts.parallel_texts import REQUESTS, SYSTEM

ROWS, POSITIONS = 4, 160  # of every reservation
# None: what generate reserves by itself.
RESERVATIONS: dict[str, dict | None] = {
    "on first use": None,
    "native": {"compile": "native"},
    "stock": {"products": "stock"},
    "packed": {"products": "packed"},
    "small caches": {"compile": "native", "cache_k": "int8", "cache_v": "q8_0"},
}
LOSSY = ("small caches",)


@dataclass(frozen=True)
class Kit:
    """What works are made of. `prompts`: token ids of texts of different length."""

    prompts: list[list[int]]
    pad: int
    draft: torch.nn.Module | None


@dataclass(frozen=True)
class Work:
    """`run(model, kit)` gives new ids [B, N]. `reference`, where vanilla has it, the same ids from a plain model."""

    name: str
    run: Callable
    reference: Callable | None = None


def kit(tokenizer, pad: int, draft) -> Kit:
    """Prompts of 3 to about 100 tokens."""
    texts = [*REQUESTS[:6], "\n".join(SYSTEM.splitlines()[:6]), "\n".join(SYSTEM.splitlines()[4:16])]
    return Kit([tokenizer(text, verbose=False).input_ids[:100] for text in texts], pad, draft)


def _rows(model, kit: Kit, which: tuple[int, ...]) -> dict:
    """The prompts as a batch, padded on the left."""
    rows = [kit.prompts[index] for index in which]
    width = max(map(len, rows))
    ids = [[kit.pad] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {name: torch.tensor(x, device=model.device) for name, x in (("input_ids", ids), ("attention_mask", mask))}


def _generate(model, kit: Kit, which: tuple[int, ...], new: int, seed: int | None = None, **asked) -> torch.Tensor:
    inputs = _rows(model, kit, which)
    asked = {"max_new_tokens": new, "min_new_tokens": new, **asked}
    if "sampling" not in asked:
        asked["do_sample"] = seed is not None
    if seed is not None:
        torch.manual_seed(seed)
    return model.generate(**inputs, **asked)[:, inputs["input_ids"].shape[1] :]


def _work(name: str, which: tuple[int, ...], new: int, seed: int | None = None, plain: bool = True, **asked) -> Work:
    def run(model, kit: Kit) -> torch.Tensor:
        return _generate(model, kit, which, new, seed, **asked)

    return Work(name, run, run if plain else None)


def _greedy(which: tuple[int, ...], new: int) -> Callable:
    return lambda model, kit: _generate(model, kit, which, new)


def _assisted(name: str, which: tuple[int, ...], new: int, **asked) -> Work:
    def run(model, kit: Kit) -> torch.Tensor:
        return _generate(model, kit, which, new, assistant_model=kit.draft, **asked)

    return Work(name, run, _greedy(which, new))


def _together(rows: list) -> torch.Tensor:
    """Rows of different length as [B, N], filled up with -1."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows])


_LIMITS = (3, 8, 5, 2, 6)


def _many(model, kit: Kit) -> torch.Tensor:
    prompts = kit.prompts[: len(_LIMITS)]
    results = model.generate_many(prompts, slots=2, max_new_tokens=list(_LIMITS), chunk=16, do_sample=False)
    return _together([result.ids for result in results])


def _one_by_one(model, kit: Kit) -> torch.Tensor:
    texts = []
    for index, new in enumerate(_LIMITS):
        inputs = _rows(model, kit, (index,))
        ids = model.generate(**inputs, max_new_tokens=new, do_sample=False)
        texts.append(ids[0, inputs["input_ids"].shape[1] :].tolist())
    return _together(texts)


def _own_loop(model, kit: Kit) -> torch.Tensor:
    inputs = _rows(model, kit, (1, 4))
    chosen = [model.prefill(**inputs).argmax(-1)]
    for _ in range(3):
        chosen.append(model.step(chosen[-1][:, None])[:, -1].argmax(-1))
    return torch.stack(chosen, 1)


class _Stop(Exception):
    pass


class _Cutter:
    """A streamer that ends a generation in the middle."""

    def __init__(self):
        self.ids = []

    def put(self, ids: torch.Tensor) -> None:
        self.ids.append(ids.reshape(-1))
        if len(self.ids) == 4:  # the prompt and three tokens
            raise _Stop

    def end(self) -> None:
        """Nothing is kept back."""


def _cut(model, kit: Kit) -> torch.Tensor:
    cutter = _Cutter()
    with contextlib.suppress(_Stop):
        _generate(model, kit, (3,), 8, streamer=cutter)
    return torch.stack(cutter.ids[1:], 1)


WORKS = (
    _work("greedy, a row", (0,), 6),
    _work("greedy, a longer prompt", (7,), 5),
    _work("greedy, padded rows", (2, 6, 5), 4),
    _work("drawn", (3, 1), 6, seed=7, top_k=40, temperature=0.8),
    _work("drawn by row", (3, 1), 5, plain=False, sampling=Sampling(temperature=0.8, top_p=0.9, seed=(3, 4))),
    _work("mirostat", (4,), 5, plain=False, sampling=Sampling.llama_cpp(mirostat=2, seed=9)),
    _work("penalised", (6,), 6, repetition_penalty=1.2),
    _work("beams", (5,), 3, num_beams=2),
    _work("by lookup", (7,), 8, prompt_lookup_num_tokens=4),
    Work("many", _many, _one_by_one),
    Work("prefill and step", _own_loop, _greedy((1, 4), 4)),
    Work("cut short", _cut, _greedy((3,), 3)),
)
ASSISTED = (
    _assisted("drafted", (2, 0), 8, num_assistant_tokens=3),
    _assisted("drafted as a tree", (6,), 7, num_assistant_tokens=3, p_split=0.1, draft_branches=3),
)
