"""Who proposes tokens: a draft model, or the text itself.

Legend: B rows, K proposed tokens, V vocabulary.
"""

from typing import NamedTuple

import numpy
import torch
from torch import nn

from fastllama.decode.assisted.accept import draw
from fastllama.decode.assisted.lookup import NGrams
from fastllama.decode.assisted.processing import Processing
from fastllama.decode.assisted.rows import Rows
from fastllama.decode.assisted.schedule import Weighing
from fastllama.decode.assisted.sharing import Shared
from fastllama.decode.assisted.tree import Tree
from fastllama.decode.engine import Engine
from fastllama.decode.prompt import Prompt, recent
from fastllama.decode.stop import StopCheck

_LAG_ON_GPU = 2  # draft steps in flight behind the question whether drafting still makes sense
USUALLY_BEHIND = 2  # tokens: the newest, and the last proposal where all stood
_AGREEING = 3  # the power that makes a guess of a probability, which fits small models of one family
_CATCH_UP = 256  # tokens that a draft which was paused takes in at a time


class Proposal(NamedTuple):
    """`ids` [B, K]; `probabilities` [B, K, V] that they were drawn from, None where they were not drawn; how many of
    each row's are meant; forward passes that they took; whether the draft first took in text that it had missed.

    `trees`: of each row, where a branch has split, and `ids` is None then; meant are the tokens of a longest branch.
    """

    ids: torch.Tensor | None
    probabilities: torch.Tensor | None
    meant: list[int]
    forwards: int
    caught_up: bool = False
    trees: list[Tree] | None = None

    def drafted(self, row: int) -> int:
        """How many tokens were proposed for a row."""
        return self.meant[row] if self.trees is None else len(self.trees[row])


class LookupProposer:
    """What followed the newest n-gram of up to `longest` tokens where it stood before."""

    mode = "lookup"
    weighs = True  # says how sure it is of each token
    shared = window = None  # holds no keys, reads all

    def __init__(self, prompt: Prompt, longest: int):
        rows = zip(prompt.tokens.tolist(), prompt.lengths.tolist(), strict=True)
        self.texts = [NGrams(tokens[:length], longest) for tokens, length in rows]

    def start(self) -> None:
        """Nothing to prepare."""

    def most(self, rows: Rows) -> int | None:
        """How many tokens it has room for; None for any number."""

    def settle(self, added: list[int], paths: list[list[int]] | None = None) -> None:
        """The text says all."""

    def propose(
        self, rows: Rows, most: int, room: int | None = None, weighing: Weighing | None = None
    ) -> Proposal | None:
        """Up to `most` tokens a row, on the CPU, as many as pay by `weighing`; None where no row finds any."""
        found, guesses = [], []
        for row, text in enumerate(self.texts):
            new = rows.lengths[row] - rows.padding[row] - len(text.tokens)
            text.extend(rows.ids[row, rows.lengths[row] - new : rows.lengths[row]].tolist())
            tokens, agreed = text.propose(most) if rows.unfinished[row] else ([], 0)
            found.append(tokens)
            if rows.unfinished[row]:
                # Laplace's rule, for a text that has agreed with an earlier place for so many tokens.
                guesses.append(agreed / (agreed + 2))
        longest = max(map(len, found))
        if longest == 0:
            return None
        if weighing is not None:
            longest = next((count for count in range(longest) if not weighing.worth_verifying(guesses)), longest)
            found = [tokens[:longest] for tokens in found]
        ids = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens in found])
        return Proposal(ids, None, [len(tokens) for tokens in found], 0)


