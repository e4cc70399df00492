"""Long prompts: in passes, without a mask of prompt by prompt; more reserved than used; the text that is repeated."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastllama.decode import chunks, engine
from fastllama.lab.points import workload
from fastllama.lab.points.workload import Workload
from tests.command import read, run
from tests.tiny import GREEDY, generate, pair, prompt

# passes


@pytest.fixture
def short_passes(monkeypatch):
    """Passes of 16 tokens for prompts of more than 20, and their lengths."""
    monkeypatch.setitem(chunks._WHOLE, "cpu", 20)
    monkeypatch.setattr(chunks, "_TOKENS", 32)
    monkeypatch.setattr(chunks, "_LEAST", 16)
    seen, plain = [], engine.prefill_chunk

    def watched(weights, cache, hidden_BQE, cos, sin, past):
        seen.append((past, hidden_BQE.shape[1]))
        return plain(weights, cache, hidden_BQE, cos, sin, past)

    monkeypatch.setattr(engine, "prefill_chunk", watched)
    return seen


@pytest.mark.parametrize(
    ("rows", "tokens", "device", "chunk"),
    [
        (1, 2048, "cpu", 2048),
        (1, 2049, "cpu", 512),
        (2, 5000, "cpu", 256),
        (64, 5000, "cpu", 128),
        (1, 8192, "cuda", 8192),
        (1, 131072, "cuda", 512),
    ],
)
def test_long_prompts_go_in_passes(rows, tokens, device, chunk):
    assert chunks.automatic_chunk(rows, tokens, device) == chunk


@pytest.mark.parametrize("kind", ["one", "padded", "three"])
@pytest.mark.parametrize("rope", ["default", "llama3", "dynamic"])
@pytest.mark.parametrize("products", ["stock", "auto"])
def test_passes_change_no_token(short_passes, kind, rope, products):
    vanilla, ours = pair(rope=rope)
    inputs = prompt(kind, 50)
    ours.preallocate(inputs["input_ids"].shape[0], 64, products=products)
    found = generate(ours, inputs, max_new_tokens=8, **GREEDY)
    assert len(short_passes) > 1 and max(tokens for _, tokens in short_passes) <= 32
    assert torch.equal(found, generate(vanilla, inputs, max_new_tokens=8, **GREEDY))


@pytest.mark.parametrize("cache", ["int8", "f16"])
@pytest.mark.parametrize("kind", ["one", "padded", "three"])
def test_passes_over_a_small_cache_attend_to_what_one_pass_does(short_passes, kind, cache):
    _, ours = pair()
    inputs, logits = prompt(kind, 50), []
    for chunk in (None, 64):
        ours.preallocate(inputs["input_ids"].shape[0], 64, cache_k=cache, cache_v=cache, prefill_chunk=chunk)
        logits.append(ours.prefill(**inputs))
    assert len(short_passes) > 2
    # A last digit in another order may round a stored number the other way.
    assert (logits[0] - logits[1]).abs().max() < 0.02 * logits[1].abs().max()


class _Largest(TorchDispatchMode):
    """The most numbers of any tensor that an operator returns."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


@pytest.mark.parametrize("products", ["stock", "auto"])
@pytest.mark.parametrize("cache", [None, "int8"])
def test_no_tensor_is_prompt_by_prompt(products, cache):
    _, ours = pair(max_position_embeddings=4096)
    length = 3000
    ours.preallocate(1, length + 1, products=products, cache_k=cache, cache_v=cache)
    ids = torch.randint(3, 380, (1, length))
    with _Largest() as largest:
        ours.generate(ids, max_new_tokens=1, **GREEDY)
    assert ids.numel() <= largest.numbers < length**2 / 2


# the text


def test_a_prompt_longer_than_the_text_starts_it_over(demo_tokenizer, monkeypatch):
    monkeypatch.setattr(workload, "held_out_text", lambda: "def one():\n    return 1\n")
    tokens = demo_tokenizer("def one():\n    return 1\n", add_special_tokens=False).input_ids
    ids = workload.prompt(Workload(1, 100, 1), demo_tokenizer).input_ids[0].tolist()
    assert ids[0] == demo_tokenizer.bos_token_id and len(ids) == 100
    start = next(place for place in range(len(tokens)) if (tokens * 20)[place : place + 99] == ids[1:])
    assert ids[1:] == (tokens * 20)[start : start + 99]


def test_a_prompt_of_131072_tokens(demo_tokenizer):
    ids = workload.prompt(Workload(1, 131072, 1), demo_tokenizer).input_ids
    assert ids.shape == (1, 131072)


# through the command line

SMALL = ["--dtype", "fp32", "--device", "cpu", "--runs", "1", "--warmup", "0"]


@pytest.mark.usefixtures("light", "logs")
@pytest.mark.parametrize("how", [["--preallocate"], ["--static-cache"]])
def test_a_cache_longer_than_its_use_and_one_new_token(tiny, tmp_path, capsys, how):
    file = tmp_path / "points.jsonl"
    sizes = ["--prompt-length", "40", "--new-tokens", "1", "--cache-length", "300"]
    assert run("--model", tiny, *SMALL, *sizes, *how, "--json", file) == 0
    (point,) = read(file)
    assert point["cache_length"] == 300 and point["parity"] == "exact" and point["predicted_mb"] > 1
    assert point["decode_tok_per_s"] is point["row_tok_per_s"] is point["decode_speedup"] is None
    out = " ".join(capsys.readouterr().out.split())
    assert (
        "peak predicted before loading" in out
        and "prefill " in out
        and "and no decode step: one new token" in out
        and "cache 300" in out
    )


@pytest.mark.usefixtures("light", "logs")
def test_static_cache_is_transformers_own_in_passes(tiny, tmp_path, capsys):
    file = tmp_path / "points.jsonl"
    sizes = ["--prompt-length", "40", "--new-tokens", "5", "--prefill-chunk", "16", "--batch-size", "2"]
    assert run("--model", tiny, *SMALL, *sizes, "--static-cache", "--json", file) == 0
    (point,) = read(file)
    assert point["path"] == "transformers, eager, static cache of 45" and point["parity"] == "exact"
    assert point["switches"] == {"preallocate": False, "static_cache": True, "prefill_chunk": 16, "compile": "no"}
    assert point["switch_defaults"] == {
        "preallocate": False, "static_cache": False, "prefill_chunk": None, "compile": "no",
    }  # fmt: skip
    assert "--static-cache" in point["command"] and "static" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--static-cache", "--preallocate"], "--static-cache is transformers' own cache: leave out --preallocate"),
        (["--static-cache", "--compile", "static"], "--static-cache says nothing new beside --compile"),
        (["--static-cache", "--cache-length", "30"], "a cache of 30 positions is too short"),
        (["--static-cache", "--cache-k", "int8"], "--cache-k needs --preallocate"),
        (["--prefill-chunk", "3"], "prefill_chunk=3 is not allowed"),
    ],
)
def test_what_is_refused(capsys, argv, words):
    assert run(*SMALL, "--prompt-length", "40", *argv) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


@pytest.mark.usefixtures("light", "logs")
def test_positions_beyond_what_the_model_was_made_for_warn(tiny, capsys, caplog):
    assert run("--model", tiny, *SMALL, "--prompt-length", "600", "--new-tokens", "1", "--static-cache") == 0
    assert "601 positions are more than the" in capsys.readouterr().err
