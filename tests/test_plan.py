"""Options and plans: what may be swept, what a word means, the names of points, and what is refused before any work."""

import json
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import fastllama
import run_llama
from fastllama import demo
from fastllama.demo.inflate import InflatedBody
from fastllama.demo.shapes import SHAPES
from fastllama.lab.measuring import checkpoint
from fastllama.lab.points import option
from fastllama.lab.points.assistance import Assistance
from fastllama.lab.points.sampler import Sampler
from fastllama.lab.points.workload import Workload
from fastllama.lab.sweeping import plan
from tests.fake_records import point

DEFAULTS = {"batch_size": [1], "prompt_length": [12], "new_tokens": [4]}
FIXED = {"dtype": "fp32", "device": "cpu"}


def make(*sweeps, **given):
    given = {name: value for name, value in {**FIXED, **given}.items() if value is not None}
    return plan.make(given, list(sweeps), DEFAULTS, runs=1, warmup=0)


def names(made) -> list[str]:
    return [each.name for each in made.planned]


# options


def test_every_switch_workload_field_and_sampler_option_can_be_swept():
    switches = {part.name for part in fields(fastllama.FastConfig)}
    sizes = {part.name for part in fields(Workload)} - {"sampler"}
    sampler = {part.name for part in fields(Sampler)}
    assistance = {part.name for part in fields(Assistance)}
    assert option.OPTIONS.keys() == switches | sizes | sampler | assistance | {
        "model", "dtype", "device", "preallocate", "cache_length", "static_cache",
    }  # fmt: skip
    flags = run_llama._parse([]).__dict__.keys()
    assert option.OPTIONS.keys() <= flags


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("bucket", "64", 64),
        ("prefill_chunk", "None", None),
        ("prefill-chunk", "32", 32),
        ("--top-k", 5, 5),
        ("temperature", "0.7", 0.7),
        ("temperature", 1, 1.0),
        ("min_p", "none", None),
        ("do_sample", "on", True),
        ("do_sample", False, False),
        ("preallocate", "no", False),
        ("compile", "static", "static"),
        ("dtype", "auto", "auto"),
        ("cache_length", "none", None),
        ("seed", "0", 0),
    ],
)
def test_a_word_becomes_a_value_of_the_options_type(name, given, value):
    found = option.option(name).value(given)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("bucket", "3"),
        ("bucket", "many"),
        ("bucket", 1.5),
        ("bucket", True),
        ("prefill_chunk", "auto"),
        ("compile", "maybe"),
        ("compile", 1),
        ("temperature", "nan"),
        ("temperature", 10**400),
        ("top_k", "-1"),
        ("do_sample", "2"),
        ("do_sample", 1),
        ("batch_size", "0"),
        ("batch_size", [1]),
        ("dtype", "int8"),
        ("model", ""),
        ("seed", str(2**64)),
        ("cache_length", "0"),
    ],
)
def test_a_wrong_value_is_one_sentence_with_the_option_the_value_and_what_is_allowed(name, given):
    found = option.option(name)
    with pytest.raises(ValueError) as error:
        found.value(given)
    assert str(error.value) == f"{name}={given!r} is not allowed; allowed: {found.allowed}"


# plans


def test_several_sweeps_make_a_product_with_stable_names():
    made = make("batch_size=2,8", "prefill_chunk=none,32", preallocate=True)
    assert names(made) == [
        "batch_size=2,prefill_chunk=none",
        "batch_size=2,prefill_chunk=32",
        "batch_size=8,prefill_chunk=none",
        "batch_size=8,prefill_chunk=32",
    ]
    assert [(each.workload.batch_size, each.config.prefill_chunk) for each in made.points] == [
        (2, None), (2, 32), (8, None), (8, 32),
    ]  # fmt: skip
    assert made.axes == ("batch_size", "prefill_chunk")


def test_a_point_is_found_by_its_name():
    made = make("batch_size=2,8", "do_sample=true", "temperature=0.5,1.0")
    found = made.find("temperature=0.5, batch_size=8,do_sample=true")
    assert (found.workload.batch_size, found.workload.sampler.temperature) == (8, 0.5)
    with pytest.raises(ValueError, match="there is no point 'batch_size=8' in this sweep; there are batch_size=2,do_"):
        made.find("batch_size=8")


def test_every_point_owns_its_seed():
    """More temperatures change no other point: what a draw begins with is part of each."""
    few, many = make("temperature=0.5,0.9", do_sample=True), make("temperature=0.1,0.5,0.7,0.9", do_sample=True)
    assert {point.workload.seed for point in many.points} == {0}
    for name in names(few):
        assert few.find(name) == many.find(name)


def test_named_sweeps_and_their_flags():
    assert [each.workload.batch_size for each in make("batch").points] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert [each.workload.prompt_length for each in make("length").points] == [100, 200, 400, 800, 1600]
    made = make("batch", batch_size=[3, 5], prompt_length=[8, 9])
    assert names(made)[0] == "prompt_length=8,batch_size=3" and len(made.planned) == 4


def test_a_file_says_what_is_swept_and_what_is_fixed(tmp_path):
    path = tmp_path / "nightly.toml"
    path.write_text('preallocate = true\nbucket = [16, 64]\nprefill-chunk = ["none", 32]\nnew_tokens = 7\n')
    made = make(str(path), "batch_size=1,2")
    assert made.kind == "nightly-batch_size" and made.axes == ("bucket", "prefill_chunk", "batch_size")
    assert len(made.planned) == 8 and {each.workload.new_tokens for each in made.points} == {7}
    assert all(each.preallocate for each in made.points)
    assert made.file_name == "nightly-batch_size-demo-fp32-cpu-preallocate-no.jsonl"


