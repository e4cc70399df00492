"""The demo pair: its text, its tokenizer, its training, its names."""

import json
import math
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from fastllama.demo import is_random, names, resolve, text
from fastllama.demo.evaluate import agreement, perplexity
from fastllama.demo.tokenizer import BOS_ID, EOS_ID, RESERVED_ID, SPECIAL_TOKENS, VOCAB_SIZE, train_tokenizer
from fastllama.demo.train import DRAFT, TARGET, Recipe, batch_at, encode, learning_rate_factor, train_model
from fastllama.lab.points.workload import Workload, prompt

TINY = Recipe(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=48,
    steps=12,
    long_steps=2,
    learning_rate=1e-2,
    warmup_steps=3,
    knee_step=8,
    knee_factor=0.6,
    batch_size=2,
    sequence_length=16,
    long_length=32,
)


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(names.demo_folder("target"))


@pytest.fixture(scope="module")
def held_out(tokenizer) -> np.ndarray:
    return encode(tokenizer, text.held_out_documents())


def load(name: str) -> transformers.LlamaForCausalLM:
    return transformers.LlamaForCausalLM.from_pretrained(resolve(name, torch.float32), dtype=torch.float32).eval()


# text


def test_held_out_files_are_the_manifests():
    manifest = json.loads(text.MANIFEST.read_text())
    shipped = {path.name for path in text.HELD_OUT_DIR.glob("*.py.txt")}
    assert shipped == set(manifest["files"]) == {f"{module}.py.txt" for module in text.HELD_OUT_MODULES}
    assert len(text.held_out_documents()) == len(shipped)
    assert len(text.held_out_text()) > 200_000
    assert (text.HELD_OUT_DIR / "LICENSE.PSF.txt").is_file()


def test_a_changed_held_out_file_is_refused(tmp_path, monkeypatch):
    shutil.copytree(text.HELD_OUT_DIR, tmp_path / "heldout")
    monkeypatch.setattr(text, "HELD_OUT_DIR", tmp_path / "heldout")
    assert text.held_out_documents()
    with (tmp_path / "heldout/heapq.py.txt").open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match=r"heapq\.py\.txt"):
        text.held_out_documents()


def test_held_out_modules_are_not_trained_on():
    files = text.training_files()
    assert len(files) > 200
    library = min((path.parent for path in files), key=lambda folder: len(folder.parts))
    trained = {path.relative_to(library).as_posix() for path in files}
    for module in text.HELD_OUT_MODULES:
        assert (library / f"{module}.py").is_file()
        assert f"{module}.py" not in trained
    assert not any("site-packages" in name for name in trained)
    assert not set(text.training_documents()) & set(text.held_out_documents())


# tokenizer


def test_the_tokenizer_gives_the_text_back(tokenizer):
    document = text.held_out_documents()[0]
    ids = tokenizer.encode(document)
    assert ids[0] == BOS_ID
    assert tokenizer.decode(ids, skip_special_tokens=True) == document
    assert len(tokenizer) == VOCAB_SIZE


def test_the_reserved_token_is_in_no_text(held_out):
    assert RESERVED_ID not in held_out
    assert (held_out == BOS_ID).sum() == (held_out == EOS_ID).sum() == len(text.HELD_OUT_MODULES)


def test_training_a_tokenizer_twice_gives_the_same_one():
    documents = text.held_out_documents()
    first, second = (train_tokenizer(documents).get_vocab() for _ in range(2))
    assert first == second
    assert [first[token] for token in SPECIAL_TOKENS] == [0, 1, 2, 3]


# training


def some_tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(4, VOCAB_SIZE, size=700).astype(np.uint16)


def test_a_batch_is_a_function_of_seed_and_step():
    tokens = some_tokens()
    first, again, later = batch_at(tokens, TINY, 3), batch_at(tokens, TINY, 3), batch_at(tokens, TINY, 4)
    assert first.shape == (2, 16) and first.dtype == torch.int64
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert not torch.equal(first, batch_at(tokens, replace(TINY, seed=1), 3))
    assert batch_at(tokens, TINY, TINY.steps - 1).shape == (1, 32)


def test_an_epoch_meets_no_window_twice():
    tokens = np.arange(700, dtype=np.uint16)
    recipe = replace(TINY, steps=100, long_steps=0, batch_size=1)
    windows = (len(tokens) - 16) // 16
    starts = [int(batch_at(tokens, recipe, step)[0, 0]) for step in range(windows)]
    assert len(set(starts)) == windows
    assert {b - a for a, b in pairwise(sorted(starts))} == {16}


