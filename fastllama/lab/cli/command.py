"""fastllama COMMAND: the command line of the package, `generate`, `measure` and `serve`."""

import io
import os
import random
import sys
import traceback
from collections.abc import Sequence
from contextlib import contextmanager

from fastllama import __version__

_USAGE = """usage: fastllama generate [options]
       fastllama measure [options]
       fastllama serve [--fast NAME=VALUE,...] [MODEL] [options of transformers serve]
       fastllama --version

Text in, text out: fastllama generate -p "def main():" -n 64. `fastllama generate --help` lists the options.
OpenAI's API on http://localhost:8000/v1: fastllama serve; `fastllama serve --help` lists what it takes.
`fastllama measure` is run_llama.py, wherever the package is installed; `python -m fastllama.lab --help` lists the
laboratory's commands.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; the exit code: 0, 2 after an error (which is one sentence on standard error), 130 after Ctrl-C.

    A pipe that nobody reads any more ends it quietly.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        return _run(argv)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except KeyboardInterrupt:
        _say("")
        return 130
    except BrokenPipeError:
        # Python would complain at its end about what it could not write.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as fault:
        if "--debug" in argv:
            traceback.print_exc()
            return 2
        from fastllama.lab.fault import sentence

        # A failure that nobody wrote a sentence for is a fault of this program, and says where to look.
        if isinstance(fault, (ValueError, OSError, MemoryError)):
            _say(f"error: {sentence(fault)}")
        else:
            _say(f"error: {type(fault).__name__}: {sentence(fault)} (--debug shows where)")
        return 2


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _run(argv: list[str]) -> int:
    if argv and argv[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0
    if argv == ["--version"]:
        print(f"fastllama {__version__}")
        return 0
    if argv and argv[0] == "measure":
        import run_llama

        sys.argv[0] = "fastllama measure"  # what its help calls it
        return run_llama.main(argv[1:])
    if argv and argv[0] == "serve":
        from fastllama.lab.cli import serve

        return serve.run(argv[1:])
    if not argv or argv[0] != "generate":
        what = f"there is no command {argv[0]!r}" if argv else "no command was given"
        raise ValueError(f"{what}: there are generate, measure and serve (fastllama generate --help lists its options)")
    return _generate(argv[1:])


def _generate(argv: list[str]) -> int:
    from fastllama.lab.cli import dry_run, llama_cpp, settings
    from fastllama.lab.cli.parser import parse

    parsed = parse(argv)
    line, translation = parsed.values.get("from_llama_cpp"), None
    if line is not None:
        translation = llama_cpp.translate(line)
        parsed = llama_cpp.under(translation, parsed)
    made = settings.make(parsed)
    run = made.run
    say = (lambda text: None) if run.quiet else _say
    if run.dry_run:
        print("\n".join([*(translation.table() if translation else []), *dry_run.lines(made)]))
        return 0
    for text in translation.table() if translation else []:
        say(text)
    for text in _warnings(made):
        say(f"warning: {text}")
    from fastllama.lab.cli import answer, chat

    seed = run.seed if run.seed >= 0 else random.SystemRandom().randrange(2**31)
    with _set_up(run):
        (chat if run.interactive else answer).run(made, say, seed)
    return 0


def _warnings(made) -> list[str]:
    """What has no effect, where nothing else will say so."""
    from fastllama import demo
    from fastllama.lab.cli import orders

    sampling, found = made.sampling, []
    for name, letters in (("sampler_order", False), ("sampling_seq", True)):
        for sampler in orders.left_out(made.parsed.words.get(name, ""), letters):
            found.append(
                f"{made.parsed.name(name)}: {sampler} is not built and left out; llama.cpp has it off by default"
            )
    if sampling.is_greedy and not sampling.penalises:
        found += sampling.ignored
    if sampling.is_greedy and made.run.sequences > 1:
        found.append(f"{made.parsed.name('sequences')} {made.run.sequences}: greedy texts of a prompt are all the same")
    if made.run.parallel is not None and made.run.sequences == 1:
        found.append(f"{made.parsed.name('parallel')} has no effect: there is one text")
    if "grp_attn_w" in made.switches and made.config.grp_attn_n == 1:
        found.append(f"{made.parsed.name('grp_attn_w')} has no effect without --grp-attn-n")
    if "min_keep" in made.parsed.values and sampling.is_greedy:
        found.append(f"{made.parsed.name('min_keep')} has no effect: nothing is drawn")
    if demo.is_random(made.run.model):
        found.append(f"the weights of {made.run.model} are random: its text means nothing")
    return found


@contextmanager
def _set_up(run):
    """Threads and words of the libraries, put back afterwards."""
    import torch
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()  # a hub out of reach is one error, not ten retries
    if run.quiet:
        logging.set_verbosity_error()
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
