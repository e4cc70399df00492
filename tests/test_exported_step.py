"""fastllama.export: the compiled package against generate, and what it refuses."""

import re
import subprocess
import sys
import textwrap

import pytest
import torch

import fastllama
from fastllama import exporting
from fastllama.decode.exported import package
from fastllama.decode.reservation import shape_for
from fastllama.lab.records.sources import ROOT
from tests.tiny import GREEDY, generate, pair, prompt

NEW = 12


def greedy(prefill, step, inputs: dict) -> torch.Tensor:
    """What a loop of one's own generates, prompt and all."""
    ids, logits = [inputs["input_ids"]], prefill(inputs["input_ids"], inputs["attention_mask"])
    for _ in range(NEW - 1):
        ids.append(logits.argmax(-1, keepdim=True))
        logits = step(ids[-1])
    return torch.cat([*ids, logits.argmax(-1, keepdim=True)], 1)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(vanilla, ours, path) of a package that was compiled in this module; its prompts go in passes of 16."""
    vanilla, ours = pair(num_hidden_layers=1)
    generate(ours, prompt("one"), max_new_tokens=2, **GREEDY)
    path = tmp_path_factory.mktemp("exported") / "step.pt2"
    assert fastllama.export(ours, path, batch_size=3, cache_length=40, bucket=16, prefill_chunk=16) == path
    assert [file.name for file in path.parent.iterdir()] == ["step.pt2"]
    return vanilla, ours, path


@pytest.fixture(scope="module")
def loaded(exported):
    return fastllama.load_step(exported[2])


@pytest.mark.parametrize("length", [5, 16, 23])
@pytest.mark.parametrize("batch", ["one", "three", "padded"])
def test_the_package_generates_what_generate_does(exported, loaded, batch, length):
    vanilla, ours, _ = exported
    inputs = prompt(batch, length)
    expected = generate(vanilla, inputs, max_new_tokens=NEW, **GREEDY)
    assert torch.equal(greedy(loaded.prefill, loaded.step, inputs), expected)
    assert torch.equal(generate(ours, inputs, max_new_tokens=NEW, **GREEDY), expected)
    rows = len(inputs["input_ids"])
    held = inputs["attention_mask"].sum(1) + NEW - 1
    assert loaded.valid_past_index.tolist() == held.tolist() + [0] * (3 - rows)


def test_several_tokens_at_once_to_the_last_position(exported, loaded):
    vanilla, inputs = exported[0], prompt("three", 30)
    loaded.prefill(**inputs)
    more = torch.randint(3, 300, (3, 10), generator=torch.Generator().manual_seed(7))
    found = loaded.step(more)
    with torch.no_grad():
        expected = vanilla(torch.cat((inputs["input_ids"], more), 1)).logits[:, -1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="cache of 40 positions is full"):
        loaded.step(more[:, :1])


def test_step_refuses_what_it_cannot_continue(exported):
    fresh = fastllama.load_step(exported[2])
    assert (fresh.batch_size, fresh.cache_length, fresh.vocab_size) == (3, 40, 384)
    one = torch.full((1, 1), 7)
    with pytest.raises(ValueError, match=r"call prefill\(\) first"):
        fresh.step(one)
    with pytest.raises(ValueError, match="3 rows at most and was given 4"):
        fresh.prefill(torch.full((4, 2), 7))
    with pytest.raises(ValueError, match="the prompt has 41 tokens and the package's cache 40"):
        fresh.prefill(torch.full((1, 41), 7))
    fresh.prefill(torch.full((2, 4), 7))
    with pytest.raises(ValueError, match="1 rows and the prefill had 2"):
        fresh.step(one)
    with pytest.raises(ValueError, match="no token"):
        fresh.step(torch.empty(2, 0, dtype=torch.int64))


def _loops() -> dict[str, str]:
    """The loop on a bare package, wherever it is shown."""
    shown = {"docstring": textwrap.dedent(exporting.__doc__[exporting.__doc__.index("    import json") :])}
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    return shown | {f"README {i}": block for i, block in enumerate(b for b in blocks if "aoti_load_package" in b)}


@pytest.mark.parametrize("where", _loops())
def test_the_loop_that_is_shown_runs_without_fastllama_and_transformers(exported, where):
    code = _loops()[where] + "\nimport sys\nassert not {'fastllama', 'transformers'} & sys.modules.keys()\n"
    # From the package's folder and without the site's own paths of the repository.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=exported[2].parent)
    assert done.returncode == 0, done.stderr
    ids = torch.tensor([eval(re.search(r"torch\.tensor\(\[(\[[\d, ]+\])\]", code)[1])])
    ids = ids.repeat(3, 1)
    new = int(re.search(r"in range\((\d+)\):\n    logits", code)[1])
    expected = generate(exported[0], {"input_ids": ids}, max_new_tokens=new, **GREEDY)[:, ids.shape[1] :]
    assert eval(done.stdout) == expected.tolist()


MODELS = {
    "every head, nothing fused": ({"kv_heads": 4, "attention_bias": True, "mlp_bias": True}, {"fuse": "no"}),
    "tied": ({"tie_word_embeddings": True, "rope": "llama3"}, {"fuse": "qkv"}),
    "yarn": ({"rope": "yarn"}, {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_compiled_is_the_step(name):
    """The traced graph, run by torch, for the models and switches that a package may be of."""
    changes, switches = MODELS[name]
    vanilla, ours = pair(**changes)
    inputs = prompt("three")
    config = fastllama.FastConfig(products="stock", **switches)
    shape = shape_for(ours, 3, 40, config)
    with torch.no_grad():
        program = package.program(ours, shape, config)
        run = package.trace(program, shape).module()
    held = sum(buffer.nbytes for buffer in program.buffers()) - 2 * shape.reserved_length * shape.head_dim * 4
    assert held == sum(parameter.nbytes for parameter in ours.parameters())
    size = (3, shape.num_kv_heads, shape.reserved_length, shape.head_dim)
    keys, values = ([torch.zeros(size) for _ in range(2)] for _ in range(2))
    valid, positions = torch.zeros(3, dtype=torch.int64), torch.arange(40)

    def call(ids, mask=None):
        with torch.no_grad():
            return run(ids, torch.full((3,), ids.shape[1]), valid, positions, keys, values)

    assert torch.equal(greedy(call, call, inputs), generate(vanilla, inputs, max_new_tokens=NEW, **GREEDY))
    assert valid.tolist() == [14 + NEW - 1] * 3 and all(storage.any() for storage in (*keys, *values))


def test_the_shortest_cache():
    _, ours = pair(num_hidden_layers=1)
    config = fastllama.FastConfig(products="stock")
    shape = shape_for(ours, 1, 1, config)
    with torch.no_grad():
        run = package.trace(package.program(ours, shape, config), shape).module()
        caches = [[torch.zeros(1, 2, shape.reserved_length, 16)] for _ in range(2)]
        one = torch.ones(1, dtype=torch.int64)
        found = run(torch.tensor([[7]]), one, one - 1, torch.arange(1), *caches)
    torch.testing.assert_close(found, ours.prefill(torch.tensor([[7]])))


REFUSED = {
    "native": ({"compile": "native"}, "compile='native' cannot be exported: that step is C[+][+]"),
    "packed": ({"products": "packed"}, "products='packed' cannot be exported"),
    "small keys": ({"cache_k": "int8"}, "cache_k='int8' cannot be exported"),
    "small values": ({"cache_v": "f16"}, "cache_v='f16' cannot be exported"),
    "keep": ({"keep": 4}, "keep=4 cannot be exported"),
    "shift": ({"context_shift": True}, "context_shift=True cannot be exported"),
    "extend": ({"grp_attn_n": 2}, "grp_attn_n=2 cannot be exported"),
    "weights": ({"weights": "int8"}, "weights='int8' cannot be honoured: the model holds its weights as floats"),
    "size": ({"batch_size": 0}, "batch_size=0 is not allowed"),
    "unknown": ({"fast": True}, "export has no switch 'fast'"),
    "both": ({"config": fastllama.FastConfig(), "bucket": 32}, "either config or single switches to export"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exported_is_refused_by_name(name, tmp_path):
    arguments, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        fastllama.export(pair()[1], tmp_path / "step.pt2", **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_frequencies_that_follow_the_text_are_refused(rope, tmp_path):
    with pytest.raises(ValueError, match=f"rope_type '{rope}' cannot be exported"):
        fastllama.export(pair(rope=rope)[1], tmp_path / "step.pt2")


def test_other_models_and_paths_are_refused(tmp_path):
    vanilla, ours = pair()
    with pytest.raises(
        ValueError, match=r"takes a fastllama\.LlamaForCausalLM, not a LlamaForCausalLM of transformers"
    ):
        fastllama.export(vanilla, tmp_path / "step.pt2")
    with pytest.raises(ValueError, match=r"path='step\.so' is not allowed; allowed: a file name that ends in \.pt2"):
        fastllama.export(ours, "step.so")
    with pytest.raises(ValueError, match="there is no folder"):
        fastllama.export(ours, tmp_path / "nowhere" / "step.pt2")
    with pytest.raises(ValueError, match="the model is in training mode"):
        fastllama.export(ours.train(), tmp_path / "step.pt2")


def test_adapters_are_merged_first(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(pair()[1], settings).eval()
    with pytest.raises(ValueError, match=r"merge adapters first \(merge_and_unload\(\)\)"):
        fastllama.export(adapted.base_model.model, tmp_path / "step.pt2")


@pytest.mark.parametrize("name", ["nothing", "text"])
def test_what_is_no_package_is_refused(name, tmp_path):
    path = tmp_path / "step.pt2"
    if name == "text":
        path.write_text("def main():\n")
    with pytest.raises(ValueError, match="cannot be loaded: " + ("there is no such file" if name == "nothing" else "")):
        fastllama.load_step(path)


@pytest.mark.parametrize("kind", ["compiler", "other"])
def test_a_failed_compilation_leaves_no_file(kind, tmp_path, monkeypatch):
    from torch._inductor.exc import InvalidCxxCompiler

    def fail(*args, package_path, **kwargs):
        with open(package_path, "w") as file:
            file.write("half")
        raise InvalidCxxCompiler if kind == "compiler" else RuntimeError("disk")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    error, words = (ValueError, "no working compiler was found") if kind == "compiler" else (RuntimeError, "disk")
    _, ours = pair(num_hidden_layers=1)
    with pytest.raises(error, match=words):
        fastllama.export(ours, tmp_path / "step.pt2", cache_length=16)
    assert not list(tmp_path.iterdir())
