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
