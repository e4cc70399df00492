"""Ctrl-C in the middle of anything leaves the model usable: right texts, whole weights, nothing taken."""

import contextlib
import gc

import pytest
import torch

import fastllama
from fastllama.decode import reservation, reserved, turn
from fastllama.decode.told import Told, told
from fastllama.model.forward import step
from fastllama.model.small_linear import held_format
from tests import modes, tiny
from tests.interruptions import interrupt, spread

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
NEW = 5


@pytest.fixture(autouse=True)
def collected():
    """What an interruption left in a cycle ends here, where its complaints are expected, and not in a later test."""
    yield
    gc.collect()


PROMPTS = [tiny.prompt("one", length, seed=length)["input_ids"][0].tolist() for length in (3, 9, 6, 12)]


@pytest.fixture(scope="module")
def models():
    vanilla, ours = tiny.pair()
    draft = tiny.pair(seed=3, num_hidden_layers=1)[1]
    return vanilla, ours, draft


@pytest.fixture(scope="module")
def expected(models):
    return {batch: greedy(models[0], batch) for batch in ("one", "padded")}


def greedy(model, batch: str, **asked) -> torch.Tensor:
    return tiny.generate(model, tiny.prompt(batch), max_new_tokens=NEW, **(tiny.GREEDY | asked))


def assert_usable(models, expected, free: bool) -> None:
    """As if nothing had been cut short; `free` where a text must not come from the reservation that was."""
    vanilla, ours, draft = models
    for model in (ours, draft):
        assert not model._engine.turn.is_taken() and not model._engine.fast.is_taken()
    assert not turn.calls_here()
    assert told() == Told()
    assert not modes.left_open()
    assert isinstance(ours.path, str)
    if free:
        ours.free()
        assert ours.valid_past_index is None
    for batch, text in expected.items():
        assert torch.equal(greedy(ours, batch), text)
    found = ours.state_dict()
    assert found.keys() == vanilla.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in vanilla.state_dict().items())
    assert sum(parameter.numel() for parameter in ours.parameters()) == sum(p.numel() for p in vanilla.parameters())


def check(models, expected, work, most: int = 16, within: str = "", lossy: bool = False) -> None:
    """Cuts `work()` short at up to `most` lines, on one model after the other's accidents."""
    right, cut = work(), 0
    for number, lines in enumerate(spread(work, most, within)):
        result = interrupt(lines, work)
        cut += result is None
        if result is not None and right is not None:
            assert torch.equal(result, right), lines.where
        assert_usable(models, expected, free=lossy or number % 3 == 0)
    assert cut > most // 4


def test_generate_from_its_first_reservation_on(models, expected, monkeypatch):
    monkeypatch.setattr(reservation, "_ROUNDING", 16)
    monkeypatch.setattr(reservation, "_AHEAD", 2)  # so that the cache grows

    def work():
        models[1].free()
        return greedy(models[1], "padded")

    check(models, expected, work)


@pytest.mark.parametrize("switches", [{"products": "packed"}, {"compile": "native"}, {"cache_k": "int8"}], ids=str)
def test_preallocate_and_generate(models, expected, switches):
    def work():
        models[1].preallocate(3, 32, **switches)
        return greedy(models[1], "padded")

    check(models, expected, work, lossy="cache_k" in switches)
    models[1].free()


def test_steps_alone(models, expected):
    models[1].preallocate(3, 32, compile="native")
    check(models, expected, lambda: greedy(models[1], "padded"), most=24, within="decode/engine")
    models[1].free()


def test_packing_and_unpacking(models, expected):
    """Parameters are never lost, whichever line of the packing ends it."""

    def work():
        models[1].preallocate(3, 32, products="packed")
        models[1].lm_head.weight.sum()
        return greedy(models[1], "one")

    check(models, expected, work, most=24, within="model/released")
    models[1].free()


def test_a_warm_up(models, expected, monkeypatch):
    def compiled(mode, device, capture, by_layer):
        return lambda *how: step(*how)

    monkeypatch.setattr(reserved, "compiled_step", compiled)
    check(models, expected, lambda: torch.tensor(models[1].preallocate(3, 32, compile="static")))
    models[1].free()


@pytest.mark.parametrize("asked", [{}, {"p_split": 0.1, "draft_branches": 3}], ids=["draft", "tree"])
def test_assisted_rounds(models, expected, asked):
    _, ours, draft = models
    draft.generation_config.num_assistant_tokens = 3
    work = lambda: greedy(ours, "one", assistant_model=draft, **asked)  # noqa: E731
    assert torch.equal(work(), expected["one"])
    check(models, expected, work)


def test_prompt_lookup(models, expected):
    check(models, expected, lambda: greedy(models[1], "one", prompt_lookup_num_tokens=2))


@pytest.mark.parametrize("compile", ["no", "native"])
def test_many_prompts(models, expected, compile):
    ours = models[1]
    ours.free()

    def work():
        if compile == "native":
            ours.preallocate(3, 32, compile="native")
        results = ours.generate_many(PROMPTS, slots=2, max_new_tokens=NEW, chunk=16, do_sample=False)
        return torch.tensor([result.ids for result in results])

    check(models, expected, work)
    ours.free()


def test_the_parents_own_path(models, expected):
    check(models, expected, lambda: greedy(models[1], "one", num_beams=2), most=12)


@pytest.mark.parametrize("compile", ["no", "native"])
def test_an_interrupted_text_is_not_continued(models, expected, compile):
    """After Ctrl-C in prefill or step, a step goes on with a whole text or says that there is none."""
    _, ours, _ = models
    ours.preallocate(3, 32, compile=compile)
    ids = torch.tensor([[5], [6], [7]])

    def work(steps: int = 2):
        ours.prefill(**tiny.prompt("padded"))
        for _ in range(steps):
            ours.step(ids)

    whole = []
    for steps in range(3):
        work(steps)
        whole.append(ours.step(ids + 1))
    work()
    refused = 0
    for lines in spread(work, 40):
        interrupt(lines, work)
        try:
            found = ours.step(ids + 1)
        except ValueError as fault:
            assert "call prefill() first" in str(fault)
            refused += 1
        else:
            assert any(torch.equal(found, right) for right in whole), lines.where
        work()
    assert refused > 10
    ours.free()


def test_a_streamer_that_is_interrupted(models, expected):
    _, ours, _ = models
    for last in range(NEW + 1):
        count = 0

        class Streamer:
            def put(self, ids, last=last):
                nonlocal count
                count += 1
                if count > last:
                    raise KeyboardInterrupt

            def end(self):
                pass

        with pytest.raises(KeyboardInterrupt):
            greedy(ours, "one", streamer=Streamer())
        assert_usable(models, expected, free=False)


def test_loading_in_few_bits(tmp_path):
    """transformers is left as it was, and the next loading works."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    tiny.pair()[0].save_pretrained(tmp_path)
    known = dict(AUTO_QUANTIZER_MAPPING)

    def load():
        return fastllama.LlamaForCausalLM.from_pretrained(tmp_path, fast=fastllama.FastConfig(weights="int8"))

    cut = 0
    for lines in spread(load, 12, "model/small_loading", event="call"):
        with contextlib.suppress(ValueError):  # transformers words what its reading threads raised
            cut += interrupt(lines, load) is None
        assert known == AUTO_QUANTIZER_MAPPING
        assert not modes.left_open()
    assert cut and held_format(load()) == "int8"
