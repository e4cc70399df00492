"""The table of scores that `eval` prints, and the one of the kept ones in README."""

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fastllama.lab import score
from fastllama.lab.changes import cell
from fastllama.lab.changes import table as markdown
from fastllama.lab.option import OPTIONS

HEADS = ("subject", "perplexity", "change", "mean KL", "p99 KL", "top-1", "same", "first other", "margin", "cache MB")
_RIGHT = HEADS[1:]
_BROKEN = {"perplexity": "per-\nplexity"}

WORDS = (
    "KL divergence of the reference from the subject, nats a token; top-1: share of positions with the same likeliest "
    "token; same: prompts with the same greedy text to the end; first other: the first token that is not the "
    "reference's, and how much the reference preferred its own to the next best; cache: and its tables"
)


def name(line: dict) -> str:
    """The switches that are not at their default, in one line."""
    given = {
        name: value
        for name, value in line["switches"].items()
        if name in OPTIONS and name != "preallocate" and value != line["switch_defaults"].get(name)
    }
    return ", ".join([line["dtype"], *(f"{name} {value}" for name, value in given.items())])


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


def _row(line: dict) -> list[str]:
    found, greedy = line["score"], line["greedy"]
    first = greedy["first_divergence"] or {"position": None, "margin": None}
    return [
        name(line),
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
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    made.add_column(HEADS[0], overflow="fold", min_width=14)
    for head in _RIGHT:
        made.add_column(_BROKEN.get(head, head.replace(" ", "\n")), justify="right", no_wrap=True)
    for line in lines:
        made.add_row(*map(Text, _row(line)))
    paths = (Text(f"{name(line)}: {line['path']}") for line in lines)
    return Group(Text(title(lines[0])), made, Text(WORDS), *paths)


def in_markdown(lines: list[dict]) -> str:
    """One table for each model, text and reference."""
    groups: dict[str, list[dict]] = {}
    for line in lines:
        groups.setdefault(title(line), []).append(line)
    parts = [
        f"{cell(title_)}:\n\n{markdown(list(HEADS), [list(map(cell, _row(line))) for line in group], _RIGHT)}"
        for title_, group in groups.items()
    ]
    return "\n".join(parts)
