"""Inflated bodies compute the demo's function; random bodies are what their seed says.

Legend: D hidden size, T prompt tokens, V vocabulary; `small` is the demo, `big` the body.
"""

import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from fastllama.demo import checkpoint, names
from fastllama.demo.inflate import build_inflated
from fastllama.demo.random_model import RandomBody, build_random
from fastllama.demo.shapes import SHAPES, Shape
from fastllama.demo.text import held_out_documents
from fastllama.demo.tokenizer import RESERVED_ID

#                    D   L  N   K   H    I     V  tied
BODIES = {
    "mha": Shape(384, 8, 12, 12, 64, 1024, 6000, False),
    "gqa": Shape(512, 9, 16, 4, 64, 1408, 6000, False),
    "wide_groups": Shape(320, 6, 16, 2, 32, 704, 4096, False),
    "tied": Shape(1024, 7, 8, 4, 128, 800, 5000, True),
}
PROMPT_TOKENS, NEW_TOKENS = 60, 45


def load(folder) -> transformers.LlamaForCausalLM:
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def greedy(model, ids: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` new ids [B, count] that follow `ids` [B, T]."""
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return out[:, ids.shape[1] :]


@pytest.fixture(scope="module")
def small_folder() -> Path:
    return names.demo_folder("target")


@pytest.fixture(scope="module")
def small(small_folder):
    return load(small_folder)


@pytest.fixture(scope="module")
def prompt_2T(small_folder) -> torch.Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(small_folder)
    rows = [tokenizer(held_out_documents()[index][500:]).input_ids[:PROMPT_TOKENS] for index in (1, 4)]
    return torch.tensor(rows)


PAIRS = [*(("target", body) for body in (*BODIES, "llama-160m")), ("draft", "gqa"), ("draft", "tied")]


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def pair(request):
    """A demo model and the folder of a body that holds it."""
    which, body = request.param
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "body"
        build_inflated(names.demo_folder(which), BODIES.get(body) or SHAPES[body], out, torch.float32)
        yield load(names.demo_folder(which)), out


def test_an_inflated_body_computes_the_demos_function(pair, prompt_2T):
    small, big = pair[0], load(pair[1])
    known = small.config.vocab_size
    with torch.no_grad():
        want = small(prompt_2T).logits
        got = big(prompt_2T, output_hidden_states=True)
    assert (got.logits[..., :known] - want).abs().max() <= 1e-4 * want.abs().max()
    # The last entry comes after the final norm, whose surplus weights are not zero either.
    for hidden in got.hidden_states:
        assert torch.count_nonzero(hidden[..., small.config.hidden_size :]) == 0
    surplus = got.logits[..., known:]
    torch.testing.assert_close(surplus, got.logits[..., RESERVED_ID, None].expand_as(surplus), rtol=0, atol=1e-4)
    assert (got.logits.argmax(-1) < known).all()
    assert torch.equal(greedy(big, prompt_2T, NEW_TOKENS), greedy(small, prompt_2T, NEW_TOKENS))


def test_only_what_must_be_zero_is_zero(small_folder, small, tmp_path):
    shape, config = BODIES["gqa"], small.config
    build_inflated(small_folder, shape, tmp_path / "body", torch.float32)
    tensors = {}
    for file in (tmp_path / "body").glob("*.safetensors"):
        tensors.update(load_file(file))
    small_d, big_d = config.hidden_size, shape.hidden_size
    kv_used = config.num_key_value_heads  # the body's groups are as large as the demo's: one kv head each
    used = kv_used * shape.head_dim
    demo_kv, demo_inner = kv_used * config.head_dim, config.intermediate_size
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    readers = config.num_attention_heads * config.head_dim
    forced = {
        "q_proj": 0,
        "k_proj": (used - demo_kv) * small_d,
        "v_proj": (keys - demo_kv) * small_d,
        "o_proj": readers * (big_d - small_d),
        "gate_proj": 0,
        "up_proj": (shape.intermediate_size - demo_inner) * small_d,
        "down_proj": demo_inner * (big_d - small_d),
        "input_layernorm": 0,
        "post_attention_layernorm": 0,
        "norm": 0,
        "lm_head": 0,
        "embed_tokens": shape.vocab_size * (big_d - small_d),
    }
    written_out = {"o_proj": big_d * queries, "down_proj": big_d * shape.intermediate_size}
    for name, tensor in tensors.items():
        part = name.split(".")[-2]
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        expected = forced[part] if layer < config.num_hidden_layers else written_out.get(part, 0)
        zeros = tensor.numel() - int(torch.count_nonzero(tensor))
        # The demo's own weights, being bfloat16, may hold a few zeros.
        assert expected <= zeros <= expected + tensor.numel() // 1000, name


def test_an_inflated_checkpoint_is_sharded_and_says_what_it_is(small_folder, small, tmp_path):
    shape = BODIES["tied"]
    build_inflated(small_folder, shape, tmp_path / "body", torch.bfloat16)
    config = json.loads((tmp_path / "body/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert config["max_position_embeddings"] == 4096
    assert config["rms_norm_eps"] == pytest.approx(small.config.rms_norm_eps / 4)
    generation = json.loads((tmp_path / "body/generation_config.json").read_text())
    assert [generation[f"{key}_token_id"] for key in ("bos", "eos", "pad")] == [0, 1, 2]
    index = json.loads((tmp_path / "body/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * shape.parameters
    assert len(set(index["weight_map"].values())) == shape.num_hidden_layers + 2
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "body", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "body")) == 4096


@pytest.mark.parametrize(
    "change, field",
    [
        ({"hidden_size": 128}, "hidden_size"),
        ({"num_hidden_layers": 2}, "num_hidden_layers"),
        ({"vocab_size": 4000}, "vocab_size"),
        ({"head_dim": 48}, "head_dim"),
        ({"num_key_value_heads": 1}, "num_key_value_heads"),
    ],
)
def test_a_body_too_small_for_the_demo_is_refused(small_folder, tmp_path, change, field):
    shape = Shape(**{**vars(BODIES["gqa"]), **change})
    with pytest.raises(ValueError, match=field):
        build_inflated(small_folder, shape, tmp_path / "body", torch.float32)
    assert not (tmp_path / "body").exists()


def test_a_random_model_is_a_function_of_its_seed(small_folder, tmp_path):
    shape = BODIES["gqa"]
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        build_random(small_folder, shape, tmp_path / folder, torch.bfloat16, seed=seed)
    a, b, c = (transformers.LlamaForCausalLM.from_pretrained(tmp_path / folder) for folder in "abc")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        logits = [model(ids).logits for model in (a, b, c)]
    assert torch.isfinite(logits[0]).all()
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])
    assert sum(p.numel() for p in a.parameters()) == shape.parameters


def test_random_weights_are_normal_and_no_two_rows_are_equal():
    body = RandomBody(BODIES["gqa"], torch.float32)
    body.embeddings()
    table = body.tensor(3000, 1000)  # three periods of the tiled normals
    assert abs(table.mean()) < 1e-3 and abs(table.std() - 0.02) < 1e-3
    assert len(torch.unique(table, dim=0)) == 3000


@pytest.mark.parametrize("name", list(SHAPES))
def test_a_shape_counts_its_parameters(name):
    shape = SHAPES[name]
    fields = {key: value for key, value in vars(shape).items() if key != "rope_parameters"}
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    assert sum(p.numel() for p in model.parameters()) == shape.parameters
    sizes = {key: tuple(value.shape) for key, value in model.model.layers[0].state_dict().items()}
    assert sizes == {f"{key}.weight": size for key, size in shape.layer_sizes.items()}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(names.SHAPES, "llama-160m", BODIES["gqa"])
    return tmp_path / "fastllama"


def test_a_name_is_built_once_and_then_found(cache, monkeypatch):
    folders = [names.resolve(f"{kind}:llama-160m", torch.bfloat16) for kind in ("random", "inflated", "inflated-draft")]
    assert sorted(Path(folder) for folder in folders) == sorted(cache.iterdir())
    for folder in folders:
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    monkeypatch.delattr(names, "publish")
    assert names.resolve("inflated:llama-160m", torch.bfloat16) == folders[1]
    with pytest.raises(NameError):  # another dtype is another folder
        names.resolve("inflated:llama-160m", torch.float32)


def test_two_builders_at_once_both_succeed(cache):
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(names.resolve, "inflated:llama-160m", torch.float32) for _ in range(2)]
        first, second = (job.result() for job in jobs)
    assert first == second
    assert [str(path) for path in cache.iterdir()] == [first]


def test_the_slower_builder_uses_what_the_faster_one_put_in_place(tmp_path):
    final = tmp_path / "model"

    def build(folder: Path) -> None:
        for place in (folder, final):
            place.mkdir()
        (folder / "config.json").write_text("slower")
        (final / "config.json").write_text("faster")

    checkpoint.publish(final, build, needed_bytes=0)
    assert (final / "config.json").read_text() == "faster"
    assert list(tmp_path.iterdir()) == [final]


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def build(folder: Path) -> None:
        folder.mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.publish(tmp_path / "cache/model", build, needed_bytes=0)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_full_disk_is_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="GB free"):
        checkpoint.publish(tmp_path / "model", pytest.fail, needed_bytes=10**18)
    assert list(tmp_path.iterdir()) == []
