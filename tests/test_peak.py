"""Predicted peaks of memory beside those that a process of its own has."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from subprocess import PIPE

import pytest

from fastllama.lab.memory import memory, peak
from fastllama.lab.points.point import Point
from fastllama.lab.points.workload import Workload
from tests import forked


def a_point(model="demo", **changes):
    values = {"dtype": "fp32", "device": "cpu", "workload": Workload(1, 12, 4), "preallocate": True, **changes}
    return Point(model, **values)


# A large cache, and a large prompt: most of what is predicted is not the interpreter.
LIVE = {
    "cache": (a_point(cache_length=150_000), "ours"),
    "prefill": (a_point(workload=Workload(64, 400, 1)), "vanilla"),
    "prefill of ours": (a_point(workload=Workload(64, 400, 1)), "ours"),
}

_PREDICT = """
import json, sys
from fastllama.lab.memory import peak
from fastllama.lab.points.point import Point
tasks = json.load(sys.stdin)
print(json.dumps([vars(peak.predict(Point.from_dict(task["point"]), task["name"])) for task in tasks]))
"""


@pytest.fixture(scope="module")
def predicted() -> dict[str, dict[str, int]]:
    """As a sweep predicts: in a process that has loaded nothing yet."""
    tasks = json.dumps([{"point": asdict(point), "name": name} for point, name in LIVE.values()])
    with forked.Popen([sys.executable, "-c", _PREDICT], stdin=PIPE, stdout=PIPE, text=True) as process:
        told = process.communicate(tasks)[0]
    return dict(zip(LIVE, json.loads(told), strict=True))


@pytest.mark.usefixtures("forked")
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks of anonymous memory are read from /proc")
@pytest.mark.parametrize("what", LIVE)
def test_the_prediction_is_within_its_margin_of_the_measured_peak(what, predicted, monkeypatch):
    # With as many threads as a user has: what a heap keeps of passing tensors is less with one.
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (point, name), parts = LIVE[what], predicted[what]
    predicted_mb = sum(parts.values()) / 1e6
    assert parts["cache"] + parts["work"] > parts["base"] / 2
    assert predicted_mb == pytest.approx(memory.peaks(point, name).max_mem_mb, rel=peak.MARGIN)


@pytest.fixture
def fixed(monkeypatch):
    monkeypatch.setattr(peak, "base_bytes", lambda: 300_000_000)


def test_each_part_follows_what_it_depends_on(fixed):
    one = peak.predict(a_point("inflated:tinyllama-1.1b", dtype="bf16"), "ours")
    assert one.weights == pytest.approx(2 * 1.1e9, rel=0.01) and one.base == 300_000_000
    assert peak.predict(a_point("inflated:tinyllama-1.1b"), "ours").weights == 2 * one.weights
    cache = peak.predict(a_point(cache_length=8000, workload=Workload(4, 12, 4)), "ours").cache
    # Six layers, two kv heads of 32, keys and values, four bytes, a mask; and cosines and sines.
    assert cache == pytest.approx(4 * 8000 * (6 * 2 * 2 * 32 + 1) * 4 + 2 * 8000 * 32 * 4, rel=0.01)
    works = [
        peak.predict(a_point(workload=Workload(4, 800, 4), switches=switches), "ours").work
        for switches in ({"prefill_chunk": 100}, {})
    ]
    assert works[1] > 4 * works[0]


@pytest.mark.parametrize("cache", [{}, {"cache_k": "int8", "cache_v": "int8"}], ids=["floats", "int8"])
def test_a_cache_on_the_cpu_takes_none_of_an_accelerators_memory(cache, fixed):
    def ours(length, device="cuda", **switches):
        point = a_point(device=device, workload=Workload(2, 600, 4), cache_length=length)
        return peak.predict(replace(point, switches=cache | {"prefill_chunk": 100} | switches), "ours")

    elsewhere = [ours(length, cache_device="cpu") for length in (1000, 11_000)]
    assert elsewhere[1].cache - elsewhere[0].cache == 10_000 * 2 * 32 * 4, "cosines and sines alone"
    # Nor does attention, with its mask of a chunk by what came before it.
    assert elsewhere[0].work == elsewhere[1].work < ours(1000).work
    assert elsewhere[0].weights == ours(1000).weights and elsewhere[0].base == 0
    assert ours(1000).cache - elsewhere[0].cache == ours(1000, "cpu").cache - elsewhere[0].cache > 0
    assert ours(1000, "cpu", cache_device="cpu") == ours(1000, "cpu"), "it is there already"


def test_what_is_measured_together_must_fit_together(fixed, monkeypatch):
    point = a_point(cache_length=1_000_000, workload=Workload(1, 2000, 4))
    ours, vanilla = (peak.predict(point, name) for name in point.contestants)
    monkeypatch.setattr(peak, "available_bytes", lambda device: ours.nbytes)
    needed = peak.fit(point).needed
    assert needed == max(ours.weights + ours.cache + vanilla.cache + max(ours.work, vanilla.work), ours.nbytes)
    assert peak.fit(point).fits is (needed <= ours.nbytes)
    monkeypatch.setattr(peak, "available_bytes", lambda device: needed - 1)
    assert not peak.fit(point).fits
