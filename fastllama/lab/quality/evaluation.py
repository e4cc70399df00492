"""python -m fastllama.lab eval: what a low precision costs in quality, against vanilla on the same text."""

import argparse
import math
import shlex
import time
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from transformers.utils import logging

from fastllama import FastConfig, demo
from fastllama.decode.context.choose import shifts
from fastllama.lab.measuring import checkpoint
from fastllama.lab.measuring.checkpoint import Checkpoint
from fastllama.lab.measuring.environment import environment
from fastllama.lab.measuring.progress import progress
from fastllama.lab.points import workload
from fastllama.lab.points.option import OPTIONS, words
from fastllama.lab.points.point import Point
from fastllama.lab.points.workload import Workload
from fastllama.lab.quality import quality, score_file, score_table, windows
from fastllama.lab.quality.quality import Reference
from fastllama.lab.quality.score_file import AGAINST
from fastllama.lab.records import digest
from fastllama.lab.records.sources import source_sha256

TOKENS = 20_000
_SWITCHES = [field.name for field in fields(FastConfig)]
_PROMPTS = Workload(batch_size=4, prompt_length=64, new_tokens=64)


@dataclass(frozen=True)
class Subject:
    """values: by option name, `dtype` and switches, as they were given."""

    values: dict

    @property
    def name(self) -> str:
        return ",".join(f"{name}={words(value)}" for name, value in self.values.items()) or "ours"

    @property
    def switches(self) -> dict:
        return {name: value for name, value in self.values.items() if name != "dtype"}

    @property
    def step_tokens(self) -> int:
        """A compiled step takes one token."""
        return quality.STEP_TOKENS if self.switches.get("compile", "no") in ("no", "native") else 1


def _value(name: str, word: str):
    if name not in ("dtype", *_SWITCHES):
        raise ValueError(f"{name!r} is no switch of a subject; there are dtype, {', '.join(_SWITCHES)}")
    return OPTIONS[name].value(word)


def _of_word(word: str) -> dict:
    """The values of one --subject."""
    values = {}
    for part in word.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        name = name.replace("-", "_")
        if not equals:
            raise ValueError(f"--subject {word!r} is not name=value,name=value,...")
        if name in values:
            raise ValueError(f"--subject {word!r} gives {name} twice")
        values[name] = _value(name, value)
    return values


