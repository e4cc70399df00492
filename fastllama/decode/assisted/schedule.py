"""How many tokens to propose in the next round, and when to propose none."""

from collections import deque

from fastllama.decode.assisted.chances import Chances
from fastllama.decode.assisted.starts import Starts

SCHEDULES = ("constant", "heuristic", "heuristic_transient", "adaptive")
_MEMORY = 7  # timings of each width whose median counts, the lower one of two: what disturbs only adds
_FORGET = 0.9  # of the evidence on acceptance, kept from round to round
_PRIOR = 0.7, 2.0  # acceptance before anything is known, and how many trials it weighs
_FIRST_ROUNDS = 3  # before the first verdict, and before one after each pause
_AFTER_PAUSE = 0.25  # of the evidence on acceptance, kept over a pause: the text may have changed
_PROVEN_ROUNDS = 6  # without a pause, after which the next pause is short again
_FIRST_PAUSE, _LONGEST_PAUSE = 16, 256  # steps without assistance
_LEAST_CHANCE = 0.05  # that all proposals up to one stand: below, none is worth a place, however cheap a place looks


class Constant:
    """Always `tokens`."""

    switched_off = 0

    def __init__(self, tokens: int):
        self.tokens = tokens

    def next(self, widest: int | None = None, weighed: bool = False) -> int:
        """Tokens to propose; 0 is a step without assistance. `widest`: tokens that one fast step takes, if known.

        `weighed`: the proposer says of each token how sure it is, to the `weighing` of this round.
        """
        return self.tokens

    def weighing(self, rows: int) -> "Weighing | None":
        """What ends a round whose next token would not pay, for so many rows; None where nothing does."""
        return None

    def worth_starting(self, tokens: int, left: int | None) -> bool:
        """Whether a call pays in which the proposer first reads `tokens` of prompts, for `left` to be written in a row.

        `left` None: nobody knows how many.
        """
        return True

    def has_started(self, tokens: int, seconds: float) -> None:
        """The proposer has read so many tokens of prompts in so many seconds."""

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
    """The number that writes most tokens a second, by the chances lately and the costs measured.

    A proposer that says how sure it is of each token is weighed token by token; of any other the best number is sought
    for the acceptance of all. Where assistance is slower than plain steps, it pauses, each time twice as long, and then
    tries again. Nothing is timed here: costs come in through `record`. `most` is the most it proposes.
    """

    def __init__(self, most: int):
        self.most = most
        self.switched_off = 0
        self.hits, self.trials = _PRIOR[0] * _PRIOR[1], _PRIOR[1]
        self.draft_s: deque[float] = deque(maxlen=_MEMORY)
        self.drafting_s = 0.0  # a step of the draft; 0 as long as it is unknown
        self.step_s: dict[int, deque[float]] = {}
        self.usual_s: dict[int, float] = {}  # the median of each
        self.pause, self.pause_left, self.rounds = _FIRST_PAUSE, 0, 0
        self.starts = Starts()
        self.chances = Chances()
        self.written, self.spent = 0.0, 0.0  # tokens a row and seconds of the weighed rounds, the newest count most
        self.current: Weighing | None = None

    @property
    def acceptance(self) -> float:
        """Of one proposed token after others that stood."""
        return self.hits / self.trials

    def cost(self, width: int) -> float:
        """Seconds of a step over `width` tokens: measured, or on the line through its measured neighbours."""
        if width in self.usual_s:
            return self.usual_s[width]
        known = sorted(self.usual_s)
        if len(known) < 2:
            return self.usual_s[known[0]]
        above = next((place for place, each in enumerate(known) if each > width), len(known) - 1)
        low, high = known[max(above, 1) - 1], known[max(above, 1)]
        at_low, at_high = self.usual_s[low], self.usual_s[high]
        # More tokens never take less: noise must not make a wide step look free.
        slope = max(at_high - at_low, 0.0) / (high - low)
        return max(at_low + slope * (width - low), 0.25 * at_low)

    def further(self, width: int) -> float:
        """Seconds that each token beyond `width` takes in a wider step, in the best of those that are known."""
        here = self.cost(width)
        wider = [each for each in self.usual_s if each > width]
        slopes = [(self.usual_s[each] - here) / (each - width) for each in wider]
        if not any(len(self.step_s[each]) > 1 for each in wider):
            # One timing may have been disturbed: it speaks for wider steps, but never against them.
            slopes.append((here - self.cost(1)) / max(width - 1, 1))
        return max(min(slopes), 0.0)

    def pace(self) -> float:
        """Tokens a second of a row: of weighed rounds, or of plain steps where those are faster."""
        plain = 1 / self.cost(1)
        return max(self.written / self.spent, plain) if self.spent else plain

    def speed(self, tokens: int) -> float:
        """Expected speed with `tokens` proposals, over that of plain steps."""
        seconds = tokens * self.drafting_s + self.cost(tokens + 1)
        return expected_tokens(self.acceptance, tokens) * self.cost(1) / seconds

    def next(self, widest: int | None = None, weighed: bool = False) -> int:
        """As `Constant.next`; the most of a round that is weighed."""
        self.current = None
        most = self.most if widest is None else min(self.most, widest - 1)
        if 1 not in self.usual_s or most < 1:  # what a plain step costs is what all is compared with
            return 0
        if self.pause_left:
            self.pause_left -= 1
            return 0
        best = most if weighed else max(range(1, most + 1), key=self.speed)
        if self.rounds >= _FIRST_ROUNDS and self._loses(best, weighed):
            self.switched_off += 1
            self.pause_left, self.rounds = self.pause, 0
            self.hits, self.trials = self.hits * _AFTER_PAUSE, self.trials * _AFTER_PAUSE
            self.written, self.spent = self.written * _AFTER_PAUSE, self.spent * _AFTER_PAUSE
            self.pause = min(2 * self.pause, _LONGEST_PAUSE)
            return 0
        if self.rounds >= _PROVEN_ROUNDS:
            self.pause = _FIRST_PAUSE
        return best

    def _loses(self, tokens: int, weighed: bool) -> bool:
        if weighed and self.spent:
            return self.written * self.cost(1) < self.spent
        return self.speed(tokens) < 1.0

    def worth_starting(self, tokens: int, left: int | None) -> bool:
        """As `Constant.worth_starting`; where it does not pay, this counts as switched off."""
        if left is None or self.starts.cost(tokens) <= self.cost(1):  # that little, no whole call is given up for
            return True
        best = max(range(1, self.most + 1), key=self.speed)
        pace = self.pace() if self.spent else max(self.speed(best), 1.0) / self.cost(1)
        worth = self.starts.worth(tokens, left * (self.cost(1) - 1 / pace))
        self.switched_off += not worth
        return worth

    def has_started(self, tokens: int, seconds: float) -> None:
        """As `Constant.has_started`."""
        self.starts.took(tokens, seconds)

    def weighing(self, rows: int) -> "Weighing":
        """As `Constant.weighing`: for the round that comes next."""
        self.current = Weighing(self, rows)
        return self.current

    def record(self, width: int, target_s: float, drafts: int, draft_s: float, accepted: list[tuple[int, int]]) -> None:
        """As `Constant.record`."""
        timings = self.step_s.setdefault(width, deque(maxlen=_MEMORY))
        timings.append(target_s)
        self.usual_s[width] = _median(timings)
        if drafts:
            self.draft_s.append(draft_s / drafts)
            self.drafting_s = _median(self.draft_s)
        proposed = [(stood, proposed) for stood, proposed in accepted if proposed]
        if not proposed:
            return
        self.rounds += 1
        self.hits, self.trials = self.hits * _FORGET, self.trials * _FORGET
        self.hits += sum(stood for stood, _ in proposed)
        self.trials += sum(min(stood + 1, most) for stood, most in proposed)
        if self.current is not None:
            self.written = _FORGET * self.written + 1 + sum(stood for stood, _ in accepted) / len(accepted)
            # By the usual costs, so that one disturbed step changes no verdict.
            self.spent = _FORGET * self.spent + self.cost(width) + (drafts or width - 1) * self.drafting_s


