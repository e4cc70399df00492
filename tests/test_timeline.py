"""Memory over time: what a phase's peak is made of, the watch that sees it, and the files that are left."""

import getpass
import json
import mmap
import socket

import pytest
import torch

from fastllama.lab.points.point import Point
from fastllama.lab.points.workload import Workload
from fastllama.lab.tracing import phases, timeline, timeline_plot
from fastllama.lab.tracing.phases import Watch, thinned
from tests.test_measure import write_tiny

MB = 10**6


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny")


def told() -> dict:
    def phase(name, start, end, peak, last, cache, mapped=0):
        made = {"name": name, "start_s": start, "end_s": end, "peak_bytes": peak * MB, "end_bytes": last * MB}
        return {**made, "mapped_bytes": mapped * MB, "cache_bytes": cache * MB}

    return {
        "subject": "ours",
        "samples": [[0.0, 100 * MB], [1.0, 190 * MB], [2.0, 200 * MB]],
        "phases": [phase("load", 0, 1, 150, 130, 0, 20), phase("prefill", 1, 2, 190, 170, 5)],
        "weights_bytes": 50 * MB,
        "allocations": [],
        "passing_bytes": 7 * MB,
    }


def test_what_a_peak_holds_adds_up_to_it():
    load, prefill = timeline.composed(told())
    assert load["peak_mb"] == 170 and load["mapped_weights_mb"] == 20 and load["end_mb"] == 150
    assert [prefill[name] for name in ("libraries_mb", "weights_mb", "cache_mb", "rest_mb")] == [100, 50, 5, 35]
    for phase in (load, prefill):
        assert phase["peak_mb"] == sum(phase[f"{name}_mb"] for name in ("libraries", "weights", "cache", "rest"))


def test_the_words_name_the_phase_and_its_parts():
    said = " ".join(timeline.words(timeline.composed(told()), "cpu", 7 * MB))
    assert "190.0 MB (anonymous memory and mapped weights), was in phase prefill" in said
    assert "weights 50.0, cache 5.0, tensors in passing and the rest 35.0" in said
    assert "20.0 MB of it were given back" in said and "take 7.0 MB at once" in said and "below 0" not in said
    small = told()
    small["weights_bytes"] = 150 * MB
    assert "below 0" in " ".join(timeline.words(timeline.composed(small), "cpu", None))


def test_thinning_keeps_every_change_and_both_ends():
    level = [(float(i), 10 * MB) for i in range(50)]
    peak = [(50.0, 90 * MB), (51.0, 10 * MB)]
    assert thinned(level + peak) == [(0.0, 10 * MB), (49.0, 10 * MB), (50.0, 90 * MB), (51.0, 10 * MB)]
    assert thinned([(1.0, 5)]) == [(1.0, 5)] and thinned([]) == []


def test_the_watch_sees_memory_that_came_and_went():
    model = torch.nn.Linear(2, 2)
    with Watch(torch.device("cpu"), poll_s=3600) as watch:
        watch.begin("prefill")
        # Mapped, not of the heap: what earlier tests gave back to it would be taken first, and it keeps what it has.
        with mmap.mmap(-1, 64 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
            held.write(bytes(len(held)))
            watch.sample()
        watch.end(model)
        watch.begin("decode")
        watch.end(model)
    first, second = watch.phases
    assert first["peak_bytes"] - first["end_bytes"] > 60 * MB
    assert second["peak_bytes"] < first["peak_bytes"] - 60 * MB
    assert [phase["name"] for phase in watch.phases] == ["prefill", "decode"]


@pytest.mark.usefixtures("forked")
def test_ours_alone_in_a_process(tiny, tmp_path):
    point = Point(tiny, "fp32", "cpu", Workload(2, 12, 4), preallocate=True, switches={"products": "stock"})
    seen, files = timeline.timeline(point, tmp_path / "memory")
    assert [phase["phase"] for phase in seen["phases"]] == ["load", "preallocate", "prefill", "decode"]
    assert [path.suffix for path in files] == [".json", ".png", ".svg"]
    kept = files[0].read_text()
    assert json.loads(kept)["words"] == seen["words"]
    for word in (socket.gethostname(), f"/{getpass.getuser()}/", tiny, str(tmp_path)):
        assert word not in kept
    load, preallocate, prefill, decode = seen["phases"]
    # 2 layers of keys and values, 2 heads of 8, 2 rows of 12 + 4 positions and the slack, a mask and positions.
    positions = 24
    keys_and_values, mask, table = 2 * 2 * 2 * 2 * positions * 8 * 4, 2 * positions * 4, 2 * positions * 8 * 4
    assert load["cache_mb"] == 0
    assert decode["cache_mb"] == prefill["cache_mb"] == preallocate["cache_mb"]
    assert decode["cache_mb"] * MB == pytest.approx(keys_and_values + mask + 2 * 8 + table)
    assert any(row["operator"].startswith("aten::") and row["mb"] > 0 for row in seen["allocations"])
    assert seen["passing_mb"] > 0
    assert files[1].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    picture = files[2].read_text()
    assert all(phase["phase"] in picture for phase in seen["phases"])


def test_vanilla_has_no_preallocation_and_its_cache_grows(tiny):
    point = Point(tiny, "fp32", "cpu", Workload(1, 12, 4))
    seen = phases.watched(point)
    assert [phase["name"] for phase in seen["phases"]] == ["load", "prefill", "decode"]
    position = 2 * 2 * 2 * 8 * 4
    assert [phase["cache_bytes"] for phase in seen["phases"]] == [0, 12 * position, 15 * position]
    starts = [phase["start_s"] for phase in seen["phases"]]
    assert starts == sorted(starts) and all(phase["end_s"] >= phase["start_s"] for phase in seen["phases"])


@pytest.mark.usefixtures("forked")
def test_a_failure_in_the_process_is_a_sentence_here(tmp_path):
    absent = tmp_path / "absent"
    with pytest.raises(OSError, match=r"watching the memory failed: there is no model folder"):
        timeline.timeline(Point(str(absent), "fp32", "cpu", Workload(1, 4, 2)), tmp_path)
    assert not any(tmp_path.iterdir())


def test_without_matplotlib_the_figures_are_kept_and_a_sentence_says_so(tmp_path, monkeypatch, capsys):
    from rich.console import Console

    monkeypatch.setattr(timeline_plot, "can_draw", lambda: False)
    monkeypatch.setattr(timeline, "_alone", lambda point, snapshot: told())
    assert timeline.run([Point("demo", "fp32", "cpu", Workload(1, 4, 2))], tmp_path, Console()) == 0
    assert [path.suffix for path in (tmp_path / "memory").iterdir()] == [".json"]
    assert "drawing needs matplotlib" in capsys.readouterr().err
