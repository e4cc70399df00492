"""What an assisted call did."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Assisted:
    """Counts and seconds of one `generate` call; rows of a batch count together.

    `mode`: draft, lookup, or tree, a draft whose branches split. `target_forwards` counts the prefill, whose seconds
    are in `prefill_s` with the draft's own (`draft_prefill_s`); `draft_s` and `target_s` are the rounds after it.
    `accepted_tokens` of the `draft_tokens` proposed, by `draft_forwards` passes, stand in the text, of whose
    `new_tokens` the others are the target's. `switched_off`: how often assistance switched itself off because it would
    not pay. `shares_cache`: the draft is the target in fewer bits and went on from its keys and values.
    """

    mode: str
    new_tokens: int
    draft_tokens: int
    accepted_tokens: int
    target_forwards: int
    draft_forwards: int
    prefill_s: float
    draft_s: float
    target_s: float
    switched_off: int
    shares_cache: bool = False
    draft_prefill_s: float = 0.0

    @property
    def acceptance(self) -> float | None:
        """Accepted over proposed; None where nothing was proposed."""
        return self.accepted_tokens / self.draft_tokens if self.draft_tokens else None

    @property
    def tokens_per_target_forward(self) -> float:
        """New tokens of all rows over forward passes of the target."""
        return self.new_tokens / self.target_forwards


@dataclass
class Tally:
    """The same, while it is being counted."""

    draft_tokens: int = 0
    accepted_tokens: int = 0
    target_forwards: int = 0
    draft_forwards: int = 0
    prefill_s: float = 0.0
    draft_s: float = 0.0
    target_s: float = 0.0
    draft_prefill_s: float = 0.0

    def report(self, mode: str, new_tokens: int, switched_off: int, shares_cache: bool) -> Assisted:
        return Assisted(
            mode=mode, new_tokens=new_tokens, switched_off=switched_off, shares_cache=shares_cache, **vars(self)
        )