@pytest.mark.parametrize("recipe", [TINY, TARGET, DRAFT], ids=["tiny", "target", "draft"])
def test_the_learning_rate_rises_and_falls_without_a_jump(recipe):
    factors = [learning_rate_factor(recipe, step) for step in range(recipe.steps)]
    top = recipe.warmup_steps - 1
    assert factors[top] == max(factors) == 1.0
    assert factors[:top] == sorted(factors[:top])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert factors[recipe.knee_step] == pytest.approx(recipe.knee_factor)
    assert 0 < factors[-1] <= recipe.knee_factor / (recipe.steps - recipe.knee_step) + 1e-12
    assert max(abs(b - a) for a, b in pairwise(factors)) <= 1 / recipe.warmup_steps + 1e-12


def test_resumed_training_equals_uninterrupted_training(tmp_path):
    tokens = some_tokens()
    whole, whole_curve = train_model(TINY, tokens, tmp_path / "whole.pt", "whole")
    stopped, _ = train_model(TINY, tokens, tmp_path / "parts.pt", "parts", stop_at=10)
    resumed, curve = train_model(TINY, tokens, tmp_path / "parts.pt", "parts")
    assert not torch.equal(stopped.lm_head.weight, whole.lm_head.weight)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert curve == whole_curve


def test_another_recipes_state_is_refused(tmp_path):
    train_model(TINY, some_tokens(), tmp_path / "state.pt", "first", stop_at=1)
    with pytest.raises(ValueError, match=r"state\.pt"):
        train_model(replace(TINY, learning_rate=1.0), some_tokens(), tmp_path / "state.pt", "second")


# scores


def successor_model(input_ids, use_cache):
    """Is certain that each id is followed by the next number."""
    return SimpleNamespace(logits=torch.nn.functional.one_hot((input_ids + 1) % 3000, 3000) * 50.0)


def test_perplexity_of_a_certain_and_of_an_ignorant_model():
    counting = np.arange(2500, dtype=np.uint16)  # across two borders of windows
    assert perplexity(successor_model, counting) == pytest.approx(1.0, abs=1e-5)

    def ignorant(input_ids, use_cache):
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 3000))

    assert perplexity(ignorant, counting) == pytest.approx(3000, rel=1e-4)
    assert agreement(successor_model, successor_model, counting) == 1.0
    assert agreement(successor_model, ignorant, counting) == 0.0


@pytest.mark.parametrize("name, recipe", [("demo", TARGET), ("demo-draft", DRAFT)])
def test_the_shipped_weights_score_as_recorded(name, recipe, held_out):
    model = load(name)
    assert model.config.hidden_size == recipe.hidden_size
    assert model.config.num_hidden_layers == recipe.num_hidden_layers
    report = json.loads((names.WEIGHTS / "training.json").read_text())["models"]
    recorded = report["target" if name == "demo" else "draft"]
    assert recorded["parameters"] == sum(p.numel() for p in model.parameters())
    assert recorded["curve"][-1]["step"] == recipe.steps
    # Ten windows from all over the text stand for the whole, which takes half a minute.
    starts = range(0, len(held_out) - 1025, len(held_out) // 10)
    logarithms = [math.log(perplexity(model, held_out[start : start + 1025])) for start in starts]
    assert sum(logarithms) / len(logarithms) == pytest.approx(math.log(recorded["held_out_perplexity"]), abs=0.2)


def test_the_pair_is_small_enough_for_git():
    assert sum(path.stat().st_size for path in names.WEIGHTS.rglob("*") if path.is_file()) < 16e6


def test_the_demo_writes_text_that_does_not_repeat_itself(tokenizer):
    model = load("demo")
    asked = prompt(Workload(), tokenizer)  # what run_llama.py runs by default
    length = {"max_new_tokens": 200, "min_new_tokens": 200}
    out = model.generate(asked.input_ids, attention_mask=asked.attention_mask, do_sample=False, **length)
    new = out[0, asked.input_ids.shape[1] :]
    assert len(set(new.tolist())) >= 20
    assert RESERVED_ID not in new


# names


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.2-1B", "./demo", "C:/models/llama", "random", "gguf:file"])
def test_other_names_are_returned_unchanged(name):
    assert resolve(name, torch.float32) == name


def test_the_demo_is_where_it_ships():
    assert Path(resolve("demo", torch.bfloat16)) == names.WEIGHTS / "target"
    assert Path(resolve("demo-draft", torch.bfloat16)) == names.WEIGHTS / "draft"


@pytest.mark.parametrize("kind", ["random", "inflated", "inflated-draft"])
def test_an_unknown_body_is_refused_with_what_is_known(kind):
    with pytest.raises(ValueError, match=r"llama-160m, tinyllama-1\.1b, llama-2-7b"):
        resolve(f"{kind}:gpt2", torch.float32)


def test_an_unknown_dtype_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="fp32, bf16, fp16"):
        resolve("random:llama-160m", torch.float64)
    assert list(tmp_path.iterdir()) == []


def test_missing_demo_weights_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(names, "WEIGHTS", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"fastllama\.demo\.train"):
        resolve("demo", torch.float32)


def test_only_random_names_are_random():
    assert is_random("random:llama-160m")
    assert not any(is_random(name) for name in ("demo", "inflated:llama-160m", "random", "some/random:path"))
