"""Package: a step traced, compiled ahead of time and written as one file.

Legend: B batch, Q query tokens.
"""

import json
from pathlib import Path

import torch
from torch import nn

from fastllama.cache.budget import CacheShape
from fastllama.decode.binding import chooser
from fastllama.decode.chunks import automatic_chunk
from fastllama.decode.exported.program import StepProgram
from fastllama.kernels import compiler
from fastllama.kernels.whole_file import whole
from fastllama.model.config import FastConfig
from fastllama.model.released import Packing
from fastllama.model.rotary import RotaryTable
from fastllama.model.weights import gather

FORMAT = "1"  # of the inputs that the step takes, and of the metadata
_EXAMPLE = 3  # tokens and positions of the traced call: torch specialises 0 and 1


def program(model: nn.Module, shape: CacheShape, config: FastConfig) -> StepProgram:
    """The step of a transformers Llama as a module. Its weights are the model's own memory.

    Raises `ValueError` where a module of an unknown kind takes part.
    """
    choose = chooser(model, config, shape.batch_size)
    weights = gather(model, config.fuse, choose, choose.attention, Packing(lambda: False))
    if not weights.plain:
        raise ValueError(
            "export takes plain weights, and some of the model's modules are of another kind: merge adapters first "
            "(merge_and_unload())"
        )
    rotary = RotaryTable(model.model.rotary_emb, shape.reserved_length, shape.dtype, shape.device)
    cos_1SD, sin_1SD = rotary.at(torch.arange(shape.reserved_length, device=shape.device)[None])
    return StepProgram(weights, cos_1SD[0], sin_1SD[0])


def trace(module: StepProgram, shape: CacheShape) -> torch.export.ExportedProgram:
    """One graph for 1 to cache_length tokens and as many positions."""
    size = (shape.batch_size, shape.num_kv_heads, shape.reserved_length, shape.head_dim)
    row = torch.ones(shape.batch_size, dtype=torch.int64, device=shape.device)
    keys, values = (
        [torch.zeros(size, dtype=shape.dtype, device=shape.device) for _ in range(shape.num_layers)] for _ in range(2)
    )
    tokens_BQ = row.new_zeros(shape.batch_size, _EXAMPLE)
    arguments = (tokens_BQ, row, row - 1, torch.arange(_EXAMPLE + 1, device=shape.device), keys, values)
    # The storage is longer than the cache, so a cache shorter than the example may be called with its length too.
    longest = max(shape.cache_length, _EXAMPLE + 1)
    tokens, read = (torch.export.Dim(name, min=1, max=longest) for name in ("tokens", "read"))
    every = [None] * shape.num_layers
    sizes = ({1: tokens}, None, None, {0: read}, every, every)
    return torch.export.export(module, arguments, dynamic_shapes=sizes, strict=False)


def metadata(shape: CacheShape, config: FastConfig, vocabulary: int) -> dict[str, str]:
    """What a caller must know to make the inputs, as the package carries it: every value is text."""
    device = shape.device.type
    return {
        "fastllama_step": FORMAT,
        "batch_size": str(shape.batch_size),
        "cache_length": str(shape.cache_length),
        "cache_shape": json.dumps([shape.batch_size, shape.num_kv_heads, shape.reserved_length, shape.head_dim]),
        "num_layers": str(shape.num_layers),
        "dtype": str(shape.dtype).removeprefix("torch."),
        "device": device,
        "vocab_size": str(vocabulary),
        "bucket": str(config.bucket),
        "prefill_chunk": str(config.prefill_chunk or automatic_chunk(shape.batch_size, shape.cache_length, device)),
    }


def write(traced: torch.export.ExportedProgram, path: Path, said: dict[str, str]) -> None:
    """Compiles and writes `path` (.pt2), which appears only when it is whole; `ValueError` without a compiler."""
    with whole(path) as partial:
        compiler.package(traced, partial, "export", one_of_many=False, **{"aot_inductor.metadata": said})
