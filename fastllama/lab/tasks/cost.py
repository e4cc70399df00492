"""What steps cost, measured by themselves, and the gain that costs and acceptance foretell.

K drafted tokens of a round
"""

from statistics import median

import torch

from fastllama.decode.prompt import recent, unpad
from fastllama.lab.measuring import drafting
from fastllama.lab.points.fields import check, number, object_
from fastllama.lab.points.workload import Prompt
from fastllama.lab.suite.rounds import Lane

_SIZES = (2, 3, 4, 5, 7, 9, 13, 16)  # tokens of a verification
_ROUNDS, _STEPS = 3, 6
FIELDS = {"step_s": number, "draft_step_s": number, "verify_s": object_}


def measure(target, draft, prompt: Prompt, cache_length: int) -> dict:
    """Seconds of a step of the target with one and with several tokens, and of the draft (0 where none drafts).

    Medians of turns behind `prompt`, one row. verify_s: by the number of tokens, as a word.
    """
    room = cache_length - prompt.input_ids.shape[1]
    lanes: dict[int | str, Lane] = {
        size: Lane(f"verify_{size}", target, prompt, cache_length, size) for size in (1, *_SIZES)
    }
    held = prompt.input_ids.shape[1]
    lanes = {size: lane for size, lane in lanes.items() if room // int(size) > 1 and int(size) <= held}
    if draft is not None:
        lanes["draft"] = Lane("draft", draft, _shown(prompt, drafting.window(target, draft)), cache_length)
    taken: dict[int | str, list[float]] = {name: [] for name in lanes}
    for _ in range(_ROUNDS):
        for name, lane in lanes.items():
            lane.used = None  # lanes of one model begin anew
            taken[name].append(lane.seconds(_STEPS))
    seconds = {name: median(values) for name, values in taken.items()}
    draft_step_s = seconds.pop("draft", 0.0)
    return {
        "step_s": seconds[1],
        "draft_step_s": draft_step_s,
        "verify_s": {str(size): value for size, value in seconds.items()},
    }


def _shown(prompt: Prompt, most: int | None) -> Prompt:
    """What a draft reads of a prompt of one row."""
    if most is None or prompt.input_ids.shape[1] <= most:
        return prompt
    ids = recent(unpad(prompt.input_ids, prompt.attention_mask), most).tokens
    return Prompt(ids, torch.ones_like(ids))


def check_costs(costs: dict) -> None:
    """ValueError, naming the field, if the object is not what `measure` gives."""
    check(costs, FIELDS, "costs.", closed=True)
    check(costs["verify_s"], dict.fromkeys(costs["verify_s"], number), "costs.verify_s.")
    if "1" not in costs["verify_s"] or not all(word.isdecimal() for word in costs["verify_s"]):
        raise ValueError("field costs.verify_s must hold seconds by numbers of tokens, 1 among them")


def verify_s(costs: dict, tokens: float) -> float:
    """Seconds of a pass of so many tokens, on the lines between those measured, and on the last line beyond."""
    known = sorted((int(size), value) for size, value in costs["verify_s"].items())
    if len(known) == 1:
        return known[0][1]
    index = next((place for place, (size, _) in enumerate(known[1:]) if tokens <= size), len(known) - 2)
    (low, first), (high, second) = known[index], known[index + 1]
    return first + (second - first) * (tokens - low) / (high - low)


def seconds(
    costs: dict,
    drafted: float,
    acceptance: float,
    new_tokens: int,
    prefill: tuple[float, float],
    drafting: float | None = None,
) -> tuple[float, float]:
    """(unassisted, assisted) seconds of a call whose rounds draft K tokens, of which this share is accepted.

    A round gives 1 + K x acceptance tokens, and takes `drafting` steps of the draft (K) and one pass of K + 1 tokens.
    prefill: seconds to the first token, unassisted and assisted. new_tokens: N of a row.
    """
    rounds = (new_tokens - 1) / (1 + drafted * acceptance)
    round_s = (drafted if drafting is None else drafting) * costs["draft_step_s"] + verify_s(costs, 1 + drafted)
    return prefill[0] + (new_tokens - 1) * costs["step_s"], prefill[1] + rounds * round_s


def drafted_a_round(reports: list[dict]) -> float:
    """The mean K of the rounds after the prefill, those without a draft among them."""
    return a_round(reports, "draft_tokens")


def a_round(reports: list[dict], name: str) -> float:
    """What the reports count under `name`, over the rounds after the prefill."""
    rounds = sum(report["target_forwards"] - 1 for report in reports)
    return sum(report[name] for report in reports) / rounds if rounds > 0 else 0.0


def prefills(line: dict) -> tuple[float, float]:
    """Seconds to the first token of an assisted line, unassisted and assisted, with what the draft's prompt takes.

    Reports of earlier versions do not tell that apart: of their calls the passes alone are counted, not what generate
    does around them.
    """
    found = line["assisted"]
    plain = median(run["first_s"] for run in found["unassisted"]["runs"])
    if not all("draft_prefill_s" in report for report in found["reports"]):
        return plain, found["prefill_s"]
    own = median(run["first_s"] for run in line["runs"])
    return plain, own + median(report["draft_prefill_s"] for report in found["reports"])


def predicted_seconds(line: dict, refused: bool = True) -> tuple[float, float] | None:
    """(unassisted, assisted) as foretold for a measured line; None where it was not assisted.

    A step of the draft whose token was then not worth verifying is counted where `refused`.
    """
    found, costs = line["assisted"], line["costs"]
    if found is None or costs is None:
        return None
    reports, share = found["reports"], found["acceptance"] or 0.0
    drafting = a_round(reports, "draft_forwards") if refused else None
    return seconds(costs, drafted_a_round(reports), share, line["new_tokens"], prefills(line), drafting)


def predicted(line: dict, refused: bool = True) -> float | None:
    """The gain foretold for a measured line; None where it was not assisted."""
    both = predicted_seconds(line, refused)
    return None if both is None or not both[1] else both[0] / both[1]
