"""Tensor parallelism: a model spread over processes that talk by gloo says what it says in one process."""

import pytest
import torch
import transformers
from transformers.distributed import DistributedConfig

from fastllama.lab.devices import paper
from tests import processes, spread_work, tiny
from tests.spread_work import CACHES, NEW

COMMON = [(2, "gqa"), (2, "single"), (2, "odd"), (4, "gqa")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spread")
    spread_work.save(folder)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return processes.run("tests.spread_work", folder, (2, 4))


@pytest.fixture(scope="module")
def vanilla(folder):
    names = spread_work.MODELS
    return {name: transformers.LlamaForCausalLM.from_pretrained(folder / name).eval() for name in names}


def everywhere(found, count: int, *names):
    """One thing of each process."""
    for mine in found[count]:
        for name in names:
            mine = mine[name]
        yield mine


@pytest.mark.parametrize("count, name", COMMON)
def test_tokens_are_vanillas(found, vanilla, count, name):
    expected = tiny.generate(vanilla[name], tiny.prompt("padded"), **tiny.GREEDY, **NEW)
    for ids in everywhere(found, count, name, "greedy"):
        assert torch.equal(ids, expected)


@pytest.mark.parametrize("count, name", COMMON)
def test_logits_of_prefill_and_steps_are_one_process_s(found, folder, count, name):
    expected = spread_work.logits(spread_work.load(folder, name))
    for logits in everywhere(found, count, name, "logits"):
        for ours, whole in zip(logits, expected, strict=True):
            torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count, name", COMMON)
def test_every_process_has_the_same_bits(found, count, name):
    first, *others = everywhere(found, count, name, "logits")
    for other in others:
        assert all(torch.equal(one, another) for one, another in zip(first, other, strict=True))


@pytest.mark.parametrize("count, name", COMMON)
def test_a_process_holds_whole_heads_in_one_storage_and_only_its_own_cache(found, count, name):
    for mine in everywhere(found, count, name):
        assert mine["kv_heads"] == max(spread_work.MODELS[name]["kv_heads"] // count, 1)
        assert mine["one_storage"]
        assert "fused qkv, gate+up" in mine["path"] and f"tensor parallel over {count} processes" in mine["path"]
        assert "by module" not in mine["path"]


@pytest.mark.parametrize("count, name", COMMON)
def test_forward_and_beam_search_stay_the_parents_and_right(found, vanilla, count, name):
    with torch.no_grad():
        expected = vanilla[name](**tiny.prompt("one")).logits
    beams = tiny.generate(vanilla[name], tiny.prompt("one"), num_beams=2, do_sample=False, **NEW)
    for mine in everywhere(found, count, name):
        torch.testing.assert_close(mine["forward"], expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(mine["beams"], beams) and mine["beams_path"].startswith("parent: ")


@pytest.mark.parametrize("count, name", COMMON)
def test_what_is_saved_is_the_whole_model_bit_for_bit(found, folder, vanilla, count, name):
    saved = transformers.LlamaForCausalLM.from_pretrained(folder / f"{name}-saved-by-{count}").state_dict()
    expected = vanilla[name].state_dict()
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], expected[key]) for key in expected)


@pytest.mark.parametrize("count, name", [(2, "gqa"), (2, "single"), (4, "gqa")])
def test_what_is_read_and_sent_is_what_the_paper_says(found, vanilla, count, name):
    expected = paper.cost(vanilla[name].config, count, positions=0, itemsize=4)
    embedding_is_summed = vanilla[name].tp_plan.get("model.embed_tokens") is not None
    for mine in everywhere(found, count, name):
        assert len(mine["sums"]) == expected.sums - (not embedding_is_summed)
        assert {4 * size for size in mine["sums"]} == {expected.sum_bytes}
        assert mine["weights"] == expected.weight_bytes


