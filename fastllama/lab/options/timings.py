"""Timings: where a run's milliseconds went, as llama.cpp prints them."""

import time
from dataclasses import dataclass, field

import torch

from fastllama.lab.measuring.contestant import synchronize

PHASES = ("sample", "prompt_eval", "eval")
_WORDS = {
    "sample": ("sample time", "runs  "),
    "prompt_eval": ("prompt eval time", "tokens"),
    "eval": ("eval time", "runs"),
}


@dataclass
class Timings:
    """Milliseconds, and of how many tokens, by phase; a phase that was not told apart is not there."""

    load_ms: float
    total_ms: float = 0.0
    total_tokens: int = 0
    phases: dict[str, tuple[float, int]] = field(default_factory=dict)

    def as_dict(self) -> dict:
        """JSON-ready: load_ms, total_ms, and for each phase its ms, count, ms a token, tokens a second."""
        found: dict[str, float | None] = {
            "load_ms": self.load_ms,
            "total_ms": self.total_ms,
            "total_count": self.total_tokens,
        }
        for name in (*PHASES, "total"):
            if name == "total":
                ms, count = self.total_ms, self.total_tokens
            elif name in self.phases:
                ms, count = self.phases[name]
            else:
                continue
            found |= {f"{name}_ms": ms, f"{name}_count": count}
            found |= {f"{name}_ms_per_token": ms / count if count else None}
            found |= {f"{name}_tok_per_s": 1000 * count / ms if ms else None}
        return found

    def lines(self) -> list[str]:
        """llama.cpp's lines. The total is the run's, from its prompt to its last token, without loading."""
        said = [f"{'load time':>18} = {self.load_ms:10.2f} ms"]
        for name in PHASES:
            words, unit = _WORDS[name]
            if name not in self.phases:
                said.append(f"{words:>18} = not told apart from the others in this run")
                continue
            ms, count = self.phases[name]
            rates = (
                f" ({ms / count:8.2f} ms per token, {1000 * count / ms:8.2f} tokens per second)" if count and ms else ""
            )
            said.append(f"{words:>18} = {ms:10.2f} ms / {count:5} {unit.strip()}{rates}")
        return [*said, f"{'total time':>18} = {self.total_ms:10.2f} ms / {self.total_tokens:5} tokens"]


class Stopwatch:
    """Adds up phases: a lap is what passed since the last one, the device's work included."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        synchronize(device)
        self.start = self._last = time.perf_counter()

    def lap(self, phase: str, count: int = 1) -> None:
        """What passed since the last lap belongs to `phase`, and was for `count` tokens."""
        synchronize(self.device)
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self.counts[phase] = self.counts.get(phase, 0) + count
        self._last = now

    def timings(self, load_ms: float, tokens: int) -> Timings:
        """The whole; every phase that a lap was of."""
        synchronize(self.device)
        total = 1000 * (time.perf_counter() - self.start)
        phases = {name: (1000 * self.seconds[name], self.counts[name]) for name in PHASES if name in self.seconds}
        return Timings(load_ms, total, tokens, phases)