def test_what_is_swept_is_no_part_of_the_rest_of_a_files_name():
    assert make("dtype=fp32,bf16", dtype=None).file_name == "dtype-demo-cpu-vanilla-no.jsonl"


def test_what_does_not_go_together_is_left_out_with_the_reason():
    made = make("compile=no,native", "fuse=all,qkv", preallocate=True)
    assert names(made) == ["compile=no,fuse=all", "compile=no,fuse=qkv", "compile=native,fuse=all"]
    ((name, reason),) = made.left_out
    assert name == "compile=native,fuse=qkv" and "fuse='qkv' cannot be honoured" in reason


@pytest.mark.parametrize(
    ("sweeps", "given", "words"),
    [
        (["nonsense"], {}, "--sweep 'nonsense' is not batch, length, batch-table, "),
        (["nonsense=1"], {}, "'nonsense' is no option of a point; there are model, "),
        (["batch_size="], {}, "batch_size has no value to sweep; allowed: an integer >= 1"),
        (["batch_size=1,x"], {}, "batch_size='x' is not allowed; allowed: an integer >= 1"),
        (["batch_size=1", "batch_size=2"], {}, "batch_size is given twice"),
        (["batch_size=1,2"], {"batch_size": [4]}, "batch_size is given twice"),
        (["bucket=64,128"], {"preallocate": True, "bucket": 32}, "bucket is given twice"),
        (["bucket=64,128"], {}, "--bucket needs --preallocate"),
        (["batch_size=1,1"], {}, "batch_size=1 and batch_size=1 are the same point"),
        (["compile=static,fullgraph"], {}, "compile=static and compile=fullgraph are the same point"),
        (["cache_length=10"], {"preallocate": True}, "a cache of 10 positions is too short"),
        (["device=cpu,abacus"], {"device": None}, "device 'abacus' cannot be used"),
        (["/nowhere/sweep.toml"], {}, "there is no sweep file /nowhere/sweep.toml"),
        ([], {"temperature": "-1"}, "temperature='-1' is not allowed; allowed: a number above 0"),
    ],
)
def test_what_is_refused_before_any_work(sweeps, given, words):
    with pytest.raises((ValueError, OSError)) as error:
        make(*sweeps, **given)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bucket = [", "not valid TOML"),
        ("bucket = []", "bucket has no value to sweep"),
        ("[bucket]\nx = 1", "bucket={'x': 1} is not allowed; allowed: an integer >= 16"),
        ("buckets = 3", "'buckets' is no option of a point"),
        ("bucket = [16, 3]", "bucket=3 is not allowed"),
    ],
)
def test_a_wrong_file_is_one_sentence_with_its_name(tmp_path, text, words):
    path = tmp_path / "sweep.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"sweep\.toml: ") as error:
        make(str(path), preallocate=True)
    assert words in str(error.value)


def test_toml_is_read_without_pythons_own_reader(tmp_path, monkeypatch):
    pytest.importorskip("tomli")
    monkeypatch.setitem(sys.modules, "tomllib", None)  # as on Python 3.10
    (tmp_path / "sweep.toml").write_text("batch_size = [1, 2]\n")
    assert names(make(str(tmp_path / "sweep.toml"))) == ["batch_size=1", "batch_size=2"]


def test_python_3_10_gets_a_reader_of_toml():
    text = (Path(run_llama.__file__).parent / "setup.py").read_text()
    assert "\"tomli>=2; python_version < '3.11'\"" in text


# what is stored


def test_stored_values_come_back_by_option():
    kept = point(cache_length=1200, switches={"bucket": 64}, sampler=Sampler(do_sample=True, top_k=3).arguments)
    assert [option.stored(kept, name) for name in ("bucket", "prefill_chunk", "top_k", "preallocate", "seed")] == [
        64, None, 3, True, 0,
    ]  # fmt: skip
    assert option.stored(kept, "cache_length") is None  # 1000 + 200
    assert option.stored(point(cache_length=2000), "cache_length") == 2000
    assert option.stored(point(), "temperature") == 1.0  # from before there was a sampler
    assert option.varied([kept, point(), point(batch_size=2)]) == ["bucket", "batch_size", "do_sample", "top_k"]


# a model's configuration, without building it

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
    "max_position_embeddings",
)


def test_the_outline_of_a_built_model_is_its_configuration(monkeypatch):
    monkeypatch.setattr(demo.names, "publish", lambda *given: pytest.fail("built"))
    for name in SHAPES:
        inflated = checkpoint.outline(f"inflated:{name}", torch.float32).config
        built = InflatedBody(demo.names.demo_folder("target"), SHAPES[name], torch.float32).config()
        for field in _SIZES:
            assert getattr(inflated, field) == getattr(built, field), (name, field)
        assert checkpoint.outline(f"random:{name}", torch.float32).parameter_count == SHAPES[name].parameters
    given = json.loads((demo.names.demo_folder("target") / "config.json").read_text())
    assert checkpoint.outline("demo", torch.float32).config.hidden_size == given["hidden_size"]
    with pytest.raises(ValueError, match="unknown model random:llama-9t"):
        checkpoint.outline("random:llama-9t", torch.float32)
