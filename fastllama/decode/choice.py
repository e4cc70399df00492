"""How the next token of each row is chosen: by the parent's processors and criteria, or greedily without them.

Legend: B batch, T ids so far, V vocabulary.
"""

import torch
from transformers.generation.logits_process import MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from fastllama.decode.sampling.processor import SamplingProcessor
from fastllama.decode.stop import DrawState, StopCheck


def _argmax(logits_BV: torch.Tensor) -> torch.Tensor:
    # On a CPU, numpy needs a tenth of the time, and finds the same: the first of the largest.
    if logits_BV.device.type == "cpu":
        return torch.from_numpy(logits_BV.float().numpy().argmax(-1))
    return logits_BV.argmax(dim=-1)


class Choice:
    """What the parent's `_sample` does between two forward passes, with any processors and criteria."""

    def __init__(self, input_ids, logits_processor, stopping_criteria, generation_config, stop: StopCheck):
        self.ids, self.processor, self.criteria, self.stop = input_ids, logits_processor, stopping_criteria, stop
        self.do_sample = generation_config.do_sample
        as_dict = generation_config.return_dict_in_generate
        self.scores: list[torch.Tensor] | None = [] if as_dict and generation_config.output_scores else None
        self.raw_logits: list[torch.Tensor] | None = [] if as_dict and generation_config.output_logits else None
        pad_id = generation_config._pad_token_tensor
        self.pad_id = pad_id.to(input_ids.device) if pad_id is not None else None
        self.has_eos = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        self.unfinished_B = torch.ones(input_ids.shape[0], dtype=torch.long, device=input_ids.device)
        self.draws = DrawState(stop.lag, input_ids.device, self.do_sample)
        self.samplings = [each for each in logits_processor if isinstance(each, SamplingProcessor)]
        for sampling in self.samplings:
            sampling.keep(stop.lag)

    def take(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """The chosen ids [B]."""
        next_logits_BV = logits_BV.to(copy=True, dtype=torch.float32, device=self.ids.device)
        next_scores_BV = self.processor(self.ids, next_logits_BV)
        if self.scores is not None:
            self.scores.append(next_scores_BV)
        if self.raw_logits is not None:
            self.raw_logits.append(next_logits_BV)
        if self.do_sample:
            self.draws.remember()
            chosen_B = torch.multinomial(next_scores_BV.softmax(dim=-1), num_samples=1).squeeze(1)
        else:
            chosen_B = next_scores_BV.argmax(dim=-1)
        if self.has_eos:
            chosen_B = chosen_B * self.unfinished_B + self.pad_id * (1 - self.unfinished_B)
        self.ids = torch.cat((self.ids, chosen_B[:, None]), dim=-1)
        done_B = self.criteria(self.ids, tuple(self.scores) if self.scores is not None else None)
        self.unfinished_B = self.unfinished_B & ~done_B
        return chosen_B

    def finished(self) -> bool:
        """Whether every row was finished, as far as `stop` knows."""
        return self.stop.finished(self.unfinished_B)

    def undo(self, tokens: int) -> None:
        """Takes surplus tokens back, and the draws that made them."""
        self.ids = self.ids[:, :-tokens].contiguous()
        self.draws.undo(tokens)
        for sampling in self.samplings:
            sampling.undo(tokens)
        for kept in (self.scores, self.raw_logits):
            if kept is not None:
                del kept[-tokens:]


class GreedyChoice:
    """The same where nothing but argmax, an end of text and a length is asked for: five operations a token, not 25."""

    scores = raw_logits = None

    def __init__(self, input_ids, most_new: int, eos_V: torch.Tensor | None, first: int, pad_id, stop: StopCheck):
        batch, length = input_ids.shape
        self.buffer = input_ids.new_empty(batch, length + most_new)
        self.buffer[:, :length] = input_ids
        self.length, self.last = length, length + most_new
        self.first = first  # ids from which an end of text is allowed
        self.eos_V, self.pad_id, self.stop = eos_V, pad_id, stop
        self.unfinished_B = torch.ones(batch, dtype=torch.bool, device=input_ids.device)

    @classmethod
    def when_possible(cls, input_ids, most_new, logits_processor, stopping_criteria, generation_config, stop):
        """A GreedyChoice, or None where something else takes part."""
        as_dict = generation_config.return_dict_in_generate
        if generation_config.do_sample or most_new is None:
            return None
        if as_dict and (generation_config.output_scores or generation_config.output_logits):
            return None
        eos_V, first = None, 0
        for criterion in stopping_criteria:
            if type(criterion) is EosTokenCriteria and eos_V is None:
                eos_V = criterion.eos_token_id.to(input_ids.device).reshape(-1)
            elif type(criterion) is not MaxLengthCriteria:
                return None
            elif (criterion.max_position_embeddings or criterion.max_length) < criterion.max_length:
                return None  # it warns once the text is longer than the model was made for
        for processor in logits_processor:
            if type(processor) not in (MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor) or eos_V is None:
                return None
            if not torch.equal(processor.eos_token_id.to(input_ids.device).reshape(-1), eos_V):
                return None
            shortest = getattr(processor, "min_length", None)
            if shortest is None:
                shortest = processor.prompt_length_to_skip + processor.min_new_tokens
            first = max(first, shortest)
        return cls(input_ids, most_new, eos_V, first, generation_config._pad_token_tensor, stop)

    @property
    def ids(self) -> torch.Tensor:
        """int64 [B, T]"""
        return self.buffer[:, : self.length]

    def take(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """The chosen ids [B]."""
        if self.eos_V is not None and self.length < self.first:
            logits_BV = logits_BV.index_fill(1, self.eos_V.to(logits_BV.device), float("-inf"))
        chosen_B = _argmax(logits_BV).to(self.buffer.device)
        if self.eos_V is not None and self.length >= self.first:
            chosen_B = torch.where(self.unfinished_B, chosen_B, self.pad_id.to(chosen_B.device))
            self.unfinished_B = self.unfinished_B & ~torch.isin(chosen_B, self.eos_V)
        self.buffer[:, self.length] = chosen_B
        self.length += 1
        return chosen_B

    def finished(self) -> bool:
        """Whether every row was finished, as far as `stop` knows; before an end of text is allowed, none is."""
        if self.length == self.last and not self.stop.lag:
            return True
        if self.eos_V is None or self.length <= self.first:
            return False
        return self.stop.finished(self.unfinished_B)

    def undo(self, tokens: int) -> None:
        """Takes surplus tokens back."""
        self.length -= tokens
