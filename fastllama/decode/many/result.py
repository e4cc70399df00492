"""What became of one of many prompts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Generated:
    """What `generate_many` made of prompt number `index`, from 0, which has `prompt_tokens` tokens.

    `ids`: the new tokens, an end of text among them. `finish`: "eos", "length", "stop" (a stopping criterion of the
    caller's) or "error", with the reason in `error`, which is None otherwise.
    """

    index: int
    ids: tuple[int, ...]
    finish: str
    prompt_tokens: int
    error: str | None = None

    @property
    def new_tokens(self) -> int:
        """How many tokens are new."""
        return len(self.ids)