def subjects(given: dict[str, list[str]], single: list[str]) -> list[Subject]:
    """What is scored: the product of the flags' comma lists, and of that with each --subject.

    `ValueError` for a name or a value that is not allowed, or a name that is given both ways.
    """
    lists = {
        name: [_value(name, word) for text in texts for word in text.split(",") if word.strip()]
        for name, texts in given.items()
    }
    empty = next((name for name, values in lists.items() if not values), None)
    if empty is not None:
        raise ValueError(f"{empty} has no value; allowed: {OPTIONS[empty].allowed}")
    made = []
    for combination in product(*lists.values()):
        flags = dict(zip(lists, combination, strict=True))
        for own in [_of_word(word) for word in single] or [{}]:
            twice = sorted(flags.keys() & own.keys())
            if twice:
                raise ValueError(f"{twice[0]} is given both as a flag and in --subject")
            config = FastConfig(**{name: value for name, value in (flags | own).items() if name != "dtype"})
            if shifts(config):
                raise ValueError(
                    "context_shift=true cannot be scored here: windows of a text never fill the cache; "
                    "python -m fastllama.lab context scores it"
                )
            if flags | own not in made:
                made.append(flags | own)
    return [Subject(values) for values in made]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments to its parser."""
    parser.add_argument("--model", default="demo", help="demo, inflated:NAME, a checkpoint's folder or hub name (demo)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (auto)")
    parser.add_argument(
        "--against",
        choices=AGAINST,
        default="fp32",
        help="vanilla transformers in this dtype, or ours as it is without switches (fp32)",
    )
    lists = parser.add_argument_group("what is scored (comma lists, or flags given again, make a product)")
    lists.add_argument("--dtype", action="append", metavar="LIST", help="fp32, bf16, fp16 or auto (auto)")
    short = {"cache_k": ["-ctk"], "cache_v": ["-ctv"]}
    for name in _SWITCHES:
        flags = ["--" + name.replace("_", "-"), *short.get(name, [])]
        allowed = OPTIONS[name].allowed.replace("%", "%%")
        lists.add_argument(*flags, dest=name, action="append", metavar="LIST", help=allowed)
    lists.add_argument(
        "--subject",
        action="append",
        default=[],
        metavar="NAME=VALUE,...",
        help="switches that go together, such as cache_k=q8_0,cache_v=q4_0; again for each further subject",
    )
    parser.add_argument("--file", help="UTF-8 text to score on (the demo's held-out text)")
    parser.add_argument("--tokens", type=int, help=f"tokens of it, from its start ({TOKENS}, or all there are)")
    parser.add_argument("--window", type=int, default=quality.WINDOW, help="tokens a prediction can see (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append each subject as one sealed line")


def _command(given: argparse.Namespace, subject: Subject, dtype: str, tokens: int) -> str:
    """The command line that scores this subject alone; a path is given by its last part."""
    model = Point(given.model, dtype, "cpu", Workload()).model_name
    line = ["python", "-m", "fastllama.lab", "eval", "--model", model, "--against", given.against, "--dtype", dtype]
    for name, value in subject.switches.items():
        line += ["--" + name.replace("_", "-"), words(value)]
    line += [] if given.file is None else ["--file", Path(given.file).name]
    return shlex.join([*line, "--tokens", str(tokens), "--window", str(given.window)])


class _Evaluation:
    """One checkpoint, one text and one reference, for several subjects."""

    def __init__(self, given: argparse.Namespace):
        self.given = given
        single = {name: found for name in ("dtype", *_SWITCHES) if (found := getattr(given, name)) is not None}
        wanted = subjects(single, given.subject)
        if demo.is_random(given.model):
            raise ValueError(f"{given.model} has random weights, which say nothing about quality: score another model")
        given.device = checkpoint.auto_device() if given.device == "auto" else checkpoint.check_device(given.device)
        self.subjects = [(subject, self._dtype(subject)) for subject in wanted]
        dtypes = list(dict.fromkeys(dtype for _, dtype in self.subjects))
        if given.against == "ours" and len(dtypes) > 1:
            raise ValueError(f"--against ours takes one --dtype, not {', '.join(dtypes)}")
        # A model that is built is built in the first dtype, as run_llama.py would build it.
        self.found: Checkpoint = checkpoint.find(given.model, self._point(dtypes[0], None, 2).torch_dtype)
        self.tokenizer = checkpoint.tokenizer(self.found)
        longest = self.found.config.max_position_embeddings
        if not 2 <= given.window <= longest:
            raise ValueError(f"--window {given.window} is not allowed: {given.model} takes 2 to {longest} positions")
        self.text = windows.text(self.tokenizer, given.tokens, given.window, given.file)
        if given.tokens is None and self.text.tokens > TOKENS:
            self.text = windows.text(self.tokenizer, TOKENS, given.window, given.file)
        prompt_length = min(_PROMPTS.prompt_length, self.text.tokens, max(longest - _PROMPTS.new_tokens, 1))
        new_tokens = min(_PROMPTS.new_tokens, longest - prompt_length)
        self.work = replace(_PROMPTS, prompt_length=prompt_length, new_tokens=new_tokens, prompt_file=given.file)
        self.prompts = workload.prompt(self.work, self.tokenizer)
        self.positions = max(given.window, self.work.total_length)

    def _dtype(self, subject: Subject) -> str:
        word = subject.values.get("dtype", "auto")
        return checkpoint.auto_dtype(self.given.model, self.given.device) if word == "auto" else word

    def _point(self, dtype: str, switches: dict | None, positions: int) -> Point:
        return quality.point(self.given.model, dtype, self.given.device, positions, switches)

    def reference(self) -> Reference:
        """The reference's logits and greedy ids."""
        against, dtype = self.given.against, self.subjects[0][1]
        point = self._point(dtype, {}, self.positions) if against == "ours" else self._point(against, None, 2)
        return quality.make_reference(point, self.found, self.text, self.prompts, self.work.new_tokens)

    def line(self, subject: Subject, dtype: str, reference: Reference) -> dict:
        """What one subject scores, sealed."""
        started = time.perf_counter()
        point = self._point(dtype, subject.switches, self.positions)
        with quality.loaded(point, self.found) as model:
            found = quality.compare(model, reference, subject.step_tokens)
            greedy = quality.greedy(model, self.prompts, self.work.new_tokens)
            path, reserved_bytes = model.path, model.reserved_bytes
        same, divergence = quality.first_divergence(greedy, reference.greedy)
        identity = point.identity()
        return digest.seal(
            {
                "schema": score_file.SCHEMA,
                **{name: identity[name] for name in ("model", "dtype", "device")},
                "against": self.given.against,
                "switches": identity["switches"],
                "switch_defaults": point.switch_defaults(),
                "path": path,
                "reserved_bytes": reserved_bytes,
                "text": {name: getattr(self.text, name) for name in ("name", "sha256", "tokens", "window")},
                "score": asdict(found),
                "greedy": {
                    "prompts": len(greedy.ids),
                    "prompt_length": self.work.prompt_length,
                    "new_tokens": self.work.new_tokens,
                    "same": same,
                    "first_divergence": None if divergence is None else _finite(asdict(divergence)),
                },
                "seconds": time.perf_counter() - started,
                "environment": environment(torch.device(self.given.device)),
                "command": _command(self.given, subject, dtype, self.text.tokens),
                "source_sha256": source_sha256(),
                "recorded_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            }
        )


def _finite(divergence: dict) -> dict:
    return {**divergence, "margin": divergence["margin"] if math.isfinite(divergence["margin"]) else None}


def run(given: argparse.Namespace) -> int:
    """Score the subjects and print them; each is on disk, with --json, before the next begins. The exit code."""
    if given.json is not None and not given.json.resolve().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {given.json.parent} to write {given.json.name} in")
    logging.disable_progress_bar()  # one bar at a time
    evaluation = _Evaluation(given)
    lines = []
    with progress(1 + len(evaluation.subjects)) as begin:
        begin("reference")
        reference = evaluation.reference()
        for subject, dtype in evaluation.subjects:
            begin(subject.name)
            lines.append(evaluation.line(subject, dtype, reference))
            if given.json is not None:
                score_file.append(given.json, lines[-1])
    Console().print(score_table.table(lines))
    return 0