class DraftProposer:
    """A smaller Llama with an engine of its own.

    Its vocabulary may be shorter or longer than the target's `vocabulary` ids: what it has not got it is shown as its
    last id, and it proposes nothing that the target has not got.
    Of a prompt longer than `window` it reads the first token and the last ones, as if nothing stood between them.
    `processing` where it samples, None where it is greedy. `shared` where it goes on from the target's cache. Drafting
    ends early where every row has proposed an end of text or a token of probability below `threshold` (0: never).
    """

    mode = "draft"
    knows_doubt = True  # says how sure it is of each token

    def __init__(
        self, model: nn.Module, engine: Engine, prompt: Prompt, new_tokens: int | None, processing: Processing | None,
        threshold: float, vocabulary: int, shared: Shared | None = None, window: int | None = None,
    ):  # fmt: skip
        own = model.config.vocab_size
        self.last_id = own - 1 if own < vocabulary else None
        self.vocabulary = vocabulary if own != vocabulary else None
        if self.last_id is not None:
            prompt = prompt._replace(tokens=prompt.tokens.clamp_max(self.last_id))
        self.model, self.engine, self.prompt, self.new_tokens = model, engine, prompt, new_tokens
        self.processing, self.threshold, self.shared, self.window = processing, threshold, shared, window
        self.skipped = [0] * len(prompt.lengths)  # tokens of each row that it does not read
        self.held: list[int] | None = None  # tokens of each row in the draft's cache that stand
        self._fed = 0  # proposals of the last round that are in the cache too
        # Asked in each round, while a model looks through its parameters for its device.
        self.weighs = self.knows_doubt and model.device.type == "cpu"  # elsewhere the host would have to wait

    @property
    def device(self) -> torch.device:
        return self.engine.cache.shape.device

    def start(self) -> None:
        """Takes the prompts in. Raises `ValueError` when an explicit cache of the draft is too small."""
        self.engine.refresh(self.model)
        if self.shared is not None and self.engine.explicit and not self.shared.fits(self.engine):
            self.shared = None
        prompt = self.prompt if self.shared is not None else recent(self.prompt, self.window)
        batch, longest = len(prompt.lengths), prompt.longest
        try:
            self.engine.fit(self.model, batch, longest, longest + (self.new_tokens or 1) - 1)
        except ValueError as error:
            raise ValueError(f"the draft: {error}") from error
        self.engine.begin(batch)
        if self.shared is not None and not self.shared.fits(self.engine):
            self.shared = None
        if self.shared is None:
            prompt = recent(self.prompt, self.window)
            self.engine.prefill(prompt)
        self.held = prompt.lengths.tolist()
        self.skipped = (self.prompt.lengths - prompt.lengths).tolist()

    def most(self, rows: Rows) -> int | None:
        """How many tokens its cache has room for; None where the cache can grow."""
        return self.engine.cache.shape.cache_length - max(self.read_of(rows)) + 1 if self.engine.explicit else None

    def read_of(self, rows: Rows) -> list[int]:
        """Tokens of each row that the draft reads."""
        return [length - skipped for length, skipped in zip(rows.real(), self.skipped, strict=True)]

    def propose(self, rows: Rows, most: int, room: int | None = None, weighing: Weighing | None = None) -> Proposal:
        """Up to `most` tokens a row, on the draft's device, as many as pay by `weighing`."""
        logits_BV, forwards, behind = self._caught_up(rows, most)
        tokens: list[torch.Tensor] = []
        probabilities, doubt, fed = [], _Doubt(rows, self.device), 0
        while True:
            q_BV = self._drawn_from(rows, tokens, logits_BV)
            if weighing is not None and not weighing.worth_verifying(self._guesses(rows, logits_BV, q_BV)):
                break
            token_B, sure_B = self._chosen(logits_BV, q_BV)
            tokens.append(token_B)
            if q_BV is not None:
                probabilities.append(q_BV)
            if len(tokens) == most or doubt.everywhere(token_B, sure_B):
                break
            if weighing is not None and not weighing.worth_drafting():
                break
            logits_BV = self.engine.step(token_B[:, None])[:, -1]
            fed += 1
        self.held, self._fed = self.read_of(rows), fed
        ids = torch.stack(tokens, 1)
        meant = [len(tokens) if going else 0 for going in rows.unfinished]
        q_BKV = torch.stack(probabilities, 1) if probabilities else None
        return Proposal(ids, q_BKV, meant, forwards + fed, caught_up=behind > USUALLY_BEHIND)

    def settle(self, added: list[int], paths: list[list[int]] | None = None) -> None:
        """After the target has spoken and each row has grown by `added`: what was fed and stands is held."""
        self.held = [held + min(max(count - 1, 0), self._fed) for held, count in zip(self.held, added, strict=True)]

    def _caught_up(self, rows: Rows, most: int) -> tuple[torch.Tensor, int, int]:
        """Logits [B, V] after the newest token, the forward passes to get there, and the tokens that they took in."""
        real = self.read_of(rows)
        # The same number of tokens for each row: some rows take one in again that they have.
        behind = max(
            (length - held for length, held, going in zip(real, self.held, rows.unfinished, strict=True) if going)
        )
        while not self.engine.explicit and self.engine.cache.shape.cache_length < max(real) + most:
            self.engine.grow(self.model)
        if self.shared is not None:  # the target holds all but the newest token
            self.shared.take_over(self.engine, [length - 1 for length in real])
            behind = 1
        self.engine.place([max(length - behind, 0) for length in real])
        ids, forwards = rows.newest(behind).to(self.device), 0
        if self.last_id is not None:
            ids = ids.clamp_max(self.last_id)
        for part in ids.split(self.engine.few(behind) or _CATCH_UP, dim=1):
            logits_BV = self.engine.step(part)[:, -1]
            forwards += 1
        return logits_BV, forwards, behind

    def _drawn_from(self, rows: Rows, before: list[torch.Tensor], logits_BV: torch.Tensor) -> torch.Tensor | None:
        """The probabilities [B, V] that the next token is drawn from; None where it is the likeliest."""
        if self.processing is None:
            return None
        if self.vocabulary is not None:
            logits_BV = logits_BV[:, : self.vocabulary]
            missing = self.vocabulary - logits_BV.shape[1]
            logits_BV = torch.nn.functional.pad(logits_BV, (0, missing), value=float("-inf"))
        return self.processing.drafted(rows, before, logits_BV).softmax(-1)

    def _guesses(self, rows: Rows, logits_BV: torch.Tensor, q_BV: torch.Tensor | None) -> list[float]:
        """How likely the next token of each row that goes on is the target's too."""
        if q_BV is not None:
            largest = q_BV.amax(-1).tolist()
        else:
            scores = logits_BV[:, : self.vocabulary].float().numpy()
            with numpy.errstate(invalid="ignore"):  # a draft may compute what is no number
                largest = (1 / numpy.exp(scores - scores.max(-1, keepdims=True)).sum(-1)).tolist()
        # Two models agree on the likeliest token more often than either gives it as its probability.
        return [
            1 - (1 - p) ** _AGREEING if p > 0 else 0.0
            for p, going in zip(largest, rows.unfinished, strict=True)
            if going
        ]

    def _chosen(self, logits_BV: torch.Tensor, q_BV: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The next token [B], and whether its probability reaches the threshold [B] or None."""
        if q_BV is not None:
            token_B = draw(q_BV)
            sure_B = q_BV.gather(1, token_B[:, None])[:, 0] >= self.threshold if self.threshold else None
            return token_B, sure_B
        if self.vocabulary is not None:
            logits_BV = logits_BV[:, : self.vocabulary]
        if logits_BV.device.type == "cpu":
            token_B = torch.from_numpy(logits_BV.float().numpy().argmax(-1))
        else:
            token_B = logits_BV.argmax(-1)
        if not self.threshold:
            return token_B, None
        largest_B1 = logits_BV.gather(1, token_B[:, None]).float()
        sure_B = (logits_BV.float() - largest_B1).exp().sum(-1) <= 1 / self.threshold
        return token_B, sure_B


class _Doubt:
    """Whether going on with a round's draft makes no sense in any row: after an end of text, or an unsure token."""

    def __init__(self, rows: Rows, device: torch.device):
        self.ends = rows.eos
        self.live = list(rows.unfinished)
        if device.type == "cuda":
            self.check = StopCheck(_LAG_ON_GPU, device)
            self.live_B = torch.tensor(self.live, device=device)
            self.ends_tensor = torch.tensor(sorted(self.ends), device=device)

    def everywhere(self, token_B: torch.Tensor, sure_B: torch.Tensor | None) -> bool:
        """Takes the newest tokens; on an accelerator, answers for those of some steps ago."""
        if sure_B is None and not self.ends:
            return False
        if token_B.device.type == "cuda":
            self.live_B = self.live_B & ~torch.isin(token_B, self.ends_tensor)
            self.live_B = self.live_B if sure_B is None else self.live_B & sure_B
            return self.check.finished(self.live_B)
        sure = [True] * len(self.live) if sure_B is None else sure_B.tolist()
        newest = zip(self.live, token_B.tolist(), sure, strict=True)
        self.live = [live and certain and token not in self.ends for live, token, certain in newest]
        return not any(self.live)
