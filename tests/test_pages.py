"""Large weights lie in huge pages where the system gives them, once, and are the same numbers."""

import copy
import re
from pathlib import Path

import psutil
import pytest
import torch
from transformers import LlamaConfig
from transformers import LlamaForCausalLM as Vanilla

from fastllama import LlamaForCausalLM
from fastllama.kernels import pages

GIVEN = pages.given
LARGE, SMALL = (1024, 1100), (1024, 1000)  # of fp32: above and below what is worth it


@pytest.fixture(autouse=True)
def given(monkeypatch):
    """The system has huge pages, or is told to us to have them."""
    monkeypatch.setattr(pages, "given", lambda: True)


def like(dtype=torch.float32, device="cpu") -> torch.Tensor:
    return torch.empty(0, dtype=dtype, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_a_large_tensor_begins_with_a_huge_page_and_is_all_of_its_storage(dtype):
    shape = (4400, 1024)
    made = pages.empty(shape, like(dtype))
    assert made.shape == shape and made.dtype == dtype and made.data_ptr() % 2**21 == 0
    assert made.storage_offset() == 0 and made.untyped_storage().nbytes() == made.nbytes
    made.fill_(3)
    assert torch.equal(copy.deepcopy(made), torch.full(shape, 3, dtype=dtype))


def test_small_tensors_and_those_of_other_devices_are_left():
    assert not pages.holds(pages.empty(SMALL, like()))
    assert pages.empty(LARGE, like(device="meta")).is_meta
    weight = torch.ones(SMALL)
    assert pages.moved(weight) is weight
    across = torch.ones(LARGE).T
    assert pages.moved(across) is across


def test_a_large_one_is_copied_once():
    weight = torch.randn(LARGE)
    there = pages.moved(weight)
    assert torch.equal(there, weight) and there.data_ptr() != weight.data_ptr()
    assert pages.moved(there) is there
    assert pages.moved(there[:1050]).data_ptr() == there.data_ptr()  # a part of it lies there too
    assert pages.moved(there.clone()).data_ptr() % 2**21 == 0


def test_what_is_joined_is_their_concatenation():
    parts = [torch.randn(rows, 1100) for rows in (500, 524)]
    there = pages.joined(parts)
    assert torch.equal(there, torch.cat(parts)) and pages.moved(there) is there
    assert torch.equal(pages.joined([part[:8] for part in parts]), torch.cat([part[:8] for part in parts]))


def test_memory_goes_with_its_tensor():
    before = psutil.Process().memory_info().rss
    for _ in range(20):
        pages.empty((32 * 2**20,), like()).fill_(1)
    assert psutil.Process().memory_info().rss < before + 3 * 128 * 2**20


@pytest.mark.parametrize("setting", ["always madvise [never]", None])
def test_a_system_without_huge_pages_is_left_alone(setting, monkeypatch, tmp_path):
    path = tmp_path / "enabled"
    if setting is not None:
        path.write_text(setting)
    monkeypatch.setattr(pages, "_SETTING", path)
    monkeypatch.setattr(pages, "given", GIVEN.__wrapped__)
    weight = torch.ones(LARGE)
    assert pages.moved(weight) is weight
    assert not pages.holds(pages.empty(LARGE, weight))


def test_the_path_is_silent_where_there_are_none(monkeypatch, tmp_path):
    monkeypatch.setattr(pages, "given", lambda: False)
    _, ours = models(tmp_path)
    ours.preallocate(batch_size=1, cache_length=32)
    ours.generate(torch.arange(1, 9).view(1, 8), max_new_tokens=2, do_sample=False)
    assert "products: " in ours.path and "huge" not in ours.path


def test_where_memory_is_short_a_weight_stays(monkeypatch):
    weight = torch.ones(LARGE)
    free = psutil.virtual_memory()._replace(available=weight.nbytes)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    assert pages.moved(weight) is weight


def models(folder: Path) -> tuple[Vanilla, LlamaForCausalLM]:
    """Both from one file, whose weights transformers maps."""
    config = LlamaConfig(
        vocab_size=128, hidden_size=1024, intermediate_size=1280, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    Vanilla(config).save_pretrained(folder)
    loaded = [kind.from_pretrained(folder, dtype=torch.float32).eval() for kind in (Vanilla, LlamaForCausalLM)]
    return loaded[0], loaded[1]


def huge_bytes(address: int) -> int:
    """Bytes in huge pages of the region of memory that holds an address."""
    regions = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    for region in regions:
        start, end = (int(edge, 16) for edge in region.split(" ", 1)[0].split("-"))
        if start <= address < end:
            return int(re.search(r"AnonHugePages: +(\d+) kB", region)[1]) * 1024
    raise AssertionError("no such region")


def test_a_model_holds_each_weight_once_and_writes_the_same(tmp_path):
    vanilla, ours = models(tmp_path / "model")
    ids = torch.arange(1, 9).view(1, 8)
    expected = vanilla.generate(ids, max_new_tokens=12, do_sample=False)
    places = []
    for _ in range(2):  # the second time nothing moves
        ours.preallocate(batch_size=1, cache_length=32)
        assert torch.equal(ours.generate(ids, max_new_tokens=12, do_sample=False), expected)
        places.append([parameter.data_ptr() for parameter in ours.parameters()])
    assert places[0] == places[1]
    output = ours.model.layers[0].self_attn.o_proj.weight
    down = ours.model.layers[1].mlp.down_proj.weight
    assert pages.holds(output) and pages.holds(down)
    # Of each layer's four matrices and the head, all but the head's half of a megabyte.
    assert ", 8 in huge pages" in ours.path
    if GIVEN():
        assert huge_bytes(down.data_ptr() + down.nbytes // 2) > 0
    assert len({value.untyped_storage().data_ptr() for value in ours.model.layers[0].mlp.parameters()}) == 2
    ours.save_pretrained(tmp_path / "again")
    again = Vanilla.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in vanilla.state_dict().items())
    output.data.zero_()  # what is written to a parameter is what a step reads
    vanilla.model.layers[0].self_attn.o_proj.weight.data.zero_()
    changed = vanilla.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(ours.generate(ids, max_new_tokens=12, do_sample=False), changed)
    assert not torch.equal(changed, expected)
