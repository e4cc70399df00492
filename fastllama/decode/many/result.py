"""What became of one of many prompts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Generated:
    """`ids`: the new tokens, an end of text among them.

    `finish`: "eos", "length", "stop" (a stopping criterion of the caller's) or "error", with the reason in `error`.
    """

    index: int
    ids: tuple[int, ...]
    finish: str
    prompt_tokens: int
    error: str | None = None

    @property
    def new_tokens(self) -> int:
        return len(self.ids)
