"""The loop behind assisted generation: propose, verify, accept, roll back.

Legend: B rows, T padded prompt length, K proposed tokens, V vocabulary.
"""

from typing import Any

import torch
from torch import nn

from fastllama.decode.assisted.clock import Clock
from fastllama.decode.assisted.processing import Processing
from fastllama.decode.assisted.proposer import DraftProposer, LookupProposer, Proposal
from fastllama.decode.assisted.report import Assisted, Tally
from fastllama.decode.assisted.rows import Rows
from fastllama.decode.assisted.sharing import Shared, is_same_model
from fastllama.decode.assisted.support import Asked, one_by_one
from fastllama.decode.assisted.tree import verified
from fastllama.decode.assisted.tree_proposer import TreeProposer
from fastllama.decode.assisted.verify import GreedyVerifier, ProcessedVerifier, SequentialVerifier
from fastllama.decode.choice import Choice, GreedyChoice
from fastllama.decode.engine import Engine
from fastllama.decode.loop import as_output, copied_out
from fastllama.decode.prompt import unpad
from fastllama.decode.stop import StopCheck


def assisted_loop(
    model: nn.Module,
    engine: Engine,
    draft: tuple[nn.Module, Engine] | None,
    asked: Asked,
    schedule,
    input_ids: torch.Tensor,
    logits_processor,
    stopping_criteria,
    generation_config,
    streamer=None,
    attention_mask: torch.Tensor | None = None,
) -> tuple[object, Assisted]:
    """What transformers' `_assisted_decoding` returns, and what happened, for `input_ids` [B, T].

    `draft`: the model that proposes and its engine; None looks in the text. Raises `ValueError` when an explicit cache
    is too small.
    """
    prompt, limit = unpad(input_ids, attention_mask), stopping_criteria.max_length
    most_new = None if limit is None else max(limit - input_ids.shape[1], 1)
    batch, positions = input_ids.shape[0], prompt.longest + (most_new or 1) - 1
    engine.refresh(model)
    # An implicit cache has room for proposals beyond the last token; in an explicit one they become fewer there.
    engine.fit(model, batch, prompt.longest, positions + (0 if engine.explicit else asked.nodes))
    if engine.explicit and asked.nodes >= engine.cache.shape.cache_length:
        raise ValueError(
            f"{asked.nodes} proposed tokens do not fit the target's cache of {engine.cache.shape.cache_length} "
            "positions: propose fewer, or preallocate more"
        )
    how = (logits_processor, stopping_criteria, generation_config)
    verifier, processing = _verifier(input_ids, most_new, draft is not None, how)
    watching = not isinstance(verifier, SequentialVerifier)
    rows = Rows(input_ids, prompt, stopping_criteria, generation_config._pad_token_tensor, watching)
    proposer: LookupProposer | DraftProposer
    if draft is None:
        proposer = LookupProposer(prompt, asked.ngram)
    else:
        shared = Shared(engine) if is_same_model(model, draft[0]) else None
        made = (*draft, prompt, most_new, processing, asked.threshold, model.config.vocab_size, shared, asked.window)
        split: dict[str, Any] = {"p_split": asked.p_split, "branches": asked.branches}
        proposer = DraftProposer(*made) if asked.branches == 1 else TreeProposer(*made, **split)
    call = Call(model, engine, proposer, verifier, schedule, rows, streamer)
    as_dict = generation_config.return_dict_in_generate
    report = call.run(prompt, generation_config.prefill_chunk_size, as_dict)
    ids = rows.ids[:, : max(rows.lengths)].to(input_ids.device, copy=True)
    if not as_dict:
        return ids, report
    cache = copied_out(model, engine, prompt, batch)
    return as_output(ids, verifier.scores, verifier.raw_logits, cache), report


def _verifier(input_ids, most_new, drafted: bool, how: tuple[Any, Any, Any]):
    """How a round is judged, and how a draft is to sample (None: it is greedy)."""
    logits_processor, _, generation_config = how
    stop = StopCheck(0, input_ids.device)
    if one_by_one(*how) is not None:
        return SequentialVerifier(Choice(input_ids, *how, stop)), None
    plain = GreedyChoice.when_possible(input_ids, most_new, *how, stop)
    if plain is not None:
        return GreedyVerifier(plain.first), None
    processing = Processing(logits_processor, input_ids.device)
    do_sample = bool(generation_config.do_sample)
    return ProcessedVerifier(processing, do_sample), processing if do_sample and drafted else None


