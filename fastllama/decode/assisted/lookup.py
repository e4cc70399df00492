"""Prompt lookup: proposes what followed the newest n-gram where it stood before.

After Saxena's prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding).
"""

_CANDIDATES = 16  # earlier places that are compared, the newest first
_FURTHER = 32  # tokens before the n-gram that are compared


class NGrams:
    """One row's tokens, and where each of its n-grams of 1 to `longest` tokens ended before."""

    def __init__(self, tokens: list[int], longest: int):
        self.tokens: list[int] = []
        self.longest = longest
        self._ends: dict[tuple[int, ...], list[int]] = {}
        self.extend(tokens)

    def extend(self, tokens: list[int]) -> None:
        """Appends tokens. An n-gram becomes known once something follows it."""
        for token in tokens:
            count = len(self.tokens)
            for n in range(1, min(self.longest, count) + 1):
                self._ends.setdefault(tuple(self.tokens[count - n :]), []).append(count)
            self.tokens.append(token)

    def propose(self, most: int) -> tuple[list[int], int]:
        """Up to `most` tokens that followed an earlier place, and for how many tokens the texts before it agree; none,
        and 0, where the newest token is new.

        The longest n-gram wins, then the place whose text before it agrees longest, then the newest. A continuation
        that reaches the end of the text goes on with itself: what repeats is proposed as repeating.
        """
        tokens, count = self.tokens, len(self.tokens)
        for n in range(min(self.longest, count - 1), 0, -1):
            ends = self._ends.get(tuple(tokens[count - n :]))
            if ends is None:
                continue
            agreed, best = max((self._agreement(end, n), end) for end in ends[-_CANDIDATES:])
            period = count - best
            return [tokens[best + place % period] for place in range(most)], agreed
        return [], 0

    def _agreement(self, end: int, n: int) -> int:
        tokens, count = self.tokens, len(self.tokens)
        agreed = n
        while agreed < n + _FURTHER and agreed < end and tokens[end - 1 - agreed] == tokens[count - 1 - agreed]:
            agreed += 1
        return agreed
