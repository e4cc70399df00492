"""How many tokens to propose in the next round, and when to propose none."""

from collections import deque

SCHEDULES = ("constant", "heuristic", "heuristic_transient", "adaptive")
_MEMORY = 7  # timings of each width whose median counts, the lower one of two: what disturbs only adds
_FORGET = 0.9  # of the evidence on acceptance, kept from round to round
_PRIOR = 0.7, 2.0  # acceptance before anything is known, and how many trials it weighs
_FIRST_ROUNDS = 3  # before the first verdict, and before one after each pause
_AFTER_PAUSE = 0.25  # of the evidence on acceptance, kept over a pause: the text may have changed
_PROVEN_ROUNDS = 6  # without a pause, after which the next pause is short again
_FIRST_PAUSE, _LONGEST_PAUSE = 16, 256  # steps without assistance


class Constant:
    """Always `tokens`."""

    switched_off = 0

    def __init__(self, tokens: int):
        self.tokens = tokens

    def next(self, widest: int | None = None) -> int:
        """Tokens to propose; 0 is a step without assistance. `widest`: tokens that one fast step takes, if known."""
        return self.tokens

    def record(self, width: int, target_s: float, drafts: int, draft_s: float, accepted: list[tuple[int, int]]) -> None:
        """A round: the target's step over `width` tokens, the draft's `drafts` steps, (accepted, proposed) a row.

        `drafts` is 0 where the draft did other things too, so that its seconds say nothing about a step.
        """


class Heuristic(Constant):
    """transformers' rule: two more after a round in which all stood, one less after any other."""

    def record(self, width, target_s, drafts, draft_s, accepted):
        if not accepted or max(proposed for _, proposed in accepted) == 0:
            return
        everything = all(stood == proposed for stood, proposed in accepted)
        self.tokens = self.tokens + 2 if everything else max(1, self.tokens - 1)


def expected_tokens(acceptance: float, tokens: int) -> float:
    """Tokens that a round of `tokens` proposals writes where each stands with probability `acceptance`."""
    return sum(acceptance**place for place in range(tokens + 1))


class Adaptive:
    """The number that writes most tokens a second, by the acceptance lately and the costs measured.

    Where even the best is expected to be slower than plain steps, it pauses, each time twice as long, and then tries
    again. Nothing is timed here: costs come in through `record`. `most` is the most it proposes.
    """

    def __init__(self, most: int):
        self.most = most
        self.switched_off = 0
        self.hits, self.trials = _PRIOR[0] * _PRIOR[1], _PRIOR[1]
        self.draft_s: deque[float] = deque(maxlen=_MEMORY)
        self.step_s: dict[int, deque[float]] = {}
        self.pause, self.pause_left, self.rounds = _FIRST_PAUSE, 0, 0

    @property
    def acceptance(self) -> float:
        """Of one proposed token after others that stood."""
        return self.hits / self.trials

    def cost(self, width: int) -> float:
        """Seconds of a step over `width` tokens: measured, or on the line through its measured neighbours."""
        known = sorted(self.step_s)
        if width in self.step_s:
            return _median(self.step_s[width])
        if len(known) < 2:
            return _median(self.step_s[known[0]])
        above = next((place for place, each in enumerate(known) if each > width), len(known) - 1)
        low, high = known[max(above, 1) - 1], known[max(above, 1)]
        at_low, at_high = _median(self.step_s[low]), _median(self.step_s[high])
        # More tokens never take less: noise must not make a wide step look free.
        slope = max(at_high - at_low, 0.0) / (high - low)
        return max(at_low + slope * (width - low), 0.25 * at_low)

    def speed(self, tokens: int) -> float:
        """Expected speed with `tokens` proposals, over that of plain steps."""
        draft_s = tokens * _median(self.draft_s) if self.draft_s else 0.0
        seconds = draft_s + self.cost(tokens + 1)
        return expected_tokens(self.acceptance, tokens) * self.cost(1) / seconds

    def next(self, widest: int | None = None) -> int:
        """As `Constant.next`."""
        most = self.most if widest is None else min(self.most, widest - 1)
        if 1 not in self.step_s or most < 1:  # what a plain step costs is what all is compared with
            return 0
        if self.pause_left:
            self.pause_left -= 1
            return 0
        best = max(range(1, most + 1), key=self.speed)
        if self.rounds >= _FIRST_ROUNDS and self.speed(best) < 1.0:
            self.switched_off += 1
            self.pause_left, self.rounds = self.pause, 0
            self.hits, self.trials = self.hits * _AFTER_PAUSE, self.trials * _AFTER_PAUSE
            self.pause = min(2 * self.pause, _LONGEST_PAUSE)
            return 0
        if self.rounds >= _PROVEN_ROUNDS:
            self.pause = _FIRST_PAUSE
        return best

    def record(self, width: int, target_s: float, drafts: int, draft_s: float, accepted: list[tuple[int, int]]) -> None:
        """As `Constant.record`."""
        self.step_s.setdefault(width, deque(maxlen=_MEMORY)).append(target_s)
        if drafts:
            self.draft_s.append(draft_s / drafts)
        accepted = [(stood, proposed) for stood, proposed in accepted if proposed]
        if not accepted:
            return
        self.rounds += 1
        self.hits, self.trials = self.hits * _FORGET, self.trials * _FORGET
        self.hits += sum(stood for stood, _ in accepted)
        self.trials += sum(min(stood + 1, proposed) for stood, proposed in accepted)


def _median(values: deque[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2]
