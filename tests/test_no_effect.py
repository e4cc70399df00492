"""What is marked as without effect: only the same tokens in the same time, with the reason where it is known."""

import pytest

from fastllama.lab.points import option
from fastllama.lab.points.sampler import Sampler
from fastllama.lab.sweeping import no_effect, sweep_table
from fastllama.lab.sweeping.plan import Plan, Planned
from tests.fake_records import point

pytest.importorskip("scipy")
OTHER = {"hash": "00000000", "reference_hash": "00000000"}


def noisy(speed=40.0, **fields) -> dict:
    return point(speed, spread=0.02, **fields)


def sampled(**options) -> dict:
    return noisy(sampler=Sampler(**options).arguments)


def marks(*points) -> list[list[str]]:
    return no_effect.marks(list(points))


def test_the_same_tokens_in_the_same_time_are_marked():
    assert marks(noisy(), noisy(40.1, switches={"bucket": 64})) == [[], ["bucket=64 has no effect"]]


def test_other_tokens_are_an_effect():
    assert marks(noisy(), noisy(switches={"bucket": 64}, **OTHER)) == [[], []]


def test_another_speed_is_an_effect():
    assert marks(noisy(), noisy(60.0, switches={"bucket": 64})) == [[], []]
    slow_start = [{"total_s": run["total_s"] + 2, "first_s": run["first_s"] + 2} for run in noisy()["runs"]]
    other = noisy(switches={"bucket": 64})
    other["runs"] = slow_start  # decodes as fast; only its first token is late
    assert marks(noisy(), other) == [[], []]


def test_one_run_shows_nothing():
    first, second = noisy(), noisy(switches={"bucket": 64})
    for made in (first, second):
        made["runs"], made["baseline"]["runs"] = made["runs"][:1], made["baseline"]["runs"][:1]
    assert marks(first, second) == [[], []]


def test_without_the_defaults_point_nothing_is_said():
    assert marks(noisy(switches={"bucket": 64}), noisy(switches={"bucket": 128})) == [[], []]
    # A default at another batch size is not the same question.
    assert marks(noisy(), noisy(switches={"bucket": 64}, batch_size=2)) == [[], []]


def test_each_option_of_a_product_is_judged_by_itself():
    fast = {"switches": {"bucket": 64, "fuse": "no"}}
    found = marks(noisy(), noisy(switches={"bucket": 64}), noisy(60.0, switches={"fuse": "no"}), noisy(60.0, **fast))
    assert found == [[], ["bucket=64 has no effect"], [], ["bucket=64 has no effect"]]


def test_what_is_asked_is_no_choice():
    assert marks(noisy(), noisy(batch_size=2), noisy(seed=1), noisy(dtype="bf16", parity="half")) == [[]] * 4


WITH_SWITCH = {
    "bucket=512": (
        {"switches": {"bucket": 512}, "cache_length": 200, "prompt_length": 100, "new_tokens": 100},
        {"switches": {"bucket": 256}, "cache_length": 200, "prompt_length": 100, "new_tokens": 100},
        "the whole cache of 200 positions is one bucket",
    ),
    "bucket=64": (
        {"switches": {"bucket": 64, "compile": "native"}, "path": "preallocated, native step, fused qkv"},
        {"switches": {"bucket": 256, "compile": "native"}, "path": "preallocated, native step, fused qkv"},
        "the native step reads what is in use, without buckets",
    ),
    "prefill_chunk=1000": (
        {"switches": {"prefill_chunk": 1000}},
        {},
        "the prompt of 1000 tokens is one chunk",
    ),
    "cache_length=4000": (
        {"cache_length": 4000},
        {},
        "a step reads what is in use, rounded up to a bucket, and not what is reserved",
    ),
    "products=stock": (
        {"switches": {"products": "stock"}, "path": "preallocated, 43 stock"},
        {"switches": {"products": "auto"}, "path": "preallocated, 43 stock"},
        "both ran as preallocated, 43 stock",
    ),
    "compile=static": (
        {"switches": {"compile": "static"}, "new_tokens": 1, "path": "a"},
        {"new_tokens": 1, "path": "b"},
        "with one new token there is no decode step",
    ),
    "cache_device=cpu": ({"switches": {"cache_device": "cpu"}}, {}, "the model is on the CPU already"),
    "keep=4": ({"switches": {"keep": 4}}, {}, "without context_shift nothing is dropped"),
    "keep=9": (
        {"switches": {"context_shift": True, "keep": 9}, "cache_length": 1200},
        {"switches": {"context_shift": True}, "cache_length": 1200},
        "the text of 1000 + 200 tokens fits the cache",
    ),
    "context_shift=true": (
        {"switches": {"context_shift": True}, "cache_length": 1200},
        {"cache_length": 1200},
        "the text of 1000 + 200 tokens fits the cache",
    ),
    "grp_attn_w=256": ({"switches": {"grp_attn_w": 256}}, {}, "grp_attn_n=1 is no self-extend"),
    "grp_attn_n=4": (
        {"switches": {"grp_attn_n": 4, "grp_attn_w": 2048}},
        {"switches": {"grp_attn_w": 2048}},
        "the text of 1000 + 200 tokens fills no window",
    ),
}
WITH_SAMPLER = {
    **{
        f"{name}={value}": ({name: value}, {}, "without do_sample the likeliest token is taken")
        for name, value in (
            ("temperature", 0.5),
            ("top_k", 5),
            ("top_p", 0.5),
            ("min_p", 0.5),
            ("typical_p", 0.5),
            ("epsilon_cutoff", 0.5),
            ("eta_cutoff", 0.5),
        )
    },
    "temperature=2.0": (
        {"do_sample": True, "top_k": 1, "temperature": 2.0},
        {"do_sample": True, "top_k": 1},
        "top_k=1 leaves one token to draw from",
    ),
    "min_p=0.0": (
        {"do_sample": True, "min_p": 0.0},
        {"do_sample": True},
        "no token has less than no share of the likeliest one's probability",
    ),
    "no_repeat_ngram_size=2000": (
        {"no_repeat_ngram_size": 2000},
        {},
        "the text of 1000 + 200 tokens is shorter than that",
    ),
}


