"""Measure a Llama: vanilla transformers, or ours beside it. `python run_llama.py --help` lists the switches."""

import argparse
import sys
import traceback
from pathlib import Path

from fastllama.lab.measuring import arguments

# What is measured without --batch-size, --prompt-length and --new-tokens. Several sizes make a product.
BATCH_SIZES = [1]
PROMPT_LENGTHS = [1000]
NEW_TOKENS = [200]
WARMUP_RUNS = 2
NUM_RUNS = 5

_HERE = Path(__file__).resolve().parent
# A clone has a log of its own; an installed copy keeps what it measures in the current folder.
LOGS = (_HERE if (_HERE / "setup.py").is_file() else Path()) / "tb_logs"


def _parse(argv: list[str]) -> argparse.Namespace:
    defaults = arguments.Defaults(BATCH_SIZES, PROMPT_LENGTHS, NEW_TOKENS, WARMUP_RUNS, NUM_RUNS)
    return arguments.parse(argv, __doc__, defaults)


def _given(options: argparse.Namespace) -> dict:
    """What was said of a point, by the names of its options."""
    from fastllama.lab.points.option import OPTIONS

    return {name: value for name in OPTIONS if (value := getattr(options, name)) is not None}


def _plan(options: argparse.Namespace):
    from fastllama.lab.sweeping import plan
    from fastllama.lab.tracing import trace

    defaults = {
        "batch_size": BATCH_SIZES,
        "prompt_length": PROMPT_LENGTHS,
        "new_tokens": [trace.NEW_TOKENS] if options.profile else NEW_TOKENS,
    }
    runs = options.runs or (1 if options.profile else plan.RUNS if options.sweep else NUM_RUNS)
    return plan.make(_given(options), options.sweep, defaults, runs, options.warmup)


def _run(options: argparse.Namespace) -> int:
    from fastllama.lab.devices.world import joined

    with joined(options.tensor_parallel, options.prompts is not None) as here:
        return _run_here(options, here)


def _run_here(options: argparse.Namespace, here) -> int:
    from huggingface_hub.utils import logging as hub_logging
    from rich.console import Console
    from transformers.utils import logging

    from fastllama import demo
    from fastllama.lab.measuring import measure, warnings
    from fastllama.lab.measuring.progress import progress
    from fastllama.lab.pages import table
    from fastllama.lab.prompts import many, several
    from fastllama.lab.records import export, record
    from fastllama.lab.sweeping import dry_run, sweep, sweep_table
    from fastllama.lab.tasks import command
    from fastllama.lab.tracing import timeline, trace

    logging.disable_progress_bar()  # one bar at a time
    hub_logging.set_verbosity_error()  # a hub out of reach is one error, not ten retries
    if options.task is not None:
        return command.run(options.task, _given(options), options.runs or NUM_RUNS, options.warmup, options.json)
    if options.prompts is not None:
        (new_tokens,) = options.new_tokens or NEW_TOKENS[:1]
        given = {name: value for name, value in _given(options).items() if name != "new_tokens"}
        how = (given, Path(options.prompts), Path(options.out), options.slots, new_tokens, print)
        return many.run(*how) if here.size == 1 else several.run(here, *how)
    if options.record is not None:
        record.check_recordable(options.commit)
    if options.format is not None:
        export.check_output(options.format, options.output, tuple(filter(None, [options.json])))
    plan = _plan(options).spread_over(here.size)
    if not here.first:
        options.json = options.record = options.output = None
    points = plan.points if options.profile_point is None else [plan.find(options.profile_point)]
    warnings.say(points)
    # Where the points go to stdout in a format, nothing else may.
    console = Console(stderr=options.format is not None and options.output is None)
    if options.profile:
        return trace.run(points, LOGS, console)
    if options.memory_profile:
        return timeline.run(points, LOGS, console)
    file = options.json
    if file is None and options.sweep:
        file = LOGS / "sweeps" / plan.file_name
    if options.dry_run:
        held = file if options.sweep else None
        console.print(dry_run.table(plan, held, options.retry_failed, options.memory_only))
        return 0
    if options.sweep:
        file.parent.mkdir(parents=True, exist_ok=True)

    def show(point: dict) -> None:
        console.print(table.point_table(point, demo.is_random(point["model"])))
        if options.record is not None:
            print(f"recorded: {record.save(point, options.record, options.predict, options.commit)}", file=console.file)

    steps = 3 * len(points) if options.memory_only else sum(measure.steps(point) for point in points)
    with progress(steps) as begin:
        again = {"resume": bool(options.sweep), "retry_failed": options.retry_failed}
        again["only_memory"] = options.memory_only
        entries = sweep.run(plan, file=file, begin=begin, show=show, say=_say, **again)
    if len(points) > 1:
        console.print(sweep_table.summary(plan, entries))
    if options.format is not None:
        export.write(entries, options.format, options.output)
    return sweep.exit_code(entries)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit code: 0, or 2 after an error (which is one sentence on stderr)."""
    options = _parse(sys.argv[1:] if argv is None else argv)
    try:
        return _run(options)
    except KeyboardInterrupt:
        _say("interrupted; what was measured is kept")
        return 130
    except Exception as fault:
        if options.debug:
            traceback.print_exc()
            return 2
        from fastllama.lab.fault import sentence

        # A failure that nobody wrote a sentence for is a fault of this program, and says where to look.
        if isinstance(fault, (ValueError, OSError, MemoryError)):
            _say(f"error: {sentence(fault)}")
        else:
            _say(f"error: {type(fault).__name__}: {sentence(fault)} (--debug shows where)")
        return 2


if __name__ == "__main__":
    sys.exit(main())
