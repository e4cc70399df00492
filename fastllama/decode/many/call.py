"""One generate_many call: what it is asked, the prompts that cannot run, and running the others."""

from collections.abc import Callable, Iterable
from numbers import Integral

from torch import nn

from fastllama.decode import together
from fastllama.decode.context.choose import require_unmoved
from fastllama.decode.ending import well_ended
from fastllama.decode.engine import Engine
from fastllama.decode.many import prompts as reading
from fastllama.decode.many.chooser import Chooser
from fastllama.decode.many.loop import Loop
from fastllama.decode.many.result import Generated
from fastllama.decode.many.row import Row
from fastllama.decode.many.rules import Asked
from fastllama.decode.many.slots import Slots
from fastllama.decode.sampling.options import Sampling
from fastllama.decode.support import model_obstacle
from fastllama.decode.turn import require_free
from fastllama.model.rotary import is_stateful

SLOTS = 8
SHARED = 32  # tokens that a prefix must have to be worth sharing
# Prompt tokens between two steps: few enough that running rows hardly wait, and enough for products of many rows.
_CHUNK = {"cpu": 256}
_CHUNK_ELSEWHERE = 1024


def _require(name: str, value, least: int) -> None:
    if value is not None and (not isinstance(value, Integral) or isinstance(value, bool) or value < least):
        raise ValueError(f"{name}={value!r} is not allowed; allowed: None or an integer >= {least}")


def _require_model(model: nn.Module, cache_device: str | None) -> None:
    obstacle = model_obstacle(model)
    if obstacle is None and is_stateful(model.model.rotary_emb):
        obstacle = f"rope_type {model.model.rotary_emb.rope_type!r} depends on the longest position of all rows"
    if obstacle is None and model.device.type != "cpu" and cache_device is not None:
        obstacle = f"cache_device is {cache_device!r} and the model is on {model.device}"
    if obstacle is not None:
        raise ValueError(f"generate_many cannot run: {obstacle}")


def run_many(
    model: nn.Module,
    engine: Engine,
    prompts: Iterable,
    slots: int | None,
    max_new_tokens,
    generation_config,
    chunk: int | None,
    shared_prefix: int | None,
    on_result: Callable[[int, Generated], object] | None,
    arguments: dict,
    sampling: Sampling | None = None,
) -> tuple[list[Generated], str]:
    """(the results in the order of the prompts, words for `path`). See `LlamaForCausalLM.generate_many`."""
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        raise ValueError(f"prompts is a {type(prompts).__name__} and not a list of prompts")
    prompts = list(prompts)
    for name, value, least in (("slots", slots, 1), ("chunk", chunk, 16), ("shared_prefix", shared_prefix, 1)):
        _require(name, value, least)
    limits = reading.limits(max_new_tokens, len(prompts))
    _require_model(model, engine.config.cache_device)
    require_unmoved(engine.config, "generate_many, whose rows move at different times")
    if not prompts:
        return [], "no prompt was given"
    asked = Asked(model, generation_config, arguments, limits, sampling)

    def generate() -> tuple[list[Generated], str]:
        results: list[Generated | None] = [None] * len(prompts)

        def keep(result: Generated) -> None:
            results[result.index] = result
            if on_result is not None:
                on_result(result.index, result)

        rows = []
        for index, prompt in enumerate(prompts):
            found = _row(model, engine, index, prompt, limits[index], asked)
            rows.append(found) if isinstance(found, Row) else keep(found)
        words = "no prompt could run"
        if rows:
            count = min(_slots(engine, slots), len(rows))
            if any(row.rules.do_sample for row in rows):
                together.share_draws(model)
            _run(model, engine, rows, count, chunk, shared_prefix, Chooser(model.device), keep)
            words = f"{engine.words(whole_prompts=False)}, {count} slots"
        return results, words

    return require_free([engine.fast], lambda: well_ended(engine, generate), "generate_many cannot run")


def _slots(engine: Engine, asked: int | None) -> int:
    if asked is not None:
        return int(asked)
    return engine.cache.shape.batch_size if engine.explicit else SLOTS


def _row(model: nn.Module, engine: Engine, index: int, prompt, most_new: int | None, asked: Asked) -> Row | Generated:
    """The row of a prompt, or why it cannot run."""
    tokens = 0
    try:
        tokens = len(reading.ids_of(prompt))
        ids = reading.checked(prompt, model.config.vocab_size)
        row = Row(index, ids, asked.rules(index, ids, most_new))
        held = engine.cache.shape.cache_length if engine.explicit else None
        if held is not None and row.positions > held:
            raise ValueError(
                f"{tokens} prompt and {row.rules.most_new} new tokens need {row.positions} cache positions, and "
                f"preallocate() reserved {held}"
            )
        return row
    except ValueError as fault:
        return Generated(index, (), "error", tokens, str(fault).partition("\n")[0])


def _run(model, engine: Engine, rows: list[Row], count: int, chunk, shared_prefix, chooser: Chooser, keep) -> None:
    longest = max(row.prompt_tokens for row in rows)
    engine.refresh(model)
    engine.fit(model, count, longest, max(row.positions for row in rows))
    chunk = chunk or engine.config.prefill_chunk or _CHUNK.get(model.device.type, _CHUNK_ELSEWHERE)
    slots = Slots(model, engine, count)
    try:
        begin = reading.shared([row.ids for row in rows], shared_prefix)
        if begin:
            slots.share(rows[0].ids[:begin], chunk)
        Loop(slots, rows, chooser, chunk, lambda row: keep(row.result())).run()
    finally:
        engine.forget_text()
