"""A layer of the step compiled ahead of time: kept by name, found again, and as exact as the step itself."""

import copy
import gc
import os
import shutil
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.activations import GELUActivation

from fastllama.decode import reserved
from fastllama.kernels import native
from fastllama.model import layer_package, layered_step
from fastllama.model.layer_package import Own, Shared, name_of
from fastllama.model.layered_step import LayeredStep
from tests.tiny import GREEDY, SAMPLED, generate, pair, prompt

NEW = 12


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder of its own for what is kept, with the C++ that was built already."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "fastllama").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        before = native.cache_folder() / "native"
        if before.is_dir():
            (folder / "fastllama" / "native").symlink_to(before)
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "fastllama" / "layers"


def packages(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.pt2"))


def exact(vanilla, ours, batch: str = "padded") -> bool:
    inputs = prompt(batch)
    return all(
        torch.equal(
            generate(ours, inputs, max_new_tokens=NEW, **how), generate(vanilla, inputs, max_new_tokens=NEW, **how)
        )
        for how in (GREEDY, SAMPLED)
    )


def test_one_package_serves_every_layer_length_and_model(kept):
    vanilla, ours = pair()
    ours.preallocate(3, 26, compile="static", products="stock", bucket=16)
    assert isinstance(ours._engine._step, LayeredStep) and exact(vanilla, ours)
    assert "static compile by layer," in ours.path
    (package,) = packages(kept)
    made = package.stat().st_mtime_ns
    for changes in (
        {"num_hidden_layers": 5},
        {"rope": "llama3", "seed": 3},
        {"vocab_size": 500, "tie_word_embeddings": True},
        {"max_position_embeddings": 4096},
    ):
        vanilla, ours = pair(**changes)
        ours.preallocate(3, 1000 if "max_position_embeddings" in changes else 40, compile="static", products="stock")
        assert exact(vanilla, ours), changes
    assert packages(kept) == [package] and package.stat().st_mtime_ns == made


def test_a_cache_that_grows_needs_no_other(kept, monkeypatch):
    monkeypatch.setattr("fastllama.decode.reservation._AHEAD", 16)
    vanilla, ours = pair()
    ours.preallocate(3, 26, compile="static", products="stock")
    ours.free()
    ours._engine.default = ours._engine.config = reserved.FastConfig(compile="static", products="stock")
    inputs = prompt("padded")
    before, long = ours._engine.reallocations, {"max_new_tokens": 300, "min_new_tokens": 300, **GREEDY}
    found = generate(ours, inputs, **long)
    assert ours._engine.reallocations >= before + 2 and "by layer" in ours.path
    assert torch.equal(found, generate(vanilla, inputs, **long)) and len(packages(kept)) == 1


@pytest.fixture
def layer():
    """(own, shared) of a layer, as a step has them."""
    _, ours = pair()
    ours.preallocate(1, 26, products="stock")
    engine = ours._engine
    seen = {}

    def spy(weights, keys, values, mask, valid, rows, positions, ids, index, cos, sin):
        seen["own"] = Own(weights.blocks[0], weights.heads, keys[0], values[0])
        seen["shared"] = Shared(mask, rows, positions, index, cos, sin, weights.embed(ids))
        return step(weights, keys, values, mask, valid, rows, positions, ids, index, cos, sin)

    step, engine._step = engine._step, spy
    generate(ours, prompt("one"), max_new_tokens=2, **GREEDY)
    return seen["own"], seen["shared"]


def test_what_changes_the_code_changes_the_name(layer, monkeypatch):
    own, shared = layer
    name = name_of(own, shared)
    longer = [torch.zeros(*x.shape[:2], 800, x.shape[3]) for x in (own.keys, own.values)]
    mask = torch.zeros(1, 1, 1, 800)
    assert name_of(own._replace(keys=longer[0], values=longer[1]), shared._replace(mask_B11S=mask)) == name
    assert name_of(own, shared._replace(positions_S=torch.arange(3))) == name
    others = [
        (own._replace(heads=own.heads._replace(scale=0.5)), shared),
        (own._replace(block=own.block._replace(activation=nn.GELU())), shared),
        (own._replace(block=own.block._replace(activation=nn.LeakyReLU(0.1))), shared),
        (own._replace(block=own.block._replace(activation=nn.LeakyReLU(0.2))), shared),
        (own._replace(block=own.block._replace(activation=GELUActivation())), shared),
        (own._replace(block=own.block._replace(activation=GELUActivation(use_gelu_python=True))), shared),
        (own._replace(block=own.block._replace(input_norm=own.block.input_norm._replace(eps=0.1))), shared),
        (own._replace(keys=own.keys.bfloat16()), shared),
        (own, shared._replace(rows_B1=torch.arange(2)[:, None])),
        (own, shared._replace(mask_B11S=None)),
    ]
    names = {name, *(name_of(*each) for each in others)}
    assert len(names) == len(others) + 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert name_of(own, shared) not in names


def test_what_has_no_name_is_compiled_whole_and_said(layer):
    own, _ = layer

    class Odd(nn.Module):
        def forward(self, x):
            return x.tanh()

    hooked = nn.SiLU()
    hooked.register_forward_hook(lambda module, given, out: 2 * out)
    patched = nn.SiLU()
    patched.forward = torch.tanh
    strange = nn.SiLU()
    strange.table = [1, 2]
    odd = [Odd(), hooked, patched, nn.PReLU()]
    for activation in odd:
        words = f"a {type(activation).__name__} takes part"
        assert layer_package.obstacle(own._replace(block=own.block._replace(activation=activation))) == words
    for function in (lambda x: x, pair):
        gelu = GELUActivation()
        gelu.act = function
        with_function = own._replace(block=own.block._replace(activation=gelu))
        assert layer_package.obstacle(with_function) == "a function takes part"
    with_list = own._replace(block=own.block._replace(activation=strange))
    assert layer_package.obstacle(with_list) == "a list takes part"
    turned = own._replace(keys=own.keys.transpose(1, 2))
    assert layer_package.obstacle(turned) == "the cache has a layout of its own"
    assert layer_package.obstacle(own) is None


def test_a_layer_that_becomes_opaque_and_plain_again(kept):
    vanilla, ours = pair()
    ours.preallocate(3, 26, compile="static", products="stock")
    assert exact(vanilla, ours) and "by layer" in ours.path
    for model in (vanilla, ours):
        model.model.layers[1].mlp.act_fn = nn.Sequential(model.model.layers[1].mlp.act_fn, nn.Softsign())
    assert exact(vanilla, ours)
    assert "static compile of the whole step (a Sequential takes part)" in ours.path
    for model in (vanilla, ours):
        model.model.layers[1].mlp.act_fn = model.model.layers[1].mlp.act_fn[0]
    assert exact(vanilla, ours) and "by layer" in ours.path


def test_an_interruption_while_it_is_bound_leaves_no_step_of_some_layers(kept, monkeypatch):
    vanilla, ours = pair()
    ours.preallocate(3, 26, compile="static", products="stock")
    assert exact(vanilla, ours)
    calls = []

    def interrupted(own, shared):
        calls.append(own)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return name_of(own, shared)

    ours.load_state_dict(copy.deepcopy(vanilla.state_dict()), assign=True)  # bound anew by the next call
    with monkeypatch.context() as patch:
        patch.setattr(layered_step, "name_of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(ours, prompt("padded"), max_new_tokens=NEW, **GREEDY)
    assert len(calls) == 2 and exact(vanilla, ours) and "by layer" in ours.path


def test_new_weights_are_read(kept):
    vanilla, ours = pair()
    ours.preallocate(3, 26, compile="static", products="stock")
    assert exact(vanilla, ours)
    other, _ = pair(seed=9)
    loaded = copy.deepcopy(other.state_dict())
    ours.load_state_dict(loaded, assign=True)
    assert exact(other, ours)
    with torch.no_grad():
        for model in (other, ours):
            model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    assert exact(other, ours)


def test_it_keeps_no_weight_and_no_cache_alive(kept):
    _, ours = pair()
    ours.preallocate(3, 26, compile="static", products="stock")
    engine = ours._engine
    step = engine._step
    tensors = [weakref.ref(engine.weights.blocks[0].qkv.joint.weight), weakref.ref(engine.cache.keys[0])]
    ours.free()
    gc.collect()
    assert step is not None and [tensor() for tensor in tensors] == [None, None]


@pytest.fixture
def compiled(kept, monkeypatch):
    """What was compiled once, in the place of compiling it again; and how often that was asked for."""
    _, ours = pair()
    ours.preallocate(3, 26, compile="static", products="stock")
    (package,) = packages(kept)
    content, asked = package.read_bytes(), []

    def compile(own, shared, path, *how):
        asked.append(path)
        path.write_bytes(content)

    monkeypatch.setattr(layer_package, "_compile", compile)
    return package, asked


def test_a_torn_package_is_made_anew(compiled):
    package, asked = compiled
    vanilla, ours = pair()
    content = package.read_bytes()
    package.write_bytes(content[:1000])
    ours.preallocate(3, 30, compile="static", products="stock")
    assert exact(vanilla, ours) and len(asked) == 1 and package.read_bytes() == content


def test_who_wants_what_another_compiles_waits_for_it(compiled, layer, monkeypatch):
    package, asked = compiled
    content = package.read_bytes()

    def slowly(own, shared, path, *how):
        asked.append(path)
        time.sleep(0.3)
        path.write_bytes(content)

    monkeypatch.setattr(layer_package, "_compile", slowly)
    with ThreadPoolExecutor(3) as pool:
        assert len(set(pool.map(lambda _: layer_package.load("wanted by three", *layer), range(3)))) == 3
    assert len(asked) == 1
    shutil.rmtree(asked[0].parent)


def test_where_nothing_can_be_kept_it_is_compiled_all_the_same(compiled, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(native, "cache_folder", lambda: tmp_path / "file")
    vanilla, ours = pair()
    ours.preallocate(3, 26, compile="static", products="stock")
    assert exact(vanilla, ours) and "by layer" in ours.path and len(compiled[1]) == 1


def test_another_process_neither_compiles_nor_imports_the_compiler(kept):
    program = """
import sys, torch
from tests.tiny import GREEDY, generate, pair, prompt
torch.set_num_threads(int(sys.argv[1]))
_, ours = pair()
ours.preallocate(3, 26, compile="static", products="stock")
print(generate(ours, prompt("padded"), max_new_tokens=12, **GREEDY)[0].tolist())
print("by layer" in ours.path, "torch._inductor.compile_fx" in sys.modules)
"""
    _, ours = pair()
    ours.preallocate(3, 26, compile="static", products="stock")
    expected = generate(ours, prompt("padded"), max_new_tokens=12, **GREEDY)[0].tolist()
    threads, root = str(torch.get_num_threads()), str(Path(__file__).parents[1])
    command = [sys.executable, "-c", program, threads]
    told = subprocess.run(command, capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONPATH": root})
    assert told.stdout.splitlines() == [str(expected), "True False"], told.stderr
    assert len(packages(kept)) == 1


def test_no_compiler_is_one_sentence(monkeypatch, tmp_path):
    from torch._inductor.exc import InvalidCxxCompiler

    def broken(*args, **kwargs):
        raise RuntimeError("deep inside") from InvalidCxxCompiler()

    monkeypatch.setattr(native, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", broken)
    _, ours = pair()
    with pytest.raises(ValueError, match=r"^compile='static' compiles C\+\+, and no working compiler was found"):
        ours.preallocate(3, 26, compile="static", products="stock")
    assert ours._engine.cache is None and not packages(tmp_path)


@pytest.mark.parametrize("others", [2, 3])
def test_headers_are_compiled_by_themselves_from_a_machines_fourth_package_on(others, monkeypatch, tmp_path):
    monkeypatch.setattr(native, "cache_folder", lambda: tmp_path)
    for number in range(others):
        folder = tmp_path / "layers" / native.machine() / str(number)
        folder.mkdir(parents=True)
        (folder / "layer.pt2").touch()
    given = {}

    def compile(traced, package_path, inductor_configs):
        given.update(inductor_configs)
        raise RuntimeError("enough is seen")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile)
    _, ours = pair()
    with pytest.raises(RuntimeError, match="enough is seen"):
        ours.preallocate(3, 26, compile="static", products="stock")
    assert given["aot_inductor.precompile_headers"] is (others == 3)
