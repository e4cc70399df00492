"""Whether a draft's prompt is worth reading: what that took before, against what a call can save."""

from collections import deque

_MEMORY = 7  # timings of prompts of about one length, the lower median of which counts: what disturbs only adds
_MOST_DECLINED = 16  # calls in a row


class Starts:
    """Seconds that a proposer took to read prompts, by their length, and how often it was not worth that of late."""

    def __init__(self):
        self.seconds: dict[int, deque[float]] = {}  # a token, by the length's power of two
        self.declined, self.patience = 0, 1  # calls

    def took(self, tokens: int, seconds: float) -> None:
        """A prompt of so many tokens was read."""
        self.seconds.setdefault(tokens.bit_length(), deque(maxlen=_MEMORY)).append(seconds / tokens)

    def cost(self, tokens: int) -> float:
        """Seconds that so many tokens will take, by what lengths nearest to them took; 0 where nothing is known.

        A single timing says nothing: a first prompt also packs the weights and makes the cache.
        """
        lengths = [length for length, known in self.seconds.items() if len(known) > 1]
        if not lengths:
            return 0.0
        nearest = min(lengths, key=lambda length: abs(length - tokens.bit_length()))
        known = sorted(self.seconds[nearest])
        return tokens * known[(len(known) - 1) // 2]

    def worth(self, tokens: int, saved: float) -> bool:
        """Whether a call that would save so many seconds should start; one that should not tries, ever less often."""
        if saved >= self.cost(tokens):
            self.declined, self.patience = 0, 1
            return True
        if self.declined >= self.patience:
            self.declined, self.patience = 0, min(2 * self.patience, _MOST_DECLINED)
            return True
        self.declined += 1
        return False