class Call:
    """One generate call: its rounds, its counts, and what it streams."""

    def __init__(self, model, engine: Engine, proposer, verifier, schedule, rows: Rows, streamer):
        self.model, self.engine, self.proposer, self.verifier = model, engine, proposer, verifier
        self.schedule, self.rows, self.streamer = schedule, rows, streamer
        self.device = engine.cache.shape.device
        self.clock, self.tally = Clock(self.device), Tally()
        self.draft_clock = Clock(torch.device("cpu")) if proposer.mode == "lookup" else Clock(proposer.model.device)
        self.started, self.declined, self.streamed = False, False, rows.width
        self.reads = 0  # tokens of all prompts, as far as the proposer reads them

    def run(self, prompt, chunk: int | None, keep: bool) -> Assisted:
        """Writes the rows. `keep`: the cache is asked for, and holds all rows to the same column at the end."""
        switched_off = self.schedule.switched_off
        self.reads = self.rows.batch * min(prompt.longest, self.proposer.window or prompt.longest)
        begin = self.clock.mark()
        self.engine.begin(self.rows.batch)
        logits_BV = self.engine.prefill(prompt, chunk)
        self.tally.target_forwards += 1
        self._take(self.verifier(self.rows, None, None, logits_BV[:, None]))
        self.tally.prefill_s += self.clock.seconds(begin, self.clock.mark())
        while self.rows.going:
            self._round(keep)
        off, shares = self.schedule.switched_off - switched_off, self.started and self.proposer.shared is not None
        report = self.tally.report(self.proposer.mode, self.rows.new_tokens, off, shares)
        if keep:
            self._level()
        if self.streamer is not None:
            self.streamer.end()
        return report

    def _round(self, keep: bool) -> None:
        rows, engine, tally = self.rows, self.engine, self.tally
        most = self._most()
        start, weighing = self.draft_clock.mark(), None
        room = engine.room() - 1 if engine.explicit else None
        proposal = None
        if most > 0:
            weighing = self.schedule.weighing(sum(rows.unfinished)) if self.proposer.weighs else None
            proposal = self.proposer.propose(rows, most, room, weighing)
        proposed = self.draft_clock.mark()
        begin = self.clock.mark()
        going, paths = list(rows.unfinished), None
        if proposal is None or proposal.trees is None:
            width, added = self._verified(proposal)
        else:
            width, added, paths = self._verified_trees(proposal)
        # Every row that goes on has its cache filled up to its last token but one.
        if paths is not None or not all(rows.unfinished) or any(count != width for count in added):
            places = zip(rows.real(), rows.unfinished, strict=True)
            # A finished row is idle, and must not take the others' room, but for one whose cache is asked for.
            engine.place([length - 1 if keep or unfinished else 0 for length, unfinished in places])
        end = self.clock.mark()
        target_s = self.clock.seconds(begin, end)
        draft_s = self.draft_clock.seconds(start, proposed) if most > 0 else 0.0
        forwards, judged = 0, []
        if proposal is not None:
            self.proposer.settle(added, paths)
            forwards = proposal.forwards
            rounds = [each for each in zip(added, proposal.meant, self.stood, going, strict=True) if each[-1]]
            judged = [(min(stood, meant, count), meant) for count, meant, stood, _ in rounds]
            if weighing is not None:
                # What was proposed behind the end of a row was never judged.
                ends = [meant if count > stood else count for count, meant, stood, _ in rounds]
                weighing.judged([(stood, min(seen, end)) for (stood, seen), end in zip(judged, ends, strict=True)])
            tally.draft_tokens += sum(proposal.drafted(row) for row, on in enumerate(going) if on)
        tally.target_forwards += 1
        tally.draft_forwards += forwards
        tally.accepted_tokens += sum(stood for stood, _ in judged)
        tally.draft_s, tally.target_s = tally.draft_s + draft_s, tally.target_s + target_s
        timed = 0 if proposal is None or proposal.caught_up else forwards
        # Of a tree, the depth is what is scheduled: its costs are those of whatever branches it came to.
        depth = width - 1 if paths is None else max(proposal.meant)
        self.schedule.record(depth + 1, target_s, timed, draft_s, judged)

    def _verified(self, proposal: Proposal | None) -> tuple[int, list[int]]:
        """Tokens of a row in the pass, and by how many each row grew."""
        width = 1 if proposal is None else 1 + proposal.ids.shape[1]
        self._make_room(width)
        ids, draft_BK = self.rows.newest(1).to(self.device), None
        if proposal is not None:
            draft_BK = proposal.ids.to(self.device)
            ids = torch.cat((ids, draft_BK), 1)
        logits_BQV = self.engine.step(ids)
        probabilities = None if proposal is None else proposal.probabilities
        return width, self._take(self.verifier(self.rows, draft_BK, probabilities, logits_BQV))

    def _verified_trees(self, proposal: Proposal) -> tuple[int, list[int], list[list[int]]]:
        """As `_verified`, and of each row the nodes that stand, which then follow the row's text in the cache."""
        ends, newest = self.rows.real(), self.rows.newest(1)[:, 0].tolist()
        ids, branching = verified(proposal.trees, newest, self.device)
        self._make_room(ids.shape[1])
        found = self.verifier.tree(self.rows, proposal.trees, self.engine.step(ids, branching))
        paths = [stood for _, stood in found]
        added = self._take([kept for kept, _ in found])
        for row, (path, count) in enumerate(zip(paths, added, strict=True)):
            self.engine.keep_branch(row, ends[row], [node - 1 for node in path[: max(count - 1, 0)]])
        return ids.shape[1], added, paths

    def _make_room(self, width: int) -> None:
        while self.engine.room() < width and not self.engine.explicit:
            self.engine.grow(self.model)

    def _most(self) -> int:
        """Tokens to propose in this round: as scheduled, as far as they may be written and there is room for them."""
        if self.declined:
            return 0
        # A tree never is one call of the native step, so nothing is gained by what fits one.
        widest = None if self.proposer.mode == "tree" else self.engine.widest()
        most = self.schedule.next(widest, self.proposer.weighs)
        left = self.rows.left()
        if left is not None:
            most = min(most, left - 1)
        if self.engine.explicit:
            most = min(most, self.engine.room() - 1)
        if most < 1:
            return 0
        if not self.started:  # a draft that is never asked never reads the prompt
            if not self.schedule.worth_starting(self.reads, left):
                self.declined = True
                return 0
            begin = self.draft_clock.mark()
            self.proposer.start()
            seconds = self.draft_clock.seconds(begin, self.draft_clock.mark())
            self.tally.prefill_s, self.tally.draft_prefill_s = self.tally.prefill_s + seconds, seconds
            self.schedule.has_started(self.reads, seconds)
            self.started = True
        room = self.proposer.most(self.rows)
        return most if room is None else min(most, room)

    def _take(self, kept: list[list[int]]) -> list[int]:
        """Appends and streams what is kept of each row; returns by how many tokens each row grew."""
        self.stood = [len(tokens) - 1 for tokens in kept]
        added = self.rows.add(kept)
        if self.verifier.finished:
            self.rows.unfinished = [False]
        if self.streamer is not None:
            self._stream()
        return added

    def _stream(self) -> None:
        """Hands on every column that is certain in all rows, one at a time, as without assistance."""
        rows = self.rows
        growing = [length for length, going in zip(rows.lengths, rows.unfinished, strict=True) if going]
        certain = min(growing) if growing else max(rows.lengths)
        for column in range(self.streamed, certain):
            self.streamer.put(rows.ids[:, column].clone())
        self.streamed = certain

    def _level(self) -> None:
        """Feeds rows that finished early their padding, so that the cache is what it is without assistance."""
        rows, engine = self.rows, self.engine
        target = max(rows.lengths)
        while min(rows.lengths) < target:
            behind = [length < target for length in rows.lengths]
            engine.step(rows.newest(1).to(self.device))
            rows.lengths = [length + more for length, more in zip(rows.lengths, behind, strict=True)]
            engine.place([length - 1 for length in rows.real()])
