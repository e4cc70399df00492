"""The switches of run_llama.py: read, and refused where they do not go together."""

import argparse
from dataclasses import dataclass
from pathlib import Path

_SAMPLER_FLAGS = (
    "--temperature",
    "--top-k",
    "--top-p",
    "--min-p",
    "--typical-p",
    "--epsilon-cutoff",
    "--eta-cutoff",
    "--repetition-penalty",
    "--no-repeat-ngram-size",
)


@dataclass(frozen=True)
class Defaults:
    """What is measured where nothing is said: sizes in rows and tokens, and how often."""

    batch_sizes: list[int]
    prompt_lengths: list[int]
    new_tokens: list[int]
    warmup: int
    runs: int


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message} (--help lists what is possible)\n")


def _size(text: str) -> int:
    return _at_least(1, text)


def _count(text: str) -> int:
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"{value} is below {least}")
    return value


def _sizes(text: str) -> list[int]:
    return [_size(part) for part in text.split(",")]


def _words(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty")
    return text


def _parser(about: str | None, defaults: Defaults) -> argparse.ArgumentParser:
    parser = _Parser(description=about, allow_abbrev=False)
    what = parser.add_argument_group("what runs")
    what.add_argument(
        "--model",
        help="demo, random:NAME, inflated:NAME, a checkpoint's folder or hub name (demo)",
    )
    what.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"))
    what.add_argument("--device", help="auto, cpu, cuda, ... (auto)")
    what.add_argument("--preallocate", action="store_true", default=None, help="run ours beside vanilla transformers")
    what.add_argument(
        "--compile",
        choices=("no", "static", "dynamic", "fullgraph", "native"),
        help="compile ours, or without --preallocate vanilla's forward; fullgraph is another word for static; native "
        "is one C++ call a step",
    )
    what.add_argument(
        "--static-cache",
        action="store_true",
        default=None,
        help="transformers' own model with its StaticCache of --cache-length positions",
    )
    what.add_argument("--bucket", type=_size, help="cache positions that a step reads are rounded up to this")
    what.add_argument("--prefill-chunk", type=_size, help="prompt tokens per prefill pass")
    what.add_argument("--fuse", help="which products that share an input run as one: all, qkv or no")
    what.add_argument("--weights", help="hold the weights in fewer bits: int8, int4, int4-g32 to int4-g256 or float8")
    what.add_argument(
        "--cache-k", "-ctk", help="how keys are stored: f32 f16 bf16 int8 q8_0 q4_0 q4_1 q5_0 q5_1 iq4_nl"
    )
    what.add_argument("--cache-v", "-ctv", help="how values are stored: the same")
    what.add_argument(
        "--tensor-parallel",
        action="store_true",
        help="the processes that torchrun --nproc-per-node N started hold one model together",
    )
    what.add_argument("--cache-device", metavar="cpu", help="keep keys, values and attention there, off an accelerator")
    _add_context(parser.add_argument_group("texts longer than the cache, or than the model was made for"))
    sizes = parser.add_argument_group("sizes (comma lists make a product)")
    sizes.add_argument("--batch-size", type=_sizes, help=f"rows ({defaults.batch_sizes})")
    sizes.add_argument("--prompt-length", type=_sizes, help=f"tokens of the longest row ({defaults.prompt_lengths})")
    sizes.add_argument("--new-tokens", type=_sizes, help=f"tokens to generate ({defaults.new_tokens})")
    sizes.add_argument(
        "--cache-length",
        type=_size,
        help="positions to reserve, used or not (prompt + new tokens)",
    )
    sizes.add_argument("--prompt-file", help="UTF-8 text to cut prompts from (the demo's held-out text)")
    sizes.add_argument("--seed", type=_count, help="which places of the text, and where draws begin (0)")
    drawing = parser.add_argument_group("the sampler (transformers' names and meanings; greedy by default)")
    drawing.add_argument("--do-sample", action="store_true", default=None, help="draw each token")
    for flag in _SAMPLER_FLAGS:
        drawing.add_argument(flag, metavar="X")
    _add_assistance(parser.add_argument_group("assistance (ours is timed with it and without, in turns)"))
    many = parser.add_argument_group("many prompts (ours generates for each of them, and nothing is measured)")
    many.add_argument("--prompts", metavar="FILE", help='a JSON object a line: {"prompt": "text"}')
    many.add_argument(
        "--out", metavar="FILE", help="a JSON object a line for each of them; resumes what was interrupted"
    )
    many.add_argument("--slots", type=_size, metavar="N", help="prompts that are decoded together (8)")
    how = parser.add_argument_group("how it is measured")
    what.add_argument("--products", help="how a CPU multiplies: auto, stock, native or packed")
    how.add_argument("--runs", type=_size, help=f"timed runs ({defaults.runs}; 10 in a sweep)")
    how.add_argument("--warmup", type=_count, default=defaults.warmup, help="runs before them (%(default)s)")
    how.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="WHAT",
        help="batch (1 to 128), length (prompts of 100 to 1600 tokens), name=value,value,... for any option above, "
        "FILE.toml, or the name of a table that ships with the package, such as memory-table; several make a product",
    )
    how.add_argument("--dry-run", action="store_true", help="print the points, about how long they take, and stop")
    how.add_argument("--retry-failed", action="store_true", help="with --sweep: measure failed points again")
    how.add_argument("--profile", action="store_true", help="trace one run of 10 new tokens instead of timing")
    how.add_argument("--memory-profile", action="store_true", help="watch the memory of one run instead of timing it")
    how.add_argument(
        "--memory-only",
        action="store_true",
        help="predict and measure the peak of memory of what runs, by one run of it, and time nothing",
    )
    how.add_argument("--profile-point", metavar="NAME", help="the one point to profile, such as batch_size=8")
    out = parser.add_argument_group("what is kept")
    out.add_argument("--json", type=Path, metavar="FILE", help="append each point as one line; a sweep resumes from it")
    out.add_argument("--format", choices=("md", "csv", "json", "jsonl", "sqlite"), help="print the points as this")
    out.add_argument("--output", type=Path, metavar="FILE", help="with --format: write them there instead")
    out.add_argument("--record", type=_words, metavar="WHAT", help="add a row to changes.md: what changed")
    out.add_argument("--predict", type=_words, metavar="TEXT", help="with --record: what you expect")
    out.add_argument("--commit", metavar="SHA", help="with --record, in a copied tree: the commit it is a copy of")
    out.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def flags() -> set[str]:
    """Every name by which a switch can be given."""
    return set(_parser(None, Defaults([1], [1], [1], 0, 1))._option_string_actions)


