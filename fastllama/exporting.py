"""export(): the decode step as one file that runs without the Python code of fastllama or transformers.

A greedy loop on such a file, in a process that has torch and nothing else:

    import json, torch

    run = torch._inductor.aoti_load_package("step.pt2")
    said = run.get_metadata()
    rows, layers = int(said["batch_size"]), int(said["num_layers"])
    keys, values = ([torch.zeros(json.loads(said["cache_shape"])) for _ in range(layers)] for _ in range(2))
    valid_past_index, positions = torch.zeros(rows, dtype=torch.int64), torch.arange(int(said["cache_length"]))
    ids, text = torch.tensor([[1, 17, 23]] * rows), []
    for _ in range(16):
        logits = run(ids, torch.full((rows,), ids.shape[1]), valid_past_index, positions, keys, values)
        ids = logits.argmax(-1, keepdim=True)
        text.append(ids)
    print(torch.cat(text, 1).tolist())
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from fastllama.cache.budget import CacheShape, require
from fastllama.decode.binding import require_weights
from fastllama.decode.exported import package
from fastllama.decode.reservation import bytes_for, shape_for
from fastllama.decode.support import model_obstacle
from fastllama.decode.switches import switched
from fastllama.llama import LlamaForCausalLM
from fastllama.model.config import FastConfig
from fastllama.model.rotary import is_stateful
from fastllama.model.spread import processes

logger = logging.get_logger("fastllama")


def export(
    model: LlamaForCausalLM,
    path: str | Path,
    batch_size: int = 1,
    cache_length: int | None = None,
    config: FastConfig | None = None,
    **switches: Any,
) -> Path:
    """Compiles the decode step ahead of time (torch.export, then AOTInductor) into `path`, a .pt2 file; returns it.

    The file holds the weights and one graph that takes `batch_size` rows of 1 to `cache_length` tokens (default:
    max_position_embeddings), so it serves prompts and steps alike. `load_step(path)` runs it here, and
    `torch._inductor.aoti_load_package(path)` anywhere with this version of torch, the same kind of processor or GPU,
    and nothing else. Loaded so, it is called with

        input_ids         int64 [B, Q]  new tokens, padded on the right; Q may differ from call to call
        lengths           int64 [B]     how many of a row's tokens are real; 0 leaves the row as it was
        valid_past_index  int64 [B]     how many positions of a row's cache hold tokens; counted on in place
        positions         int64 [S]     0 .. S - 1: the part of the cache that is read; S covers the longest row
        keys, values      a list for each, a tensor of `cache_shape` for each layer, zero at first; written in place

    and returns logits [B, V] of each row's last real token. Its `get_metadata()` has batch_size, cache_length,
    cache_shape (JSON), num_layers, dtype, device, vocab_size, bucket and prefill_chunk, as text.

    `config`, or `switches`, which are fields of `FastConfig`: `fuse` holds; `bucket` and `prefill_chunk` are how
    `load_step` calls it; products are torch's, whatever `compile` says. The model is left as it was, and
    `path` appears when it is whole. Raises `ValueError` for a value that is not allowed, for what cannot be exported
    (the native step, packed products, caches of fewer bits or on another device, contexts that move, rope types whose
    frequencies follow the text's length, adapters that are not merged), before anything is compiled, and without a C++
    compiler; `MemoryError` for a cache that does not fit.
    """
    if not isinstance(model, LlamaForCausalLM):
        kind = f"{type(model).__name__} of {type(model).__module__.split('.')[0]}"
        raise ValueError(f"export takes a fastllama.LlamaForCausalLM, not a {kind}")
    path = _checked(path)
    config = switched(config, None, switches, "export")
    obstacle = model_obstacle(model)
    if obstacle is not None:
        raise ValueError(f"export cannot be honoured: {obstacle}")
    longest = model.config.max_position_embeddings
    cache_length = longest if cache_length is None else cache_length
    shape = shape_for(model, batch_size, cache_length, config)
    _require_exportable(model, config, shape)
    if cache_length > longest:
        logger.warning(
            f"cache_length {cache_length} is longer than max_position_embeddings {longest}: "
            "the model was not trained for positions beyond it"
        )
    require(bytes_for(model, shape), shape.device, f"tracing with a cache of {batch_size} x {cache_length} positions")

    def write() -> None:
        model._engine.forget_weights()  # packed ones become parameters again, and are not held twice
        module = package.program(model, shape, replace(config, products="stock"))
        traced = package.trace(module, shape)
        package.write(traced, path, package.metadata(shape, config, model.config.vocab_size))

    with torch.inference_mode(False), torch.no_grad():
        model._engine.alone("export", write)
    return path


def _checked(path: str | Path) -> Path:
    found = Path(path).expanduser()
    if found.suffix != ".pt2":
        raise ValueError(f"path={str(path)!r} is not allowed; allowed: a file name that ends in .pt2")
    if not found.parent.is_dir():
        raise ValueError(f"path={str(path)!r} cannot be written: there is no folder {str(found.parent)!r}")
    return found.absolute()


def _require_exportable(model: LlamaForCausalLM, config: FastConfig, shape: CacheShape) -> None:
    if processes(model) > 1:
        raise ValueError("export takes a whole model, and this one is spread over processes by tensor parallelism")
    require_weights(model, config.weights)
    rotary = model.model.rotary_emb
    reasons = {
        "compile": (config.compile == "native", "that step is C++ of this package, and the file must run without it"),
        "products": (config.products in ("native", "packed"), "the file must run without this package's operators"),
        "cache_k": (not shape.is_plain and config.cache_k, "the file's cache has the model's own dtype"),
        "cache_v": (not shape.is_plain and config.cache_v, "the file's cache has the model's own dtype"),
        "cache_device": (shape.device != model.device, "the file's cache lies beside the weights"),
        "keep": (config.keep != 0, "nothing is dropped from the file's cache"),
        "context_shift": (config.context_shift, "the file's cache is its caller's, and stays where it is"),
        "grp_attn_n": (config.grp_attn_n > 1, "the file's cache is its caller's, and stays where it is"),
    }
    for name, (refused, why) in reasons.items():
        if refused:
            raise ValueError(f"{name}={getattr(config, name)!r} cannot be exported: {why}")
    if is_stateful(rotary):
        raise ValueError(
            f"rope_type {rotary.rope_type!r} cannot be exported: its frequencies follow the length of the text, which "
            "Python code reads at every step"
        )
