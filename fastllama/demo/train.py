"""Trains the demo pair: `python -m fastllama.demo.train`.

A target of about 5 M parameters learns the standard library's text; a draft of about 1 M learns from the
target's distribution, since what a draft is for is to be accepted. Seeded, and resumable: each step's batch
is a function of (seed, step), and the state is on disk every few steps.
"""

import argparse
import json
import math
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from fastllama.demo import steps
from fastllama.demo.evaluate import agreement, perplexity
from fastllama.demo.text import held_out_documents, training_documents
from fastllama.demo.tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE, train_tokenizer
from fastllama.kernels.whole_file import whole

WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class Recipe:
    """One model's shape and schedule; tokens per step = batch_size * sequence_length."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    steps: int
    long_steps: int  # the last of `steps`, at long_length, so that distant positions are seen
    learning_rate: float
    knee_step: int  # from here the rate falls to zero
    knee_factor: float  # what is left of the rate there
    batch_size: int = 16
    sequence_length: int = 512
    long_length: int = 2048
    warmup_steps: int = 40
    weight_decay: float = 0.1
    seed: int = 0


TARGET = Recipe(256, 6, 8, 2, 704, steps=660, long_steps=40, learning_rate=3e-3, knee_step=400, knee_factor=650 / 1010)
DRAFT = Recipe(128, 3, 4, 2, 352, steps=400, long_steps=20, learning_rate=4e-3, knee_step=200, knee_factor=0.7, seed=1)


def demo_config(recipe: Recipe) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=recipe.num_attention_heads,
        num_key_value_heads=recipe.num_key_value_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )


def batch_at(tokens: np.ndarray, recipe: Recipe, step: int) -> torch.Tensor:
    """Token ids [B, T] of one step: windows drawn without replacement within an epoch, from (seed, epoch)."""
    length, rows = recipe.sequence_length, recipe.batch_size
    if step >= recipe.steps - recipe.long_steps:
        length, rows = recipe.long_length, max(1, rows * length // recipe.long_length)
    windows = (len(tokens) - length) // length
    first = step * rows
    picks = []
    for index in range(first, first + rows):
        epoch, slot = divmod(index, windows)
        generator = np.random.default_rng((recipe.seed, epoch, length))
        offset = int(generator.integers(length))
        picks.append(offset + int(generator.permutation(windows)[slot]) * length)
    return torch.from_numpy(np.stack([tokens[p : p + length] for p in picks]).astype(np.int64))


def learning_rate_factor(recipe: Recipe, step: int) -> float:
    """Linear warm-up, a slow linear decay to the knee, a fast one to zero."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    if step < recipe.knee_step:
        progress = (step - recipe.warmup_steps) / (recipe.knee_step - recipe.warmup_steps)
        return 1 - progress * (1 - recipe.knee_factor)
    return recipe.knee_factor * (recipe.steps - step) / (recipe.steps - recipe.knee_step)


def train_model(
    recipe: Recipe, tokens: np.ndarray, state_file: Path, name: str, teacher=None, stop_at: int | None = None
) -> tuple[transformers.LlamaForCausalLM, list[dict]]:
    """Trains one model, resuming from `state_file` when it is there; returns it with its loss curve.

    `stop_at` ends early with the state on disk, as an interruption would.
    """
    torch.manual_seed(recipe.seed)
    model = transformers.LlamaForCausalLM(demo_config(recipe))
    curve = steps.run(
        model,
        recipe,
        lambda step: batch_at(tokens, recipe, step),
        lambda step: recipe.learning_rate * learning_rate_factor(recipe, step),
        state_file,
        name,
        teacher,
        stop_at,
    )
    return model, curve


def encode(tokenizer, documents: list[str]) -> np.ndarray:
    """All documents as one uint16 array: <s> text </s> <s> text </s> ..."""
    ids: list[int] = []
    for document in documents:
        ids.extend(tokenizer.encode(document))
        ids.append(EOS_ID)
    return np.array(ids, dtype=np.uint16)


def save_model(model, tokenizer, folder: Path) -> None:
    # bfloat16 keeps the pair small enough for git; what is scored below is what is stored.
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastllama.demo.train", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="where target/ and draft/ are written")
    parser.add_argument("--work", type=Path, default=Path("demo_training"), help="resumable state")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)

    documents = training_documents()
    tokenizer = train_tokenizer(documents)
    tokens = encode(tokenizer, documents)
    held_out = encode(tokenizer, held_out_documents())
    print(f"{len(documents)} documents, {len(tokens):,} training tokens, {len(held_out):,} held-out tokens", flush=True)

    started = time.monotonic()
    models: dict[str, transformers.LlamaForCausalLM] = {}
    curves = {}
    for name, recipe in (("target", TARGET), ("draft", DRAFT)):
        model, curves[name] = train_model(
            recipe, tokens, args.work / f"{name}.pt", name, teacher=models.get("target") if name == "draft" else None
        )
        save_model(model, tokenizer, args.out / name)
        models[name] = model.float()
    report: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "documents": len(documents),
        "training_tokens": len(tokens),
        "held_out_tokens": len(held_out),
        "minutes_of_this_run": round((time.monotonic() - started) / 60, 1),
        "draft_top1_agreement": round(agreement(models["target"], models["draft"], held_out), 4),
        "models": {
            name: {
                "recipe": asdict(recipe),
                "parameters": sum(p.numel() for p in models[name].parameters()),
                "held_out_perplexity": round(perplexity(models[name], held_out), 3),
                "bytes_per_token": round(sum(len(d.encode()) for d in held_out_documents()) / len(held_out), 3),
                "bits_per_byte": None,
                "curve": curves[name],
            }
            for name, recipe in (("target", TARGET), ("draft", DRAFT))
        },
    }
    for entry in report["models"].values():
        entry["bits_per_byte"] = round(math.log2(entry["held_out_perplexity"]) / entry["bytes_per_token"], 4)
    with whole(args.out / "training.json") as unfinished:
        unfinished.write_text(json.dumps(report, indent=1) + "\n")
    for name, entry in report["models"].items():
        print(f"{name}: held-out perplexity {entry['held_out_perplexity']}, {entry['bits_per_byte']} bits per byte")
    print(f"draft agrees with the target's first choice at {report['draft_top1_agreement']:.1%} of positions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
