"""Fixtures that several files share."""

import gc
import os
import shutil
import subprocess
import sys

import pytest

# Nothing here may wait for a network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Several processes share the processors, and threads that spin for one another would hold them from the others.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def _open_modes() -> set[str]:
    if "torch" not in sys.modules:
        return set()
    from tests import modes

    return set(modes.left_open())


# The files that take longest begin first, or one process is left alone with one of them at the end.
_LONG = (
    "parity", "small_weights", "memory_only", "half", "small_cache", "tree", "devices_lab", "tasks", "tensor_parallel",
    "assisted_accept", "suite", "layered_step", "wheel", "assisted_generate", "many", "exported_step", "context_shift",
    "peak", "preallocate", "self_extend", "inflated", "generation", "stored_attention", "small_packed", "native_step",
    "eval",
)  # fmt: skip

gc.disable()  # while everything is imported there is next to no garbage


def pytest_collection_modifyitems(items):
    first = {f"test_{name}.py": place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: first.get(item.path.name, len(first)))


def pytest_collection_finish(session):
    """What was imported stays, and each collection of what a test left would look at all of it, half a second long."""
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def torch_modes():
    """A test that leaves one of torch's modes open fails itself, and those that it spoils are not blamed for it."""
    before = _open_modes()
    yield
    assert _open_modes() <= before


@pytest.fixture(autouse=True, scope="module")
def registration():
    """What is compared with vanilla must not be ours by name: a module gives transformers its own class back."""
    yield
    if "fastllama.registration" in sys.modules:
        import transformers

        from fastllama.registration import _replaced

        assert not _replaced and transformers.LlamaForCausalLM.__module__.startswith("transformers.")


@pytest.fixture(scope="session")
def demo_tokenizer():
    from transformers import AutoTokenizer

    from fastllama.demo.train import WEIGHTS

    return AutoTokenizer.from_pretrained(WEIGHTS / "target")


@pytest.fixture
def whole(monkeypatch):
    """As where a layer cannot be compiled by itself."""
    from fastllama.decode import reserved

    monkeypatch.setattr(reserved, "layer_obstacle", lambda weights, cache: "the test says so")


@pytest.fixture
def light(monkeypatch):
    """No child processes, and a ceiling of a megabyte."""
    from fastllama.lab.measuring import ceiling, measure
    from fastllama.lab.memory import memory
    from fastllama.lab.suite import rounds
    from fastllama.lab.sweeping import estimate

    monkeypatch.setattr(memory, "peaks", lambda point, name: memory.Peaks(10.0, 20.0, 0.5, 1.0))
    for module in (measure, rounds, estimate):
        monkeypatch.setattr(module, "Ceiling", lambda device: ceiling.Ceiling(device, 2**20))


@pytest.fixture
def forked(monkeypatch):
    """Processes of this interpreter need not import everything: see tests/forked.py."""
    from tests import forked

    monkeypatch.setattr(subprocess, "Popen", forked.Popen)


@pytest.fixture
def logs(monkeypatch, tmp_path):
    """The folder in which run_llama.py keeps what it is not told where to keep."""
    import run_llama

    monkeypatch.setattr(run_llama, "LOGS", tmp_path / "tb_logs")
    return run_llama.LOGS


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A checkpoint's folder."""
    from tests.test_measure import write_tiny

    return write_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def browser():
    """A headless browser of a module's own: what it logs is that module's."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        reason = "no browser: apt-get install chromium chromium-driver"
        pytest.fail(reason) if os.environ.get("FASTLLAMA_BROWSER") == "required" else pytest.skip(reason)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield opened
    opened.quit()