@pytest.mark.parametrize("name", WITH_SWITCH)
def test_known_reasons_of_switches(name):
    fields, default, reason = WITH_SWITCH[name]
    assert marks(noisy(**default), noisy(**fields))[1] == [f"{name} has no effect: {reason}"]


@pytest.mark.parametrize("name", WITH_SAMPLER)
def test_known_reasons_of_the_sampler(name):
    options, default, reason = WITH_SAMPLER[name]
    assert marks(sampled(**default), sampled(**options))[1] == [f"{name} has no effect: {reason}"]


def test_every_reason_has_a_test():
    told = {reason for *_, reason in (*WITH_SWITCH.values(), *WITH_SAMPLER.values())}
    for known in no_effect.REASONS:
        pattern = known.words.split("{")[0]
        assert any(reason.startswith(pattern) for reason in told), known.words
        assert set(known.options) <= option.OPTIONS.keys()


UNKNOWN = {
    "bucket": ({"switches": {"bucket": 512}}, {}),  # 1200 positions are three buckets of 512
    "prefill_chunk": ({"switches": {"prefill_chunk": 999}}, {}),
    "products": ({"switches": {"products": "stock"}, "path": "stock"}, {"path": "native"}),
    "temperature": ({"sampler": Sampler(True, 0.5).arguments}, {"sampler": Sampler(True).arguments}),
    "no_repeat_ngram_size": ({"sampler": Sampler(no_repeat_ngram_size=30).arguments}, {}),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_no_reason_is_made_up(name):
    fields, default = UNKNOWN[name]
    (text,) = marks(noisy(**default), noisy(**fields))[1]
    assert text.endswith("has no effect") and text.startswith(f"{name}=")


def shown(points, width=80) -> str:
    import io

    from rich.console import Console

    planned = [Planned(f"bucket={entry['switches']['bucket']}", None) for entry in points]
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(sweep_table.summary(Plan("bucket", ("bucket",), planned, [("bucket=1", "too small")]), points))
    return console.export_text()


def test_the_summary_shows_what_has_no_effect_what_failed_and_what_was_left_out():
    failed = {"status": "failed", "reason": "it broke", "switches": {"bucket": 128}}
    points = [noisy(), noisy(40.1, switches={"bucket": 64}), failed]
    kept = [dict(entry) for entry in points]
    text = shown(points)
    assert "bucket=64: bucket=64 has no effect" in text and "bucket=256: bucket=256 has" not in text
    assert "bucket=128: failed: it broke" in text and "bucket=1: left out: too small" in text
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert points == kept  # derived, and kept in nothing that is stored


def test_without_scipy_the_summary_says_so(monkeypatch):
    def missing(*given):
        raise ValueError("verdicts need scipy")

    monkeypatch.setattr(no_effect.statistics, "compare_points", missing)
    assert "what has no effect is not judged: verdicts need scipy" in shown([noisy(), noisy(switches={"bucket": 64})])
