"""The second table: the mean of each setting over the prompts, and of each option over its settings."""

import statistics
from itertools import groupby

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fastllama.lab.options.aggregate import CHANGED, NO_EFFECT, NONE, SKIPPED
from fastllama.lab.pages.table import number

ALL = "all"
_KEYS: tuple[str, ...] = ("perplexity", "distinct_1", "distinct_2", "distinct_3", "repetition", "new_tokens")
_TIMES = ("load_ms", "sample_ms_mean", "prompt_eval_ms_mean", "eval_ms_mean", "total_ms_mean", "eval_tok_per_s_mean")
_KEYS += (*_TIMES, "sequences_tok_per_s_mean")


def means(rows: list[dict]) -> list[dict]:
    """A row for each setting, and one named "all" for an option of several."""
    made = []
    for option, each_of in groupby(rows, key=lambda row: row["option"]):
        own = list(each_of)
        by_name = {name: list(each) for name, each in groupby(own, key=lambda row: row["name"])}
        made += [_mean(option, name, each) for name, each in by_name.items()]
        if len(by_name) > 1:
            made.append(_mean(option, ALL, own))
    return made


def _mean(option: str, name: str, rows: list[dict]) -> dict:
    ran = [row for row in rows if row["effect"] != SKIPPED]
    changed = [row["first_difference"] for row in ran if row["effect"] == CHANGED]
    found = {
        "option": option,
        "name": name,
        "flags": rows[0]["flags"] if name != ALL else "",
        "texts": len(ran),
        "skipped": len(rows) - len(ran),
        "changed": len(changed),
        "no_effect": sum(row["effect"] == NO_EFFECT for row in ran),
        "first_difference_median": statistics.median(changed) if changed else NONE,
        "reason": "; ".join(dict.fromkeys(row["reason"] for row in rows if row["reason"])),
    }
    for key in _KEYS:
        values = [row[key] for row in ran if row.get(key) not in (None, "")]
        if values:
            found[f"{key}_mean" if not key.endswith("_mean") else key] = statistics.fmean(values)
    return found


def words_of(row: dict) -> str:
    """What a mean row says of its effect."""
    if row["texts"] == 0:
        return "skipped"
    if row["changed"] == 0:
        return "default" if row["no_effect"] == 0 else "no effect"
    return f"{row['changed']} of {row['texts']}"


_TEXTS = (("perplexity", "perplexity_mean"), ("distinct-2", "distinct_2_mean"), ("repetition", "repetition_mean"))
_TIMINGS = (
    ("load ms", "load_ms_mean"),
    ("sample", "sample_ms_mean"),
    ("prompt", "prompt_eval_ms_mean"),
    ("eval", "eval_ms_mean"),
    ("total", "total_ms_mean"),
    ("eval tok/s", "eval_tok_per_s_mean"),
)


def printed(title: str, rows: list[dict]) -> Group:
    """The means, for people; why something had no effect or was skipped stands below."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["reason"] and row["name"] != ALL:
            reasons.setdefault(row["reason"], []).append(row["name"])
    notes = [
        "from token: the median of the first tokens that are not the default's; perplexity: of the text under the "
        "model in fp32; distinct-2: distinct pairs of tokens over pairs; repetition: share of 4-grams that occurred "
        "before"
    ]
    notes += [f"{', '.join(names)}: {words}" for words, names in reasons.items()]
    texts = _table(title, ("changed", "from token"), _TEXTS, rows)
    times = _table("mean timings of a run", (), _TIMINGS, rows)
    return Group(texts, *map(Text, notes), Text(), times)


def _table(title: str, heads: tuple[str, ...], columns, rows: list[dict]) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title=title, title_justify="left")
    for name in ("option", "setting"):
        shown.add_column(name, no_wrap=True)
    for name in (*heads, *(name for name, _ in columns)):
        shown.add_column(name, justify="right", no_wrap=True)
    before = None
    for row in rows:
        if before not in (None, row["option"]):
            shown.add_section()
        first = row["first_difference_median"]
        cells = [words_of(row), "-" if first == NONE else f"{first:g}"][: len(heads)]
        figures = [number(row.get(key)) for _, key in columns]
        shown.add_row(row["option"] if row["option"] != before else "", row["name"], *cells, *figures)
        before = row["option"]
    return shown