def _add_context(group) -> None:
    group.add_argument(
        "--context-shift",
        action="store_true",
        default=None,
        help="when the cache of --cache-length positions is full, drop the older half behind --keep tokens and go on",
    )
    group.add_argument("--keep", metavar="N", help="tokens of the prompt that are never dropped; -1 is all of it (0)")
    group.add_argument("--grp-attn-n", "-gan", metavar="N", help="self-extend: tokens that share a position (1: off)")
    group.add_argument("--grp-attn-w", "-gaw", metavar="W", help="self-extend: tokens of a window (512)")


def _add_assistance(group) -> None:
    group.add_argument("--draft", metavar="MODEL", help="a smaller model that drafts tokens: demo-draft, a folder, ...")
    group.add_argument(
        "--prompt-lookup", metavar="N", help="draft up to N tokens from where the context has the last ones"
    )
    group.add_argument(
        "--draft-tokens", metavar="K", help="tokens that a draft proposes at a time (6; at most 12 if they adapt)"
    )
    group.add_argument(
        "--draft-schedule",
        metavar="HOW",
        help="how K follows what is accepted: constant, heuristic or adaptive (adaptive)",
    )
    group.add_argument(
        "--draft-weights",
        metavar="FORMAT",
        help="hold the draft in fewer bits; without --draft, the model's own weights",
    )
    group.add_argument(
        "--p-split", metavar="P", help="a draft's branch splits for candidates more probable than this (0.1)"
    )
    group.add_argument(
        "--draft-branches",
        metavar="B",
        help="branches of a draft at most, all verified in one pass (1; 4 with --p-split)",
    )
    group.add_argument(
        "--draft-window",
        metavar="N",
        help="of a longer prompt the draft reads the first token and the last, so many in all; "
        "0: all (as it is made for)",
    )
    group.add_argument("--draft-device", metavar="WHERE", help="cpu, cuda, ...: where the draft runs (the target's)")
    group.add_argument(
        "--task",
        choices=("decode", "benchmark", "lookup"),
        help="a table of examples in place of a point: ten short prompts; prompts of 256 to 1968 tokens; or prompts "
        "whose answer repeats them",
    )


