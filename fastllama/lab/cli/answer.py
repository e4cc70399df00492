"""One generation: the text of a prompt, or several texts of it."""

from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields

import torch

from fastllama.decode.sampling.options import Sampling
from fastllama.lab.cli import loading, prompt, sampling_clock
from fastllama.lab.cli.chooser import Chooser, stops
from fastllama.lab.cli.loading import Loaded, Place
from fastllama.lab.cli.session import Session
from fastllama.lab.cli.settings import Settings
from fastllama.lab.cli.stream import Collector, Detokenizer, write
from fastllama.lab.cli.timings import Timings
from fastllama.lab.fault import explained

_BETWEEN = "\n---\n"


@dataclass(frozen=True)
class Answer:
    """Why it ended: "stop" at an end of text or behind a stop string, or "length"."""

    text: str
    ids: tuple[int, ...]
    finish: str


def run(settings: Settings, say, seed: int) -> None:
    """Generate and print. Raises `ValueError`, `OSError` or `MemoryError` in one sentence."""
    timings = Timings()
    text = prompt.read(settings.run, say)
    place = loading.find(settings, say)
    ids = place.tokenizer(text, verbose=False).input_ids
    if not ids:
        raise ValueError("the prompt has no token")
    reserved, new = loading.lengths(settings, place, len(ids))
    rows = min(settings.run.parallel or settings.run.sequences, settings.run.sequences)
    loaded = loading.load(settings, place, rows, len(ids), reserved, new)
    timings.loaded()
    torch.manual_seed(seed)
    if settings.run.display_prompt and not settings.run.json:
        write(text)
    single = settings.run.sequences == 1
    if single:
        answers = [_one(settings, place, loaded, ids, new, timings)]
    else:
        answers = _several(settings, place, loaded, ids, new, rows, timings)
    if settings.run.json:
        write(_json(settings, place, loaded, ids, answers, timings, seed))
        return
    if not single or not settings.run.stream:
        write(_BETWEEN.join(answer.text for answer in answers))
    write("\n")
    if not settings.run.quiet:
        report(settings, place, loaded, timings, seed, say)


def _one(settings: Settings, place: Place, loaded: Loaded, ids: list[int], new: int | None, timings: Timings) -> Answer:
    """The text of one prompt, printed as it is made where that is asked for."""
    detokenizer, pieces, made = Detokenizer(place.tokenizer, ids), [], []
    streams = settings.run.stream and not settings.run.json

    def show(piece: str) -> None:
        pieces.append(piece)
        if streams:
            write(piece)

    def take(token: int) -> None:
        timings.token()
        made.append(token)
        if token not in loaded.eos:
            show(detokenizer.add(token))

    timings.start(len(ids))
    with explained(f"{settings.run.model}, generating"):
        if new is None:
            chooser = Chooser(settings.sampling, loaded.eos if settings.run.ignore_eos else (), timings.chosen)
            ends = stops(place.tokenizer, settings.run.stop_strings)
            session = Session(loaded.model, chooser, loaded.eos, loaded.cache_length, settings.config, ends)
            session.answer(ids, None, take, lambda: False)
            finish = "stop"
        else:
            with sampling_clock.told(loaded.model.device, timings.chosen):
                generate(settings, place, loaded, ids, 1, new, Collector(take))
            finish = "stop" if made[-1] in loaded.eos or len(made) < new else "length"
    show(detokenizer.end())
    return Answer("".join(pieces), tuple(made), finish)


def _several(settings, place, loaded, ids, new, rows: int, timings: Timings) -> list[Answer]:
    """So many texts of one prompt, `rows` at a time."""
    answers, left = [], settings.run.sequences
    while left:
        count = min(rows, left)
        timings.start(0)
        device = loaded.model.device
        # A GPU that nobody streams from runs ahead of the choice, and waits for no clock.
        clock = sampling_clock.told(device, timings.chosen) if device.type == "cpu" else nullcontext()
        with explained(f"{settings.run.model}, generating"), clock:
            out = generate(settings, place, loaded, ids, count, new, None)
        timings.whole(out[:, len(ids) :].numel())
        left -= count
        pad = loaded.model.generation_config.pad_token_id
        for row in out[:, len(ids) :].tolist():
            made = _until_end(row, loaded.eos, pad)
            detokenizer = Detokenizer(place.tokenizer, ids)
            text = "".join(detokenizer.add(token) for token in made if token not in loaded.eos) + detokenizer.end()
            finish = "stop" if made[-1] in loaded.eos or len(made) < new else "length"
            answers.append(Answer(text, tuple(made), finish))
    return answers


def _until_end(row: list[int], eos: tuple[int, ...], pad: int) -> list[int]:
    """A row's new tokens, without what fills it up behind its end."""
    end = next((index for index, token in enumerate(row) if token in eos), None)
    if end is not None:
        return row[: end + 1]
    while len(row) > 1 and row[-1] == pad:
        row = row[:-1]
    return row


def generate(settings, place: Place, loaded: Loaded, ids: list[int], rows: int, new: int, streamer) -> torch.Tensor:
    """What the model's own `generate` returns for so many rows of the prompt: ids [rows, T]."""
    extra = dict(loaded.assistance)
    if settings.run.stop_strings:
        extra |= {"stop_strings": list(settings.run.stop_strings), "tokenizer": place.tokenizer}
    input_ids = torch.tensor([ids] * rows, device=loaded.model.device)
    return loaded.model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=new,
        min_new_tokens=new if settings.run.ignore_eos else None,
        sampling=settings.sampling,
        streamer=streamer,
        **extra,
    )


def report(settings: Settings, place: Place, loaded: Loaded, timings: Timings, seed: int, say) -> None:
    """What ran and how long it took, for people."""
    draws = "greedy" if settings.sampling.is_greedy else f"seed {seed}"
    say(f"{settings.run.model}, {place.dtype} on {place.device}, {draws}; {words(settings, loaded)}")
    for line in timings.lines():
        say(line)


def words(settings: Settings, loaded: Loaded) -> str:
    """Which path ran."""
    path = loaded.model.path
    if path != "no call yet":
        return path
    return f"prefill and step, {settings.config.compile} compile, {loaded.cache_length} positions preallocated"


def _json(settings, place, loaded, ids, answers: list[Answer], timings: Timings, seed: int) -> str:
    import json

    said = [{"text": each.text, "ids": list(each.ids), "finish": each.finish} for each in answers]
    drawn = {part.name: getattr(settings.sampling, part.name) for part in fields(Sampling)}
    drawn = {name: value for name, value in drawn.items() if value != Sampling.__dataclass_fields__[name].default}
    found = {
        **(said[0] if len(said) == 1 else {"texts": said}),
        "model": settings.run.model,
        "dtype": place.dtype,
        "device": place.device,
        "prompt_ids": ids,
        "sampling": {"greedy": True} if settings.sampling.is_greedy else {**drawn, "seed": seed},
        "switches": asdict(settings.config),
        "path": words(settings, loaded),
        "timings": {name: round(value, 3) for name, value in timings.figures().items()},
    }
    return json.dumps(found, ensure_ascii=False) + "\n"
