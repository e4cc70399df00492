"""The decode loop behind generate: greedy and sampled, with the parent's processors and criteria.

Legend: B batch, T padded prompt length, V vocabulary.
"""

from typing import Any, cast

import torch
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.generation.utils import GenerateDecoderOnlyOutput

from fastllama.decode.cache_name import CACHE_NAME
from fastllama.decode.choice import Choice, GreedyChoice
from fastllama.decode.context.window import window_out
from fastllama.decode.engine import Engine
from fastllama.decode.prompt import Prompt, unpad
from fastllama.decode.stop import StopCheck, lag_for


def sample_loop(
    model: nn.Module,
    engine: Engine,
    input_ids: torch.Tensor,
    logits_processor,
    stopping_criteria,
    generation_config,
    streamer=None,
    attention_mask: torch.Tensor | None = None,
    inputs_embeds: torch.Tensor | None = None,
    lag: int | None = None,
):
    """What transformers' `_sample` returns, from the preallocated cache.

    `input_ids` [B, T] (empty beside `inputs_embeds` [B, T, E]). `lag`, for tests, overrides how many steps run ahead
    of the stop check. Raises `ValueError` when an explicit cache is too small.
    """
    prompt = unpad(input_ids if inputs_embeds is None else inputs_embeds, attention_mask)
    batch, limit = input_ids.shape[0], stopping_criteria.max_length
    most_new = None if limit is None else max(limit - input_ids.shape[1], 1)
    engine.refresh(model)
    engine.fit(model, batch, prompt.longest, prompt.longest + (most_new - 1 if most_new else 0))
    engine.begin(batch)

    if lag is None:
        stateful = engine.rotary.stateful
        lag = lag_for(input_ids.device, logits_processor, stopping_criteria, streamer, stateful)
    stop = StopCheck(lag, input_ids.device)
    how = (logits_processor, stopping_criteria, generation_config, stop)
    choice = GreedyChoice.when_possible(input_ids, most_new, *how) or Choice(input_ids, *how)
    logits_BV = engine.prefill(prompt, generation_config.prefill_chunk_size)
    taken = 0
    while True:
        chosen_B = choice.take(logits_BV)
        taken += 1
        if streamer is not None:
            streamer.put(chosen_B.cpu())
        if choice.finished():
            break
        if taken == most_new and lag:
            stop.drain()
            break
        if engine.moves_next() and stop.drain():
            break  # surplus steps are undone where they were made: before the move
        if engine.room() < 1:
            engine.grow(model)
        logits_BV = engine.step(chosen_B[:, None])[:, -1]

    if stop.surplus:
        choice.undo(stop.surplus)
        engine.undo(stop.surplus)
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return choice.ids.contiguous()
    cache = copied_out(model, engine, prompt, batch)
    return as_output(choice.ids.contiguous(), choice.scores, choice.raw_logits, cache)


def as_output(
    ids: torch.Tensor,
    scores: list[torch.Tensor] | None,
    raw_logits: list[torch.Tensor] | None,
    cache: DynamicCache,
) -> GenerateDecoderOnlyOutput:
    """What transformers' loops return where a dict is asked for."""
    by_step = {"scores": scores, "logits": raw_logits}
    named: dict[str, Any] = {name: None if each is None else tuple(each) for name, each in by_step.items()}
    named[CACHE_NAME] = cache
    return GenerateDecoderOnlyOutput(sequences=cast(torch.LongTensor, ids), **named)


def copied_out(model: nn.Module, engine: Engine, prompt: Prompt, batch: int) -> DynamicCache:
    """The cache as transformers would have left it: a cache of its own, padding columns included (as zeros).

    After a context shift: what is left (`window_out`).
    """
    lengths = engine.cache.valid_past_index[:batch].tolist()
    if engine.context is not None and engine.context.moved:
        return window_out(model, engine.cache, lengths)
    width = prompt.width + lengths[0] - int(prompt.lengths[0])
    columns = None if prompt.columns is None else prompt.columns.tolist()
    result = DynamicCache(config=model.config)
    for layer in range(engine.cache.shape.num_layers):
        pair = []
        for storage in engine.cache.floats(layer, batch, max(lengths)):
            out = storage.new_zeros(batch, storage.shape[1], width, storage.shape[3])
            for row, length in enumerate(lengths):
                new = length - int(prompt.lengths[row])
                real = length - new
                where = list(range(real)) if columns is None else columns[row][:real]
                out[row, :, where] = storage[row, :, :real]
                out[row, :, width - new :] = storage[row, :, real:length]
            pair.append(out.to(model.device))
        keys, values = pair
        result.update(keys, values, layer)
    return result