def parse(argv: list[str], about: str | None, defaults: Defaults) -> argparse.Namespace:
    """None of each switch that was not given, but for --warmup and flags that say only how to measure.

    `about` is what --help begins with. What does not go together ends the program with one sentence and exit code 2.
    """
    parser = _parser(about, defaults)
    options = parser.parse_args(argv)
    if options.record is None and (options.predict is not None or options.commit is not None):
        parser.error("--predict and --commit belong to --record")
    if options.output is not None and options.format is None:
        parser.error("--output belongs to --format")
    if options.profile and options.memory_profile:
        parser.error("--profile would be part of what --memory-profile sees: run one after the other")
    profiled = "--profile" if options.profile else "--memory-profile" if options.memory_profile else None
    if profiled and (options.json or options.record or options.format):
        left = "a trace" if options.profile else "a timeline"
        parser.error(f"{profiled} leaves {left} and no record: leave out --json, --record and --format")
    assisted = next((name for name in ("draft", "draft_weights", "prompt_lookup") if getattr(options, name)), None)
    if profiled and assisted:
        parser.error(f"{profiled} shows plain steps: leave out --{assisted.replace('_', '-')}")
    if options.profile_point is not None and profiled is None:
        parser.error("--profile-point belongs to --profile and --memory-profile")
    if options.memory_only and (profiled or options.record):
        parser.error("--memory-only measures no speed: leave out --profile, --memory-profile and --record")
    if options.retry_failed and not options.sweep:
        parser.error("--retry-failed belongs to --sweep")
    if options.dry_run and (profiled or options.record):
        parser.error("--dry-run measures nothing: leave out --profile, --memory-profile and --record")
    if options.task is not None:
        _refuse(parser, options, ("new_tokens", *_MEASURED), "--task has its own prompts and its own table")
    _check_prompts(parser, options)
    if options.tensor_parallel:
        names = ("task", "sweep", "dry_run", "profile", "memory_profile", "memory_only", "static_cache")
        _refuse(parser, options, names, "--tensor-parallel measures points or generates for --prompts")
    return options


# What a file of prompts and a task of examples have no use for: they bring their own sizes and their own output.
_MEASURED: tuple[str, ...] = (
    "batch_size",
    "prompt_length",
    "prompt_file",
    "sweep",
    "dry_run",
    "retry_failed",
    "profile",
    "memory_profile",
)
_MEASURED += ("memory_only", "profile_point", "record", "format")


def _refuse(parser: argparse.ArgumentParser, options: argparse.Namespace, names: tuple[str, ...], why: str) -> None:
    given = next((name for name in names if getattr(options, name)), None)
    if given is not None:
        parser.error(f"{why}: leave out --{given.replace('_', '-')}")


def _check_prompts(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """--prompts and --out go together, and beside them stands what says how to generate."""
    if (options.prompts is None) != (options.out is None) or (options.slots and options.prompts is None):
        parser.error(
            "--prompts, --out and --slots go together: what to generate for, where to write it, how many at once"
        )
    if options.prompts is not None:
        names = ("task", *_MEASURED, "json", "static_cache", "draft", "runs", "prompt_lookup", "draft_weights")
        _refuse(parser, options, names, "--prompts has its own prompts and measures nothing")
        if len(options.new_tokens or [1]) > 1:
            parser.error("--prompts takes one --new-tokens; a line of the file can have its own max_new_tokens")
