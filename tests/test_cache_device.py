"""cache_device: without effect beside weights on a CPU, and the refusals; with a GPU see test_context_cuda."""

import pytest
import torch

import fastllama
from fastllama.decode import cache_device
from tests.tiny import GREEDY, generate, pair, prompt


@pytest.mark.parametrize("compile", ["no", "native"])
def test_on_a_cpu_it_has_no_effect_and_path_says_so(compile):
    vanilla, ours = pair()
    expected = generate(vanilla, prompt("padded"), max_new_tokens=12, **GREEDY)
    ours.preallocate(3, 32, cache_device="cpu", products="native" if compile == "native" else "stock", compile=compile)
    assert torch.equal(generate(ours, prompt("padded"), max_new_tokens=12, **GREEDY), expected)
    assert ours.path.endswith("cache_device=cpu without effect: the model is there")


@pytest.mark.parametrize("device", ["cuda", "gpu", 0, "", True])
def test_only_the_cpu_is_another_place(device):
    with pytest.raises(ValueError, match=r"cache_device=.* is not allowed; allowed: None, cpu"):
        fastllama.FastConfig(cache_device=device)


@pytest.mark.parametrize("compile", ["static", "dynamic", "native"])
def test_a_compiled_step_stays_on_one_device(compile, monkeypatch):
    _, ours = pair()
    ours.preallocate(1, 16)
    cache = ours._engine.cache
    monkeypatch.setattr(cache_device, "model_device", lambda model: torch.device("cuda", 0))
    with pytest.raises(ValueError, match=f"compile='{compile}' cannot be honoured beside cache_device='cpu' with the"):
        ours.preallocate(1, 16, compile=compile, cache_device="cpu")
    assert ours._engine.cache is cache
    config = fastllama.FastConfig(cache_device="cpu")
    assert cache_device.cache_device(ours, config) == torch.device("cpu")
    assert cache_device.cache_device(ours, fastllama.FastConfig()) == torch.device("cuda", 0)
    assert cache_device.words(config, torch.device("cuda", 0)) == ", cache and attention on the CPU"
