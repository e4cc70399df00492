"""Refines the demo's draft on what the target writes itself: `python -m fastllama.demo.refine`, after demo.train.

A draft is asked to continue the target's text, not the library's, so it learns the target's distribution there too
(on-policy distillation; Zhou et al., DistillSpec, 2023). Seeded; the texts are kept in --work, and so are the steps.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm

import fastllama
from fastllama.demo import steps
from fastllama.demo.evaluate import agreement, perplexity
from fastllama.demo.text import held_out_documents, training_documents
from fastllama.demo.tokenizer import BOS_ID
from fastllama.demo.train import WEIGHTS, encode
from fastllama.kernels.whole_file import whole

DRAFT_WINDOW = 384  # tokens of a prompt that the draft reads: with 128 new ones, as many as it learned from


@dataclass(frozen=True)
class Refinement:
    """Every `library_every`-th step is on the library's text, so that the draft does not forget it."""

    texts: int = 1280
    length: int = 512
    longest_prompt: int = 192
    rows_at_once: int = 128  # texts written together; every other such batch is greedy, the others are drawn
    steps: int = 480
    batch_size: int = 16
    library_every: int = 4
    learning_rate: float = 2e-3
    warmup_steps: int = 20
    weight_decay: float = 0.1
    seed: int = 2


def written_texts(target, tokens: np.ndarray, plan: Refinement) -> np.ndarray:
    """Texts [N, length] that the target wrote after prompts of the library's text, uint16."""
    generator = np.random.default_rng(plan.seed)
    torch.manual_seed(plan.seed)
    texts = np.empty((plan.texts, plan.length), dtype=np.uint16)
    for first in tqdm(range(0, plan.texts, plan.rows_at_once), desc="texts", unit="batch"):
        size = int(generator.integers(8, plan.longest_prompt + 1))
        starts = generator.integers(0, len(tokens) - size, plan.rows_at_once)
        prompts = np.stack([np.concatenate(([BOS_ID], tokens[at : at + size - 1])) for at in starts]).astype(np.int64)
        greedy = first // plan.rows_at_once % 2 == 0
        new = plan.length - size
        ids = torch.from_numpy(prompts)
        texts[first : first + plan.rows_at_once] = target.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=not greedy,
            top_k=0,
            max_new_tokens=new,
            min_new_tokens=new,
        )
    return texts


def batch_at(texts: np.ndarray, tokens: np.ndarray, plan: Refinement, step: int) -> torch.Tensor:
    """Token ids [B, length] of one step, a function of (seed, step)."""
    generator = np.random.default_rng((plan.seed, step))
    if step % plan.library_every == 0:
        starts = generator.integers(0, len(tokens) - plan.length, plan.batch_size)
        rows = np.stack([tokens[at : at + plan.length] for at in starts])
    else:
        rows = texts[generator.choice(len(texts), plan.batch_size, replace=False)]
    return torch.from_numpy(rows.astype(np.int64))


def learning_rate_at(plan: Refinement, step: int) -> float:
    """Linear warm-up, then linearly to zero."""
    rise, fall = (step + 1) / plan.warmup_steps, (plan.steps - step) / (plan.steps - plan.warmup_steps)
    return plan.learning_rate * min(rise, fall)


def refine(
    draft,
    target,
    texts: np.ndarray,
    tokens: np.ndarray,
    plan: Refinement,
    state_file: Path,
    stop_at: int | None = None,
) -> list[dict]:
    """Trains `draft` in place, resuming from `state_file` when it is there; returns the loss curve.

    `stop_at` ends early with the state on disk, as an interruption would. Raises `ValueError` for another plan's state.
    """
    return steps.run(
        draft,
        plan,
        lambda step: batch_at(texts, tokens, plan, step),
        lambda step: learning_rate_at(plan, step),
        state_file,
        "draft",
        target,
        stop_at,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastllama.demo.refine", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="where target/, draft/ and training.json are")
    parser.add_argument("--work", type=Path, default=Path("demo_training"), help="resumable state")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)

    plan, started = Refinement(), time.monotonic()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.out / "target")
    tokens, held_out = encode(tokenizer, training_documents()), encode(tokenizer, held_out_documents())
    target = fastllama.LlamaForCausalLM.from_pretrained(args.out / "target", dtype=torch.float32)
    draft = transformers.LlamaForCausalLM.from_pretrained(args.out / "draft", dtype=torch.float32)
    file = args.work / "texts.npy"
    if not file.exists():
        np.save(file, written_texts(target, tokens, plan))
    texts = np.load(file)
    target.free()
    before = agreement(target, draft, held_out)
    curve = refine(draft, target, texts, tokens, plan, args.work / "refined.pt")
    special = {key: getattr(draft.config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    draft.generation_config = transformers.GenerationConfig(**special, draft_window=DRAFT_WINDOW)
    draft.bfloat16().save_pretrained(args.out / "draft")  # what is scored below is what is stored
    draft.float()

    report = json.loads((args.out / "training.json").read_text())
    report["draft_top1_agreement"] = round(agreement(target, draft, held_out), 4)
    entry = report["models"]["draft"]
    entry["held_out_perplexity"] = round(perplexity(draft, held_out), 3)
    entry["bits_per_byte"] = round(float(np.log2(entry["held_out_perplexity"])) / entry["bytes_per_token"], 4)
    report["refinement"] = {
        "plan": asdict(plan),
        "top1_agreement_before": round(before, 4),
        "minutes_of_this_run": round((time.monotonic() - started) / 60, 1),
        "curve": curve,
    }
    with whole(args.out / "training.json") as unfinished:
        unfinished.write_text(json.dumps(report, indent=1) + "\n")
    print(f"draft agrees with the target's first choice at {report['draft_top1_agreement']:.1%} of held-out positions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
