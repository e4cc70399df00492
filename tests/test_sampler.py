"""The sampler: transformers' names and defaults, what is refused, and drawn text equal to vanilla's."""

from dataclasses import asdict, fields, replace

import pytest
import torch
from transformers import GenerationConfig

import run_llama
from fastllama.lab.measuring import ceiling, checkpoint, contestant, measure
from fastllama.lab.memory import memory
from fastllama.lab.points import figures, workload
from fastllama.lab.points.point import Point
from fastllama.lab.points.sampler import Sampler
from fastllama.lab.points.workload import Workload
from fastllama.lab.records import schema
from tests import fake_records

DRAWN = Sampler(do_sample=True, temperature=0.8, top_k=40, top_p=0.95)


def a_point(tiny, sampler, seed=3, preallocate=True, **more):
    return Point(tiny, "fp32", "cpu", Workload(2, 12, 16, seed, sampler=sampler), preallocate, warmup=0, **more)


def test_names_and_defaults_are_transformers():
    defaults = GenerationConfig._get_default_generation_params()
    assert {name: defaults.get(name) for name in Sampler().arguments} == Sampler().arguments
    assert asdict(DRAWN).items() <= GenerationConfig(**DRAWN.arguments).to_dict().items() | {("min_p", None)}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("do_sample", 1),
        ("temperature", 0),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", True),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("typical_p", 2),
        ("epsilon_cutoff", 1.0),
        ("eta_cutoff", -1),
        ("repetition_penalty", 0),
        ("no_repeat_ngram_size", -2),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(name, value):
    with pytest.raises(ValueError) as error:
        Sampler(**{name: value})
    assert str(error.value).startswith(f"{name}=")
    assert "is not allowed; allowed: " in str(error.value) and "\n" not in str(error.value)


def test_an_integer_will_do_for_a_number():
    assert Sampler(temperature=2).temperature == 2.0 and isinstance(Sampler(min_p=0).min_p, float)


def test_a_point_keeps_its_sampler_and_its_command_line_gives_it_back():
    point = Point("demo", "fp32", "cpu", Workload(1, 12, 4, sampler=replace(DRAWN, min_p=0.1)))
    assert Point.from_dict(asdict(point)) == point
    assert point.identity()["sampler"] == replace(DRAWN, min_p=0.1).arguments
    assert point.command().count("--do-sample --temperature 0.8 --top-k 40 --top-p 0.95 --min-p 0.1") == 1
    (again,) = run_llama._plan(run_llama._parse(point.command().split()[2:])).points
    assert again.workload == point.workload and again.command() == point.command()


def test_every_option_has_a_flag():
    flags = set(run_llama._parse([]).__dict__)
    assert {option.name for option in fields(Sampler)} <= flags


def test_the_workload_is_named_with_its_sampler():
    greedy, drawn = fake_records.point(), fake_records.point(sampler=DRAWN.arguments)
    assert figures.workload(greedy) == figures.workload(fake_records.point(sampler=Sampler().arguments))
    assert figures.workload(greedy) != figures.workload(drawn)
    assert figures.workload_name(drawn).endswith(
        ", 200 new tokens, do_sample True, temperature 0.8, top_k 40, top_p 0.95"
    )


@pytest.mark.parametrize(
    "sampler",
    [
        DRAWN,
        Sampler(do_sample=True, min_p=0.05, typical_p=0.9, epsilon_cutoff=1e-4, eta_cutoff=1e-4),
        Sampler(do_sample=True, top_k=0, repetition_penalty=1.3, no_repeat_ngram_size=2),
        Sampler(repetition_penalty=5.0, no_repeat_ngram_size=2),
    ],
    ids=str,
)
def test_drawn_text_is_vanillas(tiny, sampler, monkeypatch):
    monkeypatch.setattr(memory, "peaks", lambda point, name: memory.Peaks(10.0, 20.0, 0.5))
    monkeypatch.setattr(measure, "Ceiling", lambda device: ceiling.Ceiling(device, 2**20))
    record = measure.measure(a_point(tiny, sampler, runs=2))
    schema.check_point(record, "the point")
    assert record["parity"] == "exact" and record["hash"] == record["baseline"]["hash"]
    greedy = measure.measure(a_point(tiny, Sampler(), runs=1))
    assert greedy["hash"] != record["hash"]


def alone(tiny, point):
    found = checkpoint.find(tiny, torch.float32)
    tokenizer = checkpoint.tokenizer(found)
    subject = contestant.load_alone(point, found, "vanilla", workload.pad_id(tokenizer))
    return subject, workload.prompt(point.workload, tokenizer)


def test_each_run_draws_from_the_seed_anew(tiny):
    subject, prompt = alone(tiny, a_point(tiny, DRAWN, preallocate=False))
    torch.manual_seed(99)
    for _ in range(2):
        subject.time_whole(prompt, 6)
    assert len(subject.outputs) == 1
    subject.seed = 4
    subject.time_whole(prompt, 6)
    assert len(subject.outputs) == 2


def test_the_margin_is_of_what_greedy_decoding_chose_from(tiny):
    """A penalised token is not the best any more, so the raw logits' margin would be another one."""
    sampler = Sampler(repetition_penalty=3.0)
    subject, prompt = alone(tiny, a_point(tiny, sampler, preallocate=False))
    plain, _ = alone(tiny, a_point(tiny, Sampler(), preallocate=False))
    new_ids = subject.generate(prompt, 5)[0][1]
    assert subject.margin(prompt, 1, new_ids) != pytest.approx(plain.margin(prompt, 1, new_ids), abs=1e-4)
    subject.sampler = DRAWN
    assert str(subject.margin(prompt, 1, new_ids)) == "nan"


def test_drawn_text_that_differs_is_no_tie(tiny, monkeypatch):
    monkeypatch.setattr(memory, "peaks", lambda point, name: memory.Peaks(10.0, 20.0, 0.5))
    monkeypatch.setattr(measure, "Ceiling", lambda device: ceiling.Ceiling(device, 2**20))
    right = contestant.Contestant.generate

    def wrong(self, prompt, new_tokens):
        ids, seconds = right(self, prompt, new_tokens)
        if self.name == "ours" and new_tokens > 1:
            ids[1, 3] = (ids[1, 3] + 1) % 100
        return ids, seconds

    monkeypatch.setattr(contestant.Contestant, "generate", wrong)
    record = measure.measure(a_point(tiny, DRAWN, runs=1))
    schema.check_point(record, "the point")
    assert record["parity"] == "differs"
    assert record["first_divergence"] == {"row": 1, "position": 3, "margin": None}
