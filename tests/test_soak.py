"""A soak of hundreds of generations on a tiny model, and soaks into which a leak or a wrong text is put."""

import json
import mmap

import pytest
import torch

import fastllama
from fastllama.lab import __main__
from fastllama.lab.soak import command, file, works
from fastllama.lab.soak import run as soaking

FEW = {"on first use": None}


def soak(tiny, path, *more) -> int:
    asked = ["soak", "--model", tiny, "--device", "cpu", "--json", path, "--draft", tiny, *more]
    return __main__.main([str(word) for word in asked])


def shorter(monkeypatch, reservations=FEW) -> int:
    """Fewer reservations and samples; the fewest generations that a soak takes then."""
    monkeypatch.setattr(soaking, "RESERVATIONS", reservations)
    monkeypatch.setattr(soaking, "SAMPLES", 8)
    return 4 * (len(works.WORKS) + len(works.ASSISTED)) * len(reservations)


def test_memory_is_flat_and_texts_are_vanillas(tiny, tmp_path, monkeypatch, capsys):
    every = len(works.WORKS) + len(works.ASSISTED)
    some = {name: works.RESERVATIONS[name] for name in ("native", "packed", "small caches")}
    path, least = tmp_path / "soak.json", shorter(monkeypatch, some)
    # Nothing is said about a megabyte or two: allocators settle within hundreds of generations, not within thousands.
    assert soak(tiny, path, "--generations", least, "--bound-mb", 20) == 0, capsys.readouterr().err
    result = file.read(path)
    assert result["generations"] >= least and result["flat"] and result["changed"] is None
    reservations = len(some) - len(result["left_out"])
    assert len(result["works"]) == every * reservations
    assert all(work["runs"] >= 4 for work in result["works"].values())
    lossy = sum(name.endswith(works.LOSSY) for name in result["works"])
    checked = sum("vanilla" in work for work in result["works"].values())
    plain = sum(work.reference is not None for work in (*works.WORKS, *works.ASSISTED))
    assert checked == plain * (reservations - bool(lossy)) > 0
    assert len(result["samples"]) >= 6 and result["object_growth"] <= result["bound_objects"]
    assert "none changed" in capsys.readouterr().out


def test_a_leak_is_found(tiny, tmp_path, monkeypatch, capsys):
    least, held, real = shorter(monkeypatch), [], fastllama.LlamaForCausalLM.generate

    def leaking(self, *args, **kwargs):
        # Four megabytes, and not of the heap: what earlier tests gave back to it would be taken first.
        held.append(mmap.mmap(-1, 2**22, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        held[-1].write(bytes(2**22))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(fastllama.LlamaForCausalLM, "generate", leaking)
    assert soak(tiny, tmp_path / "soak.json", "--generations", least, "--bound-mb", 20) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("error: memory grew by ") and err.endswith("and the bound is 20 MB")
    assert not file.read(tmp_path / "soak.json")["flat"]


def test_a_wrong_text_is_found(tiny, tmp_path, monkeypatch, capsys):
    least, calls, real = shorter(monkeypatch), [], fastllama.LlamaForCausalLM.generate

    def wrong(self, *args, **kwargs):
        ids = real(self, *args, **kwargs)
        calls.append(ids)
        return ids.clone().index_fill_(1, torch.tensor(ids.shape[1] - 1), 9) if len(calls) == 41 else ids

    monkeypatch.setattr(fastllama.LlamaForCausalLM, "generate", wrong)
    assert soak(tiny, tmp_path / "soak.json", "--generations", least) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("error: the text of ") and " changed at generation " in err and err.endswith(" before")
    assert file.read(tmp_path / "soak.json")["changed"] in err


def test_growth_is_between_the_second_quarter_and_the_last():
    samples = [{"x": value} for value in (50, 90, 100, 100, 100, 100, 100, 100)]
    assert soaking.growth(samples, "x") == 0
    assert soaking.growth([{"x": float(n)} for n in range(40)], "x") == 20
    assert soaking.growth(samples[:3], "x") is None
    assert soaking.growth([*samples, {"x": None}], "x") is None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--generations", 3), "--generations 3 is too few: 280 run everything four times"),
        (("--bound-mb", -1), "--bound-mb -1.0 is not allowed; allowed: 0 or more"),
        (("--dtype", "fp8"), "--dtype 'fp8' is not allowed; allowed: fp32, bf16, fp16"),
        (("--json", "/nowhere/soak.json"), "/nowhere/soak.json: there is no folder /nowhere"),
    ],
)
def test_what_a_soak_refuses(tiny, tmp_path, words, says, capsys):
    assert soak(tiny, tmp_path / "soak.json", *words) == 2
    assert capsys.readouterr().err == f"error: {says}\n"


def test_an_edited_result_is_refused(tmp_path, tiny, monkeypatch, capsys):
    least, path = shorter(monkeypatch), tmp_path / "soak.json"
    monkeypatch.setattr(works, "LOSSY", ())
    few = tuple(work for work in works.WORKS if work.name in ("greedy, a row", "many"))
    monkeypatch.setattr(soaking, "WORKS", few)
    monkeypatch.setattr(soaking, "ASSISTED", ())
    assert least > 16 and soak(tiny, path, "--generations", 16, "--bound-mb", 1000) == 0
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"generations": 10_000}))
    with pytest.raises(ValueError, match="field digest is not that of the content"):
        file.read(path)
    assert command.GENERATIONS == 10_000
