"""Row: a prompt and what has been written to it."""

import torch

from fastllama.decode.many.result import Generated
from fastllama.decode.many.rules import Rules


class Row:
    """`index`: which prompt it is. `slot`: its row of the cache, of which the first `filled` positions hold tokens."""

    def __init__(self, index: int, prompt: list[int], rules: Rules):
        self.index, self.ids, self.rules = index, list(prompt), rules
        self.prompt_tokens = len(prompt)
        self.slot = self.filled = 0
        self.finish: str | None = None

    @property
    def positions(self) -> int:
        """Cache positions that it needs at most: the last new token is never stored."""
        return self.prompt_tokens + self.rules.most_new - 1

    @property
    def missing(self) -> int:
        """Tokens of the prompt that are not in the cache."""
        return self.prompt_tokens - self.filled

    @property
    def new(self) -> list[int]:
        return self.ids[self.prompt_tokens :]

    def as_tensor(self, device: torch.device) -> torch.Tensor:
        """Prompt and new ids [1, T], as processors and criteria take them."""
        return torch.tensor([self.ids], device=device)

    def add(self, token: int, device: torch.device) -> None:
        """Appends a token, and finds out whether it is the last."""
        self.ids.append(token)
        if token in self.rules.eos:
            self.finish = "eos"
        elif len(self.ids) - self.prompt_tokens >= self.rules.most_new:
            self.finish = "length"
        elif self.rules.criteria:
            ids_1T = self.as_tensor(device)
            if any(bool(criterion(ids_1T, None).any()) for criterion in self.rules.criteria):
                self.finish = "stop"

    def result(self) -> Generated:
        return Generated(self.index, tuple(self.new), self.finish, self.prompt_tokens)