class Weighing:
    """The proposals of one round while they are being made: whether one more is worth its time.

    It looks at how sure the proposer is before a token is drawn, never at the token: a choice by the token would change
    the distribution of what is drawn.
    """

    def __init__(self, schedule: Adaptive, rows: int):
        self.schedule = schedule
        self.guesses: list[list[float]] = [[] for _ in range(rows)]
        self.stand = [1.0] * rows  # the chance that all so far stand
        self.pace = schedule.pace()

    def worth_drafting(self) -> bool:
        """Whether it pays to ask the proposer for another token."""
        usual = self.schedule.acceptance * sum(self.stand) / len(self.stand)
        return usual >= self.pace * (self.schedule.drafting_s + self.schedule.further(1 + len(self.guesses[0])))

    def worth_verifying(self, guesses: list[float]) -> bool:
        """Whether the next token, of which the proposer is so sure in each row, belongs in the target's step.

        The first of a round always does: it is there by then.
        """
        chances = self.schedule.chances
        stand = [before * chances.of(guess) for before, guess in zip(self.stand, guesses, strict=True)]
        mean, width = sum(stand) / len(stand), 1 + len(self.guesses[0])
        if width > 1 and (mean < _LEAST_CHANCE or mean < self.pace * self.schedule.further(width)):
            return False
        self.stand = stand
        for known, guess in zip(self.guesses, guesses, strict=True):
            known.append(guess)
        return True

    def judged(self, accepted: list[tuple[int, int]]) -> None:
        """(accepted, proposed) of each row, as far as the target has judged."""
        for guesses, (stood, proposed) in zip(self.guesses, accepted, strict=True):
            self.schedule.chances.learn(guesses[:proposed], stood)


def _median(values: deque[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2]
