"""Timings of a generation, in llama.cpp's terms."""

import time
from dataclasses import dataclass, field


@dataclass
class Timings:
    """Seconds: of loading, and of each answer's parts. The first token ends the evaluation of the prompt.

    Choosing a token is told apart from evaluating where it can be: `sample_tokens` is 0 where it cannot, as with a
    draft, whose tokens are chosen while they are checked.
    """

    load_s: float = 0.0
    begun: float = field(default_factory=time.perf_counter)
    prompt_s: float = 0.0
    prompt_tokens: int = 0
    eval_s: float = 0.0
    eval_tokens: int = 0
    whole_s: float = 0.0
    whole_tokens: int = 0
    sample_s: float = 0.0
    sample_tokens: int = 0
    _chosen_s: float = 0.0  # since the last token
    _last: float = 0.0
    _is_first: bool = True

    def loaded(self) -> None:
        """The model is there."""
        self.load_s = time.perf_counter() - self.begun

    def start(self, prompt_tokens: int) -> None:
        """An answer begins; so many tokens are new to the cache."""
        self.prompt_tokens += prompt_tokens
        self._last, self._is_first, self._chosen_s = time.perf_counter(), True, 0.0

    def chosen(self, seconds: float, tokens: int = 1) -> None:
        """So long did it take to choose what comes next."""
        self.sample_s += seconds
        self.sample_tokens += tokens
        self._chosen_s += seconds

    def token(self) -> None:
        """A token is there."""
        now = time.perf_counter()
        passed = now - self._last - self._chosen_s
        if self._is_first:
            self.prompt_s += passed
        else:
            self.eval_s += passed
            self.eval_tokens += 1
        self._last, self._is_first, self._chosen_s = now, False, 0.0

    def whole(self, tokens: int) -> None:
        """A generation of which no single token was seen has ended."""
        self.whole_s += time.perf_counter() - self._last - self._chosen_s
        self.whole_tokens += tokens

    def figures(self) -> dict:
        """By name with unit."""
        parts = {"prompt_eval_ms": 1e3 * self.prompt_s, "prompt_tokens": self.prompt_tokens}
        parts |= {"eval_ms": 1e3 * self.eval_s, "eval_tokens": self.eval_tokens}
        if self.whole_tokens:
            parts = {"generate_ms": 1e3 * self.whole_s, "generated_tokens": self.whole_tokens}
        if self.sample_tokens:
            parts = {"sample_ms": 1e3 * self.sample_s, "sample_tokens": self.sample_tokens, **parts}
        total = time.perf_counter() - self.begun
        return {"load_ms": 1e3 * self.load_s, **parts, "total_ms": 1e3 * total}

    def lines(self) -> list[str]:
        """For people."""
        found = self.figures()
        lines = [f"{'load':<12} {found['load_ms']:10,.1f} ms"]
        if not self.sample_tokens:
            lines.append(f"{'sample':<12} not told apart from the rest of this run")
        for name, ms, tokens in (
            ("sample", "sample_ms", "sample_tokens"),
            ("prompt eval", "prompt_eval_ms", "prompt_tokens"),
            ("eval", "eval_ms", "eval_tokens"),
            ("generate", "generate_ms", "generated_tokens"),
        ):
            lines += [_rate(name, found[ms], found[tokens])] if found.get(tokens) else []
        return [*lines, f"{'total':<12} {found['total_ms']:10,.1f} ms"]


def _rate(name: str, ms: float, tokens: int) -> str:
    each = f", {ms / tokens:,.2f} ms/token, {1e3 * tokens / ms:,.1f} tok/s" if ms and tokens else ""
    return f"{name:<12} {ms:10,.1f} ms, {tokens} {'token' if tokens == 1 else 'tokens'}{each}"
