"""Checkpoint folders written shard by shard, and put in place all at once."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer's files in a checkpoint folder; `FileNotFoundError` when it has no tokenizer.json."""
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"there is no tokenizer.json in {folder}")
    return [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]


def write_checkpoint(
    folder: Path, config: LlamaConfig, shards: Iterable[dict[str, torch.Tensor]], count: int, tokenizer_folder: Path
) -> None:
    """Writes what `from_pretrained` reads: config, generation config, tokenizer, `count` shards and their index.

    Each element of `shards` maps checkpoint names to tensors and becomes one file, so no more than one
    shard need be in memory at a time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    special = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**special, **_of_a_draft(tokenizer_folder)).save_pretrained(folder)
    for path in tokenizer_files(tokenizer_folder):
        shutil.copyfile(path, folder / path.name)
    weight_map: dict[str, str] = {}
    total_bytes, total_parameters = 0, 0
    progress = tqdm(shards, total=count, desc=f"building {folder.name}", unit="shard", delay=2, leave=False)
    for number, tensors in enumerate(progress, start=1):
        file_name = f"model-{number:05d}-of-{count:05d}.safetensors"
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
        for name, tensor in tensors.items():
            weight_map[name] = file_name
            total_bytes += tensor.nbytes
            total_parameters += tensor.numel()
    index = {"metadata": {"total_size": total_bytes, "total_parameters": total_parameters}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _of_a_draft(folder: Path) -> dict:
    """What the generation config in `folder` says of how that model drafts."""
    if not (folder / "generation_config.json").is_file():
        return {}
    window = getattr(GenerationConfig.from_pretrained(folder), "draft_window", None)
    return {} if window is None else {"draft_window": window}


def publish(final: Path, build: Callable[[Path], None], needed_bytes: int) -> None:
    """Calls `build(folder)` on a temporary sibling of `final`, then renames it to `final`.

    `final` is therefore either absent or complete, also when two processes build it at once: the slower
    one drops its copy. Raises `ValueError` before any work when the disk has less than `needed_bytes` free.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(final.parent).free
    if free < needed_bytes:
        raise ValueError(
            f"building {final.name} needs {needed_bytes / 1e9:.1f} GB in {final.parent}, which has "
            f"{free / 1e9:.1f} GB free; point XDG_CACHE_HOME at a larger disk"
        )
    holder = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".part", dir=final.parent))
    try:
        build(holder / final.name)
        try:
            os.rename(holder / final.name, final)
        except OSError:
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(holder, ignore_errors=True)
