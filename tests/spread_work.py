"""What each process of tests/test_tensor_parallel.py does with the models in a folder."""

import os
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from transformers.distributed.tensor_parallel import ColwiseParallel

import fastllama
from fastllama.decode.cache_name import CACHE_NAME
from fastllama.lab.measuring.ceiling import step_bytes
from fastllama.model.weights import _adjacent
from tests import tiny

# The first versions that are supported refuse a vocabulary that does not divide.
_DIVIDED = "validate_param" in vars(ColwiseParallel)
# Models by name: 4 heads, of which 2 or 1 kv heads; and all that does not divide, with biases and a tied head.
ODD = {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "intermediate_size": 97}
ODD["vocab_size"] = 384 if _DIVIDED else 385
MODELS = {
    "gqa": {"kv_heads": 2},
    "single": {"kv_heads": 1},
    "odd": {"kv_heads": 2, **ODD},
    "wide": {"kv_heads": 2, "hidden_size": 128},
}
NEW = {"max_new_tokens": 12}
CACHES = ("int8", "q8_0")
CONTINUED = [[5, 9], [7, 3], [2, 4]]


def save(folder: Path) -> None:
    """Writes the models; biases are not zero, or nobody would miss them."""
    for name, changes in MODELS.items():
        vanilla, _ = tiny.pair(**changes)
        with torch.no_grad():
            for parameter_name, parameter in vanilla.named_parameters():
                if parameter_name.endswith("bias"):
                    parameter.normal_(0, 0.3)
        vanilla.save_pretrained(folder / name)


def load(folder: Path, name: str, **arguments):
    return fastllama.LlamaForCausalLM.from_pretrained(folder / name, **arguments).eval()


def refused(function, *arguments, **more) -> str:
    """The sentence of the ValueError, or what came instead."""
    try:
        return f"no error: {function(*arguments, **more)}"
    except ValueError as fault:
        return str(fault)


def counted(model) -> list[int]:
    """Numbers of each tensor that a step of one row adds up over the processes."""
    all_reduce, sizes = dist.all_reduce, []

    def count(tensor, *arguments, **more):
        sizes.append(tensor.numel())
        return all_reduce(tensor, *arguments, **more)

    model.prefill(torch.tensor([[5, 9, 3]]))
    dist.all_reduce = count
    model.step(torch.tensor([[7]]))
    dist.all_reduce = all_reduce
    return sizes


def logits(model) -> list[torch.Tensor]:
    """Of a padded prompt and two steps behind it, one of two tokens."""
    ids = torch.tensor(CONTINUED)
    return [model.prefill(**tiny.prompt("padded")), model.step(ids), model.step(ids[:, :1])]


def _common(folder: Path, name: str) -> dict:
    model = load(folder, name, tp_plan="auto")
    found = {"logits": logits(model), "greedy": tiny.generate(model, tiny.prompt("padded"), **tiny.GREEDY, **NEW)}
    found["path"] = model.path
    found["kv_heads"] = model._engine.cache.shape.num_kv_heads
    attention = model.model.layers[0].self_attn
    parts = [getattr(attention, f"{side}_proj").weight.to_local() for side in "qkv"]
    found["one_storage"] = _adjacent([one.detach() for one in parts])
    with torch.no_grad():
        found["forward"] = model(**tiny.prompt("one")).logits
    beams = tiny.generate(model, tiny.prompt("one"), num_beams=2, do_sample=False, **NEW)
    found["beams"], found["beams_path"] = beams, model.path
    found["sums"] = counted(model)
    found["weights"] = step_bytes(model, [0], 0)
    model.save_pretrained(folder / f"{name}-saved-by-{dist.get_world_size()}")
    if name == "single":
        found["backward"] = refused(model(**tiny.prompt("one")).logits.sum().backward)
    return found


def _more(folder: Path) -> dict:
    """What is tried with one model only."""
    model, rank = load(folder, "gqa", tp_plan="auto"), dist.get_rank()
    padded, found = tiny.prompt("padded"), {}
    # Each process has a seed of its own: the first one's counts.
    found["sampled"] = tiny.generate(model, padded, seed=5 + rank, **tiny.SAMPLED, **NEW)
    prompts = [[5, 9, 3], [7, 3, 11, 4, 9, 2], [8]]
    many = model.generate_many(prompts, slots=2, max_new_tokens=[12, 4, 9], **tiny.GREEDY)
    found["many"] = [list(result.ids) for result in many]
    torch.manual_seed(5 + rank)
    drawn = model.generate_many(prompts, slots=2, max_new_tokens=6, **tiny.SAMPLED)
    found["many_drawn"] = [list(result.ids) for result in drawn]
    given = tiny.generate(model, padded, return_dict_in_generate=True, **tiny.GREEDY, **NEW)
    found["returned_heads"] = given[CACHE_NAME].layers[0].keys.shape[1]
    looked_up = tiny.generate(model, tiny.prompt("one"), prompt_lookup_num_tokens=3, **tiny.GREEDY, **NEW)
    found["lookup"], found["lookup_path"] = looked_up, model.path
    found["refused"] = {
        "native": refused(model.preallocate, compile="native"),
        "packed": refused(model.preallocate, products="packed"),
        "weights": refused(load, folder, "wide", tp_plan="auto", fast=fastllama.FastConfig(weights="int8")),
        "max_time": refused(model.generate, **padded, max_time=60.0, **NEW),
        "max_time_many": refused(model.generate_many, prompts, max_time=60.0, **NEW),
    }
    model.preallocate(3, 32, compile="static")
    found["static"] = [tiny.generate(model, padded, **tiny.GREEDY, **NEW) for _ in range(2)]
    found["static_path"] = model.path
    model.free()
    wide = load(folder, "wide", tp_plan="auto")
    for name in CACHES:
        wide.preallocate(3, 32, cache_k=name, cache_v=name)
        found[f"cache_{name}"] = logits(wide)
    return found


def work(folder: Path) -> dict:
    """Everything with two processes; with four, the model that has two kv heads."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error", FutureWarning
        )  # whoever says tp_plan="auto" is not warned of transformers' plans
        if os.environ["WORLD_SIZE"] == "2":
            return {name: _common(folder, name) for name in ("gqa", "single", "odd")} | {"more": _more(folder)}
        return {"gqa": _common(folder, "gqa")}
