"""The means of a sweep as a small file under tb_logs/options, and README's table of it. It holds no timings."""

from collections.abc import Callable
from pathlib import Path

import torch

from fastllama.lab.options import means
from fastllama.lab.options.aggregate import NONE
from fastllama.lab.records import changes, words
from fastllama.lab.records.sources import ROOT

FOLDER = f"{words.LOGS}/options"
NONE_YET = "No sweep is kept yet: `python -m fastllama.lab options --json FILE`.\n"
_KEPT: tuple[str, ...] = (
    "option",
    "name",
    "flags",
    "texts",
    "skipped",
    "changed",
    "no_effect",
    "first_difference_median",
    "reason",
)
_KEPT += (
    "perplexity_mean",
    "distinct_1_mean",
    "distinct_2_mean",
    "distinct_3_mean",
    "repetition_mean",
    "new_tokens_mean",
)
_HEADS = [
    "option",
    "setting",
    "texts changed",
    "from token",
    "perplexity",
    "distinct-2",
    "repetition",
    "why nothing changed",
]
_RIGHT = tuple(_HEADS[3:7])


def content(plan, mean: list[dict], source: str, environment: Callable[[torch.device], dict]) -> dict:
    """JSON-ready. `source`: the hash of the sources that ran."""
    return {
        "model": plan.source.path_word,
        "dtype": plan.dtype,
        "device": plan.device,
        "seed": plan.seed,
        "new_tokens": plan.new_tokens,
        "prompts": [prompt.name for prompt in plan.prompts],
        "prompt_sha256": [prompt.sha256 for prompt in plan.prompts],
        "compile": plan.compile,
        "runs": plan.runs,
        "defaults": plan.defaults,
        "source_sha256": source,
        "environment": environment(torch.device(plan.device)),
        "means": [{name: row[name] for name in _KEPT if name in row} for row in mean],
    }


def write(path: Path, plan, mean: list[dict], source: str, environment: Callable[[torch.device], dict]) -> None:
    """Raises `OSError` where there is no folder for it."""
    words.dump_json(path, content(plan, mean, source, environment))


def _row(row: dict) -> list[str]:
    first = row["first_difference_median"]
    return [
        row["option"],
        row["name"] + (f": `{changes.cell(row['flags'])}`" if row["flags"] else ""),
        means.words_of(row),
        "-" if first == NONE else f"{first:g}",
        changes.number(row.get("perplexity_mean")),
        changes.number(row.get("distinct_2_mean"), 2),
        changes.number(row.get("repetition_mean"), 2),
        changes.cell(row["reason"]) or ("not known" if means.words_of(row) == "no effect" else ""),
    ]


def table(records: list[dict] | None = None, root: Path = ROOT) -> str:
    """The means that tb_logs/options holds, a table for each file."""
    parts = []
    for path in sorted((Path(root) / FOLDER).glob("*.json")):
        kept = words.load_json(path)
        about = (
            f"[{path.stem}]({path.relative_to(root).as_posix()}): {kept['model']} {kept['dtype']} on {kept['device']}, "
            f"{len(kept['prompts'])} prompts, at most {kept['new_tokens']} new tokens, seed {kept['seed']}:"
        )
        rows = [_row(row) for row in kept["means"] if row["name"] != means.ALL]
        parts.append(f"{changes.cell(about)}\n\n{changes.table(_HEADS, rows, _RIGHT)}")
    return "\n".join(parts) or NONE_YET
