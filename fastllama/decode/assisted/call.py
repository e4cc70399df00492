"""One assisted generate call: whether it can run here, and running it while both engines are held."""

from typing import Any

import torch
from torch import nn

from fastllama.decode.assisted.companions import Companions
from fastllama.decode.assisted.loop import assisted_loop
from fastllama.decode.assisted.report import Assisted
from fastllama.decode.assisted.support import asked, obstacle
from fastllama.decode.ending import well_ended
from fastllama.decode.engine import Engine
from fastllama.decode.turn import if_free


def assisted_call(
    model: nn.Module,
    engine: Engine,
    companions: Companions,
    call: dict,
    draft: nn.Module | None,
    other_tokenizer: bool,
    input_ids: torch.Tensor,
    how: tuple[Any, Any, Any],
    streamer,
    inputs: dict,
) -> tuple[str | None, object, Assisted | None, str]:
    """(why the parent must run it or None, output, report, words for `path`).

    `draft` None looks in the text. `how`: processors, criteria and generation config; `inputs`: as forward takes them;
    `call`: what the call itself says of `support.ASKED`. Raises `ValueError` for what is not allowed or does not fit.
    """
    reason = obstacle(model, draft, other_tokenizer, input_ids, inputs, *how)
    if reason is not None:
        return reason, None, None, ""
    wanted = asked(call, how[-1], draft)
    engines = [engine] if draft is None else [engine, companions.engine(draft)]

    def generate() -> tuple[object, Assisted, str]:
        draws = bool(how[-1].do_sample)
        schedule = companions.schedule(wanted, model, draft, len(input_ids), engines, draws)
        pair = None if draft is None else (draft, engines[1])
        mask = inputs.get("attention_mask")
        with torch.inference_mode(False), torch.no_grad():
            output, report = assisted_loop(
                model, engine, pair, wanted, schedule, input_ids, *how, streamer=streamer, attention_mask=mask
            )
        wanted.give_back(draft, schedule)
        return output, report, f"{engine.words()}, {wanted.words(draft, report.shares_cache)}"

    # Each engine is left as its own calls leave it.
    work = generate if draft is None else lambda: well_ended(engines[1], generate)
    ran, found = if_free([each.fast for each in engines], lambda: well_ended(engine, work))
    return ("another call is using the cache", None, None, "") if not ran else (None, *found)