@pytest.mark.parametrize(
    "size, said",
    [
        (3, "4 attention heads are no whole number for each of 3 processes"),
        (2, "3 kv heads are neither a multiple nor a divisor of 2 processes"),
    ],
)
def test_heads_that_cannot_be_divided_are_refused_before_anything_is_loaded(size, said):
    heads = {"num_attention_heads": 6, "kv_heads": 3, "hidden_size": 96} if size == 2 else {"kv_heads": 2}
    _, model = tiny.pair(**heads)
    config = DistributedConfig(tp_size=size)
    with pytest.raises(ValueError, match=f"tensor parallelism cannot be honoured: {said}"):
        type(model).maybe_distribute_model(model, config, "a mesh that nobody asks")


def test_training_with_shared_kv_heads_is_refused(found):
    for said in everywhere(found, 2, "single", "backward"):
        assert said == "training is not possible with fewer kv heads than processes: use fewer processes"


def test_drawn_tokens_are_those_of_the_first_process_s_seed(found, vanilla):
    expected = tiny.generate(vanilla["gqa"], tiny.prompt("padded"), seed=5, **tiny.SAMPLED, **NEW)
    for ids in everywhere(found, 2, "more", "sampled"):
        assert torch.equal(ids, expected)
    first, second = everywhere(found, 2, "more", "many_drawn")
    assert first == second and all(first)


def test_many_prompts_are_those_one_by_one(found, vanilla):
    prompts, limits = [[5, 9, 3], [7, 3, 11, 4, 9, 2], [8]], [12, 4, 9]
    expected = []
    for ids, limit in zip(prompts, limits, strict=True):
        out = vanilla["gqa"].generate(torch.tensor([ids]), max_new_tokens=limit, **tiny.GREEDY)
        expected.append(out[0, len(ids) :].tolist())
    for many in everywhere(found, 2, "more", "many"):
        assert many == expected


def test_a_compiled_step_says_the_same(found, vanilla):
    expected = tiny.generate(vanilla["gqa"], tiny.prompt("padded"), **tiny.GREEDY, **NEW)
    for mine in everywhere(found, 2, "more"):
        assert all(torch.equal(ids, expected) for ids in mine["static"])
        assert "static compile" in mine["static_path"]


@pytest.mark.parametrize("name", CACHES)
def test_a_quantised_cache_is_no_further_off_than_in_one_process(found, folder, name):
    model = spread_work.load(folder, "wide")
    exact = spread_work.logits(model)
    model.preallocate(3, 32, cache_k=name, cache_v=name)
    expected = spread_work.logits(model)
    apart = max((one - whole).abs().max() for one, whole in zip(expected, exact, strict=True))
    for logits in everywhere(found, 2, "more", f"cache_{name}"):
        for ours, whole in zip(logits, expected, strict=True):
            # A rounding may fall to the other side; it may not add up to what rounding itself costs.
            assert (ours - whole).abs().max() <= apart / 4


def test_a_returned_cache_has_the_local_heads(found):
    assert list(everywhere(found, 2, "more", "returned_heads")) == [1, 1]


def test_assistance_runs_the_parents_code_and_says_so(found, vanilla):
    expected = tiny.generate(vanilla["gqa"], tiny.prompt("one"), **tiny.GREEDY, **NEW)
    for mine in everywhere(found, 2, "more"):
        assert torch.equal(mine["lookup"], expected)
        assert mine["lookup_path"].startswith("parent: assistance follows a clock")


def test_what_cannot_run_is_refused_by_name(found):
    for said in everywhere(found, 2, "more", "refused"):
        assert said["native"] == (
            "compile='native' cannot be honoured: the model is spread over 2 processes, and a C++ step is one process's"
        )
        assert said["packed"] == (
            "products='packed' cannot be honoured: weights that are spread over processes are not packed"
        )
        assert said["weights"].startswith("weights='int8' cannot be honoured beside tensor parallelism")
        for name in ("max_time", "max_time_many"):
            assert said[name].startswith("max_time=60.0 cannot be honoured: the model is spread over 2 processes")
