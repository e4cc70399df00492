"""--interactive: a turn for each line of standard input, the cache kept between them."""

import sys

import torch

from fastllama.lab.cli import loading, prompt, turns
from fastllama.lab.cli.answer import report
from fastllama.lab.cli.chooser import Chooser, stops
from fastllama.lab.cli.interrupt import Interrupt
from fastllama.lab.cli.session import Session
from fastllama.lab.cli.settings import Settings
from fastllama.lab.cli.stream import Detokenizer, write
from fastllama.lab.cli.stream import say as complain
from fastllama.lab.cli.timings import Timings
from fastllama.lab.fault import explained

_END = "/quit"
_FULL = "the cache of {} positions is full: begin anew with a larger --cache-length, or with --context-shift"


def run(settings: Settings, say, seed: int) -> None:
    """Answer until the input ends. Raises `ValueError`, `OSError` or `MemoryError` in one sentence."""
    timings = Timings()
    first = prompt.read(settings.run, say)
    place = loading.find(settings, say)
    chat = turns.of(place.tokenizer, settings.run.chat_template, settings.run.system_prompt)
    reserved, limit = loading.lengths(settings, place, 0)
    loaded = loading.load(settings, place, 1, 1, reserved, None)
    timings.loaded()
    torch.manual_seed(seed)
    chooser = Chooser(settings.sampling, loaded.eos if settings.run.ignore_eos else (), timings.chosen)
    ends = stops(place.tokenizer, settings.run.stop_strings)
    session = Session(loaded.model, chooser, loaded.eos, reserved, settings.config, ends)
    asks = _is_terminal() and not settings.run.quiet
    if asks:
        say(f"a turn for each line; {_END} or the end of file ends it, Ctrl-C ends an answer")
    interrupt = Interrupt()
    line = first
    while True:
        if line is None:
            if asks:
                sys.stderr.write("> ")
                sys.stderr.flush()
            line = _next_line()
        if line == "" or line.strip() == _END:
            break
        if line.strip():
            with interrupt.listening(), explained(f"{settings.run.model}, generating"):
                _answer(settings, session, chat, place.tokenizer, line, limit, timings, interrupt.stopped)
        line = None
    if not settings.run.quiet:
        say(f"{len(session.ids)} tokens were said, {session.cached} of them computed, each once")
        report(settings, place, loaded, timings, seed, say)


def _is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _next_line() -> str:
    try:
        line = sys.stdin.readline() if sys.stdin is not None else ""
        line.encode()
    except UnicodeError:
        raise ValueError("standard input is not UTF-8 text") from None
    return line


def _answer(settings, session: Session, chat, tokenizer, line: str, limit, timings: Timings, stopped) -> None:
    """One turn and what the model says to it."""
    try:
        ids = chat.ids(line)
    except ValueError as fault:
        complain(f"error: {fault}")
        return
    detokenizer, pieces = Detokenizer(tokenizer, session.ids[-8:] + ids), []

    def show(piece: str) -> None:
        pieces.append(piece)
        if settings.run.stream:
            write(piece)

    def take(token: int) -> None:
        timings.token()
        show(detokenizer.add(token))

    timings.start(len(session.ids) - session.cached + len(ids))
    try:
        finish = session.answer(ids, limit, take, stopped)
    except ValueError as fault:
        chat.refused()
        complain(f"error: {fault}")
        return
    show(detokenizer.end())
    chat.answered("".join(pieces))
    write("\n" if settings.run.stream else "".join(pieces) + "\n")
    if finish == "full":
        complain(_FULL.format(session.cache_length))
