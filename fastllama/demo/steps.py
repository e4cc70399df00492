"""The training steps of the demo's models: seeded by their number, and resumable."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from fastllama.kernels.whole_file import whole

CHECKPOINT_EVERY = 50


def optimizers_for(model: torch.nn.Module, plan: Any) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings and norms."""
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed_tokens" in n]
    return [
        torch.optim.Muon(hidden, lr=plan.learning_rate, weight_decay=plan.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=plan.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def loss_of(model, ids: torch.Tensor, teacher=None) -> torch.Tensor:
    """Mean next-token loss in nats: cross entropy, or with a teacher the cross entropy to its distribution."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    if teacher is None:
        return F.cross_entropy(logits.float(), ids[:, 1:].flatten())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = teacher(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits.float(), wanted.float().softmax(-1))


def save(path: Path, state: dict) -> None:
    """Writes what a later run goes on from; the file is whole, or what it was."""
    with whole(path) as unfinished:
        torch.save(state, unfinished)


def run(
    model,
    plan: Any,
    batch_at: Callable[[int], torch.Tensor],
    rate_at: Callable[[int], float],
    state_file: Path,
    name: str,
    teacher=None,
    stop_at: int | None = None,
) -> list[dict]:
    """Trains `model` in place for `plan.steps` steps, resuming from `state_file` when it is there; the loss curve.

    A step's ids [B, T] and learning rate are functions of its number. `plan` is a dataclass with `steps`,
    `learning_rate` and `weight_decay`. The state is on disk every `CHECKPOINT_EVERY` steps; `stop_at` ends early with
    it there, as an interruption would. Raises `ValueError` for another plan's state.
    """
    model.train()
    optimizers = optimizers_for(model, plan)
    first = 0
    curve: list[dict] = []
    running: list[float] = []
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        if state.get("plan") != asdict(plan):
            raise ValueError(f"{state_file} belongs to another plan; delete it to start again")
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, curve = state["step"], state["curve"]
    for step in tqdm(range(first, plan.steps), initial=first, total=plan.steps, desc=name, unit="step"):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step)
        loss = loss_of(model, batch_at(step), teacher)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        running.append(loss.item())
        done = step + 1
        if done % 10 == 0:
            curve.append({"step": done, "loss": round(sum(running) / len(running), 4)})
            running = []
        if done % CHECKPOINT_EVERY == 0 or done in (plan.steps, stop_at):
            kept = {"plan": asdict(plan), "model": model.state_dict(), "step": done, "curve": curve}
            save(state_file, kept | {"optimizers": [optimizer.state_dict() for optimizer in optimizers]})
        if done == stop_at:
            break
    model.eval()
    return curve
