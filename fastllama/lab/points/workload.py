"""What is asked, independent of how it is done: sizes and prompts of real text.

B batch, P prompt tokens (of the longest row)
"""

import hashlib
import random
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fastllama.demo.text import held_out_text
from fastllama.lab.points.sampler import Sampler


@dataclass(frozen=True)
class Workload:
    """Sizes in rows and tokens; `seed` places the prompts and begins the draws. `ValueError` on a size below one."""

    batch_size: int = 1
    prompt_length: int = 1000
    new_tokens: int = 200
    seed: int = 0
    prompt_file: str | None = None
    sampler: Sampler = field(default_factory=Sampler)

    def __post_init__(self):
        for name in ("batch_size", "prompt_length", "new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    @classmethod
    def from_dict(cls, values: dict) -> "Workload":
        """The workload that `asdict` was taken of."""
        return cls(**{**values, "sampler": Sampler(**values["sampler"])})

    @property
    def total_length(self) -> int:
        """Cache positions that the longest row needs."""
        return self.prompt_length + self.new_tokens


@dataclass(frozen=True)
class Prompt:
    """Left-padded ids and mask, both int64 [B, P] on the CPU."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor

    @property
    def lengths(self) -> list[int]:
        """Real tokens of each row."""
        return self.attention_mask.sum(-1).tolist()


def row_lengths(workload: Workload) -> list[int]:
    """Row 0 has the full prompt; each other row its own length, at least half of it.

    Lengths are drawn per row from (seed, row), so a larger batch starts with the smaller one's rows. They
    differ as long as the half that they are drawn from has lengths left.
    """
    longest = workload.prompt_length
    free = list(range((longest + 1) // 2, longest))
    lengths = [longest]
    for row in range(1, workload.batch_size):
        if not free:
            free = list(range((longest + 1) // 2, longest)) or [longest]
        lengths.append(free.pop(random.Random(f"length {workload.seed} {row}").randrange(len(free))))
    return lengths


def source_text(workload: Workload) -> str:
    """The text that prompts are cut from. Raises `FileNotFoundError` or `ValueError` naming the prompt file."""
    return held_out_text() if workload.prompt_file is None else read_text(workload.prompt_file, "prompt file")


def read_text(file: str | Path, kind: str) -> str:
    """The content of a file, which messages call a `kind`. Raises `FileNotFoundError`, or `ValueError` if not UTF-8."""
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {kind} {path}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"the {kind} {path} is not UTF-8 text") from None


def begin_ids(tokenizer) -> list[int]:
    """What the tokenizer puts before a text: one id, or none."""
    return [tokenizer.bos_token_id] if tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] else []


# By tokenizer and text: half a second of a long text, for each point of a sweep.
_encoded: dict[tuple[str, str], torch.Tensor] = {}
_KEPT = 4


def _sha256(words: str) -> str:
    return hashlib.sha256(words.encode()).hexdigest()


def encoded(tokenizer, text: str) -> list[int]:
    """The text's ids, with nothing put before it; a long text is encoded once in a process."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # what says all of what it does
    key = None if backend is None else (_sha256(backend.to_str()), _sha256(text))
    found = None if key is None else _encoded.get(key)
    if found is None:
        found = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.int32)
        if key is not None:
            if len(_encoded) == _KEPT:
                _encoded.clear()
            _encoded[key] = found
    return found.tolist()


def pad_id(tokenizer) -> int:
    """The id that left padding is made of."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0


def prompt(workload: Workload, tokenizer) -> Prompt:
    """Rows of consecutive text from different seeded places, each begun as the tokenizer begins a text.

    A prompt longer than the held-out text (about 100,000 of the demo's tokens) starts the text over, as often as it
    takes. Raises `ValueError` when a prompt file has fewer tokens than the longest row.
    """
    tokens = encoded(tokenizer, source_text(workload))
    begin = begin_ids(tokenizer)
    lengths = row_lengths(workload)
    if workload.prompt_file is None:
        tokens *= -(-workload.prompt_length // len(tokens))
    if len(begin) + len(tokens) < workload.prompt_length:
        raise ValueError(
            f"the prompt file {workload.prompt_file} has {len(tokens)} tokens and the prompt needs "
            f"{workload.prompt_length}"
        )
    input_ids = torch.full((workload.batch_size, workload.prompt_length), pad_id(tokenizer), dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, length in enumerate(lengths):
        taken = max(length - len(begin), 0)
        start = random.Random(f"offset {workload.seed} {row}").randrange(len(tokens) - taken + 1)
        input_ids[row, -length:] = torch.tensor(begin[:length] + tokens[start : start + taken])
        attention_mask[row, -length:] = 1
    return Prompt(input_ids, attention_mask)
