"""What small weights cost in quality: the demo's perplexity on text that it has not seen."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import fastllama
from fastllama import FastConfig
from fastllama.demo.evaluate import perplexity
from fastllama.demo.names import resolve
from fastllama.demo.text import held_out_documents
from fastllama.demo.train import encode

_TOKENS = 20_000


@pytest.fixture(scope="module")
def demo() -> str:
    return resolve("demo", torch.float32)


@pytest.fixture(scope="module")
def text(demo) -> np.ndarray:
    """Pieces from all over the held-out text."""
    tokens = encode(AutoTokenizer.from_pretrained(demo), held_out_documents())
    piece = 1025
    starts = np.linspace(0, len(tokens) - piece, _TOKENS // piece).astype(int)
    return np.concatenate([tokens[start : start + piece] for start in starts])


@pytest.fixture(scope="module")
def of_floats(demo, text) -> float:
    return perplexity(fastllama.LlamaForCausalLM.from_pretrained(demo, dtype=torch.float32), text)


@pytest.mark.parametrize(("weights", "at_most"), [("int8", 1.005), ("int4-g32", 1.04)])
def test_perplexity_hardly_grows(weights, at_most, demo, text, of_floats):
    fast = FastConfig(weights=weights)
    ours = fastllama.LlamaForCausalLM.from_pretrained(demo, dtype=torch.float32, fast=fast)
    ratio = perplexity(ours, text) / of_floats
    print(f"{weights}: {ratio:.5f}")
    assert 0.99 < ratio <= at_most
