"""Files of tasks: one sealed JSON object a line for each example, of a schema of its own."""

import json
from pathlib import Path

from fastllama.lab import lines
from fastllama.lab.measuring import assisted
from fastllama.lab.points import figures
from fastllama.lab.points.fields import (
    agree,
    check,
    flag,
    hash8,
    name,
    number,
    object_,
    only_once,
    or_null,
    samples,
    scalar,
    sha256,
    small_count,
    small_size,
    text,
    word,
)
from fastllama.lab.records import digest, schema1
from fastllama.lab.records.schema2 import DIVERGENCE, check_environment
from fastllama.lab.tasks import cost, prompts

SCHEMA = 2
_READ = 1, SCHEMA  # of 1, most foretold gains without the drafted steps whose tokens were not worth verifying
_EXACT = 1e-9, 1e-12
_PARITIES = (*schema1.PARITIES, "lossy", "drawn")
_LINE = {
    "task_schema": small_count,
    "task": word(*prompts.NAMES),
    "example": name,
    "number": small_size,
    "examples": small_size,
    "model": name,
    "dtype": word(*schema1.DTYPES),
    "device": name,
    "batch_size": small_size,
    "prompt_length": small_size,
    "new_tokens": small_size,
    "cache_length": small_size,
    "seed": small_count,
    "sampler": object_,
    "switches": object_,
    "path": name,
    "runs": samples,
    "tok_per_s": number,
    "decode_tok_per_s": or_null(number),
    "ttft_ms": number,
    "prompt_hash": hash8,
    "hash": hash8,
    "reference_hash": hash8,
    "parity": word(*_PARITIES),
    "first_divergence": or_null(object_),
    "assisted": or_null(object_),
    "costs": or_null(object_),
    "predicted_speedup": or_null(number),
    "text_sample": text,
    "environment": object_,
    "command": name,
    "source_sha256": sha256,
    "digest": sha256,
}


def check_line(line, where: str) -> dict:
    """The line itself; `ValueError`, one sentence that starts with `where`, if it cannot be trusted."""
    try:
        if not isinstance(line, dict) or line.get("task_schema") not in _READ or isinstance(line["task_schema"], bool):
            raise ValueError("it is no line of a task (task_schema 1 or 2), as run_llama.py --task writes them")
        check(line, _LINE, closed=True)
        check(line["switches"], {"preallocate": flag, "compile": word(*schema1.COMPILES)}, "switches.")
        check(line["sampler"], dict.fromkeys(line["sampler"], scalar), "sampler.")
        check_environment(line)
        schema1.check_runs(line, closed=True)
        _check_content(line)
        digest.check(line)
    except (ValueError, OverflowError, RecursionError) as fault:
        raise ValueError(f"{where}: {fault}") from None
    return line


def _check_divergence(line: dict, divergence: dict, prefix: str = "first_divergence.") -> None:
    check(divergence, DIVERGENCE, prefix, closed=True)
    if divergence["row"] >= line["batch_size"] or divergence["position"] >= line["new_tokens"]:
        raise ValueError(f"field {prefix[:-1]} names a token that was not generated")


def _check_content(line: dict) -> None:
    derived = figures.summary(line["runs"], line["batch_size"], line["new_tokens"])
    for field in ("tok_per_s", "decode_tok_per_s", "ttft_ms"):
        agree(field, line[field], derived[field], *_EXACT)
    if line["cache_length"] < line["prompt_length"] + line["new_tokens"]:
        raise ValueError(f"field cache_length is {line['cache_length']}, too short for prompt and new tokens")
    schema1.check_parity(line)
    if line["first_divergence"] is not None:
        _check_divergence(line, line["first_divergence"])
    if line["assisted"] is not None:
        assisted.check_point(line, schema1.check_runs, _check_divergence, _EXACT)
    if line["costs"] is not None:
        cost.check_costs(line["costs"])
    predicted = cost.predicted(line)
    if line["task_schema"] == 1 and line["predicted_speedup"] != predicted:
        predicted = cost.predicted(line, refused=False)
    agree("predicted_speedup", line["predicted_speedup"], predicted, *_EXACT)


def append(path: Path, line: dict) -> None:
    """Add a line, on disk before this returns. `ValueError` if it does not follow the schema."""
    lines.append(path, json.dumps(check_line(line, f"a line for {path}"), allow_nan=False))


def require(path: Path) -> None:
    """`ValueError` or `OSError` if lines of a task cannot be added to a file: it holds others, or has no folder."""
    path = Path(path)
    if path.exists():
        read(path)
    elif not path.resolve().parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")


def read(path: Path) -> list[dict]:
    """Every line. `FileNotFoundError` if there is no file, `ValueError` naming the line that is wrong."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    kept = []
    for place, words in enumerate(lines.read(path), 1):
        where = f"{path} line {place}"
        try:
            line = json.loads(words, object_pairs_hook=only_once)
        except (ValueError, RecursionError):
            raise ValueError(f"{where}: not valid JSON") from None
        kept.append(check_line(line, where))
    return kept
