"""The rows of an option's table: of each setting and prompt, its runs as mean and spread beside the default's text."""

import statistics

from fastllama.lab.options.reason import Facts, reason
from fastllama.lab.options.setting import DEFAULT, Setting
from fastllama.lab.options.text_score import distinct, first_difference, repetition, text_hash
from fastllama.lab.options.timings import PHASES

NONE, SKIPPED, NO_EFFECT, CHANGED = "none", "skipped", "no effect", "changed"
NGRAMS = (1, 2, 3)
_RATES = ("ms", "ms_per_token", "tok_per_s")


def mean_and_sd(values: list[float]) -> tuple[float, float | None]:
    """Mean and standard deviation (n - 1); one value has none."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def _timings(records: list[dict]) -> dict:
    """Mean and spread of every timing that all runs have."""
    found, samples = {"load_ms": records[0]["timings"]["load_ms"]}, [record["timings"] for record in records]
    for phase in (*PHASES, "total"):
        if not all(f"{phase}_ms" in each for each in samples):
            continue
        found[f"{phase}_count"] = samples[0][f"{phase}_count"]
        for rate in _RATES:
            values = [each[f"{phase}_{rate}"] for each in samples]
            if None not in values:
                found[f"{phase}_{rate}_mean"], found[f"{phase}_{rate}_sd"] = mean_and_sd(values)
    return found


def _sequences(records: list[dict]) -> dict:
    if "sequences" not in records[0]:
        return {}
    served = [record["sequences"] for record in records]
    tokens = sum(map(len, served[0]["ids"]))
    mean, spread = mean_and_sd([tokens / each["seconds"] for each in served])
    return {
        "sequences": len(served[0]["ids"]),
        "slots": served[0]["slots"],
        "sequences_tokens": tokens,
        "sequences_tok_per_s_mean": mean,
        "sequences_tok_per_s_sd": spread,
    }


def effect(plan, setting: Setting, record: dict, default: dict | None) -> tuple[str, str | None]:
    """("default", "no effect" or "changed", why); empty where the default itself was skipped."""
    if setting.is_default:
        return "default", None
    if default is None:
        return "", "the default was skipped here"
    if first_difference(record["ids"], default["ids"]) is not None:
        return CHANGED, None
    tokens = record["prompt_tokens"] + len(record["ids"])
    facts = Facts(tokens, record["context"], record["default_context"], plan.device.partition(":")[0])
    return NO_EFFECT, reason(setting.given, setting.values(plan.defaults), plan.defaults, facts)


def rows_of(plan, setting: Setting, found) -> list[dict]:
    """A row for each prompt."""
    rows = []
    for prompt in plan.prompts:
        head = {
            "option": setting.option,
            "name": setting.name,
            "flags": setting.words,
            "model": plan.source.name,
            "prompt": prompt.name,
        }
        key = (setting.name, prompt.name)
        if key in found.skipped:
            rows.append({**head, "runs": 0, "effect": SKIPPED, "reason": found.skipped[key]})
            continue
        records = found.records[key]
        default = (found.records.get((DEFAULT, prompt.name)) or [None])[0]
        first, notes = records[0], list(records[0]["notes"])
        if any(record["ids"] != first["ids"] for record in records):
            notes.append("the runs differ: " + ", ".join(text_hash(record["ids"]) for record in records))
        word, why = effect(plan, setting, first, default)
        place = None if default is None else first_difference(first["ids"], default["ids"])
        rows.append(
            {
                **head,
                "runs": len(records),
                "effect": word,
                "reason": why or "",
                "hash": text_hash(first["ids"]),
                "first_difference": "" if default is None else NONE if place is None else place,
                "prompt_tokens": first["prompt_tokens"],
                "new_tokens": len(first["ids"]),
                "perplexity": first["perplexity"],
                **{f"distinct_{n}": distinct(first["ids"], n) for n in NGRAMS},
                "repetition": repetition(first["ids"]),
                **_timings(records),
                **_sequences(records),
                "path": first["path"],
                "notes": "; ".join(notes),
            }
        )
    return rows
