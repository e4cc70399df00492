"""The opening of a decoding method: what each call does first, and whether it can go on here."""

from torch import nn

from fastllama.decode import together
from fastllama.decode.sampling import call as sampling_call
from fastllama.decode.support import call_obstacle, model_obstacle
from fastllama.decode.told import told


def opening(
    model: nn.Module, input_ids, logits_processor, generation_config, synced_gpus: bool, inputs: dict
) -> str | None:
    """Why the parent's code must run this call; None when it need not. `inputs`: as forward takes them.

    Raises `ValueError` for what neither can do: a clock in several processes, options for another number of rows.
    """
    together.begin(model, generation_config)
    sampling_call.begin(logits_processor, input_ids, inputs.get("attention_mask"))
    reason = "a cache is given" if told().cache else None
    return reason or model_obstacle(model) or call_obstacle(model, generation_config, synced_gpus, inputs)
