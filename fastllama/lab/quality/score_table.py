"""The table of scores that `eval` prints, and the one of the kept ones in README."""

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fastllama.lab.points.option import OPTIONS
from fastllama.lab.quality import score
from fastllama.lab.records.changes import cell
from fastllama.lab.records.changes import table as markdown

HEADS = ("subject", "perplexity", "change", "mean KL", "p99 KL", "top-1", "same", "first other", "margin", "cache MB")
_RIGHT = HEADS[1:]
_BROKEN = {"perplexity": "per-\nplexity"}

WORDS = (
    "KL divergence of the reference from the subject, nats a token; top-1: share of positions with the same likeliest "
    "token; same: prompts with the same greedy text to the end; first other: the first token that is not the "
    "reference's, and how much the reference preferred its own to the next best; cache: and its tables"
)


def _chosen(line: dict) -> dict[str, str]:
    """The dtype and the switches that are not at their default, each in words."""
    given = {
        name: f"{name} {value}"
        for name, value in line["switches"].items()
        if name in OPTIONS and name != "preallocate" and value != line["switch_defaults"].get(name)
    }
    return {"dtype": line["dtype"], **given}


def names(lines: list[dict]) -> tuple[list[str], str]:
    """(what tells each line from the others, what all have in common)."""
    chosen = [_chosen(line) for line in lines]
    if len(lines) == 1:
        return [", ".join(chosen[0].values())], ""
    common = dict(set.intersection(*(set(each.items()) for each in chosen)))
    own = [", ".join(words for name, words in each.items() if name not in common) for each in chosen]
    return [name or "none" for name in own], ", ".join(words for name, words in chosen[0].items() if name in common)


def title(line: dict) -> str:
    """What lines have in common that stand in one table."""
    against = "ours without switches" if line["against"] == "ours" else f"vanilla transformers in {line['against']}"
    text, greedy = line["text"], line["greedy"]
    return (
        f"{line['model']} on {line['device']} against {against}, whose perplexity is "
        f"{line['score']['reference_perplexity']:.4g}; {text['tokens']:,} tokens of {text['name']}, windows of "
        f"{text['window']}; greedy: {greedy['prompts']} prompts of {greedy['prompt_length']}, "
        f"{greedy['new_tokens']} new tokens"
    )


def _row(line: dict, name: str) -> list[str]:
    found, greedy = line["score"], line["greedy"]
    first = greedy["first_divergence"] or {"position": None, "margin": None}
    return [
        name,
        f"{found['perplexity']:.4g}",
        score.change(found),
        score.small(found["mean_kl"]),
        score.small(found["p99_kl"]),
        f"{100 * found['top1_agreement']:.1f} %",
        f"{greedy['same']}/{greedy['prompts']}",
        "-" if first["position"] is None else str(first["position"]),
        "-" if first["margin"] is None else score.small(first["margin"]),
        f"{line['reserved_bytes'] / 1e6:.2f}",
    ]


def table(lines: list[dict]) -> Group:
    """For a terminal, with the path that each subject took."""
    made = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    made.add_column(HEADS[0], overflow="fold", min_width=12)
    for head in _RIGHT:
        made.add_column(_BROKEN.get(head, head.replace(" ", "\n")), justify="right", no_wrap=True)
    own, common = names(lines)
    for line, name in zip(lines, own, strict=True):
        made.add_row(*map(Text, _row(line, name)))
    paths = (Text(f"{name}: {line['path']}") for line, name in zip(lines, own, strict=True))
    return Group(Text(_with(title(lines[0]), common)), made, Text(WORDS), *paths)


def _with(words: str, common: str) -> str:
    return f"{words}; all {common}" if common else words


def in_markdown(lines: list[dict]) -> str:
    """One table for each model, text and reference."""
    groups: dict[str, list[dict]] = {}
    for line in lines:
        groups.setdefault(title(line), []).append(line)
    parts = []
    for words, group in groups.items():
        own, common = names(group)
        rows = [list(map(cell, _row(line, name))) for line, name in zip(group, own, strict=True)]
        parts.append(f"{cell(_with(words, common))}:\n\n{markdown(list(HEADS), rows, _RIGHT)}")
    return "\n".join(parts)
