"""Model names that need no download, and the checkpoint folders they stand for."""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import LlamaConfig

from fastllama.demo.checkpoint import publish, tokenizer_files
from fastllama.demo.inflate import MAX_POSITIONS, build_inflated
from fastllama.demo.random_model import body_config, build_random
from fastllama.demo.shapes import SHAPES

WEIGHTS = Path(__file__).parent / "weights"
# Part of every folder's name: raise it whenever the builders would write other numbers.
RECIPE_VERSION = 1

_DEMOS = {"demo": "target", "demo-draft": "draft"}
_BUILT_FROM = {"random": "target", "inflated": "target", "inflated-draft": "draft"}
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def is_random(name: str) -> bool:
    """Whether `name` stands for a model with random weights, whose text and acceptance mean nothing."""
    return name.startswith("random:")


def user_cache() -> Path:
    """$XDG_CACHE_HOME/fastllama, or ~/.cache/fastllama."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastllama"


def demo_folder(which: str) -> Path:
    """The shipped checkpoint `which` ("target" or "draft"); `FileNotFoundError` when it is not there."""
    folder = WEIGHTS / which
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"the demo's weights are not in {folder}; python -m fastllama.demo.train makes them")
    return folder


def _fingerprint(shape, files: list[Path]) -> str:
    """8 hex digits that change with the recipe, the shape, or what the model is made from."""
    digest = hashlib.sha256(json.dumps([RECIPE_VERSION, asdict(shape)], sort_keys=True).encode())
    for path in files:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:8]


def _body(name: str, dtype: torch.dtype) -> tuple[str, str] | None:
    """(kind, NAME) of a model that is built, None for any other name. `ValueError` where it cannot be built."""
    kind, colon, body = name.partition(":")
    if not colon or kind not in _BUILT_FROM:
        return None
    if body not in SHAPES:
        raise ValueError(f"unknown model {name}: after '{kind}:' comes one of {', '.join(SHAPES)}")
    if dtype not in _DTYPES:
        raise ValueError(f"{name} cannot be built in {dtype}: allowed are fp32, bf16, fp16")
    return kind, body


def configuration(name: str, dtype: torch.dtype) -> LlamaConfig | None:
    """The sizes of a model that `resolve` would build, without building it; None for any other name.

    Raises `ValueError` as `resolve` does.
    """
    built = _body(name, dtype)
    if built is None:
        return None
    kind, body = built
    positions = {} if kind == "random" else {"max_position_embeddings": MAX_POSITIONS}
    return body_config(SHAPES[body], dtype, **positions)


def resolve(name: str, dtype: torch.dtype) -> str:
    """The checkpoint folder that a model name stands for, built in the user's cache on first use.

    `name` is "demo", "demo-draft", "random:NAME", "inflated:NAME" or "inflated-draft:NAME", NAME one of
    `shapes.SHAPES`; anything else (a path, a hub name) is returned unchanged. A built folder holds weights
    in `dtype`; the demo's own are bfloat16 and are converted when they are loaded.
    Raises `ValueError` for an unknown NAME, a dtype other than fp32, bf16, fp16, or a disk that is too
    full, and `FileNotFoundError` when the demo's weights are not there.
    """
    if name in _DEMOS:
        return str(demo_folder(_DEMOS[name]))
    built = _body(name, dtype)
    if built is None:
        return name
    kind, body = built
    shape, source = SHAPES[body], demo_folder(_BUILT_FROM[kind])
    files = tokenizer_files(source)
    if kind != "random":
        files = [source / "config.json", source / "model.safetensors", *files]
    if kind == "inflated-draft":
        files.append(source / "generation_config.json")
    final = user_cache() / f"{kind}-{body}-{_DTYPES[dtype]}-{_fingerprint(shape, files)}"
    if not final.is_dir():
        build = build_random if kind == "random" else build_inflated
        needed = shape.parameters * dtype.itemsize
        publish(final, lambda folder: build(source, shape, folder, dtype), needed)
    return str(final)
