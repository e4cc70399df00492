"""Fixtures that several files share."""

import os

import pytest

# Nothing here may wait for a network.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def demo_tokenizer():
    from transformers import AutoTokenizer

    from fastllama.demo.train import WEIGHTS

    return AutoTokenizer.from_pretrained(WEIGHTS / "target")


@pytest.fixture
def light(monkeypatch):
    """No child processes, and a ceiling of a megabyte."""
    from fastllama.lab import ceiling, measure, memory, rounds

    monkeypatch.setattr(memory, "peaks", lambda point, name: memory.Peaks(10.0, 20.0, 0.5, 1.0))
    for module in (measure, rounds):
        monkeypatch.setattr(module, "Ceiling", lambda device: ceiling.Ceiling(device, 2**20))
