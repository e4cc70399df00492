"""The draft's refinement on what the target writes: its texts, its batches, and that it resumes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from fastllama.demo.refine import Refinement, batch_at, learning_rate_at, refine, written_texts
from fastllama.demo.tokenizer import BOS_ID
from fastllama.demo.train import WEIGHTS
from tests import tiny

PLAN = Refinement(texts=8, length=40, longest_prompt=12, rows_at_once=4, steps=20, batch_size=4, warmup_steps=2)


def some_tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(3, tiny.VOCAB, 4000).astype(np.uint16)


@pytest.fixture(scope="module")
def pair():
    return tiny.pair()


def a_draft():
    torch.manual_seed(0)
    config = tiny.config(hidden_size=32, intermediate_size=64, num_hidden_layers=1, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config).eval()


def test_texts_are_the_targets_own_behind_prompts_of_the_library(pair):
    vanilla, ours = pair
    tokens = some_tokens()
    texts = written_texts(ours, tokens, PLAN)
    assert texts.shape == (8, 40) and (texts[:, 0] == BOS_ID).all()
    assert (texts == written_texts(ours, tokens, PLAN)).all()
    library = " ".join(map(str, tokens))
    assert all(f" {' '.join(map(str, text[1:8]))} " in f" {library} " for text in texts)
    # The first batch is greedy: each token behind the longest prompt is the target's first choice.
    logits = vanilla(input_ids=torch.from_numpy(texts[:4].astype(np.int64)), use_cache=False).logits.float()
    eos = vanilla.generation_config.eos_token_id
    logits[..., [] if eos is None else eos] = float("-inf")  # no text ends before its length
    assert (logits[:, 12:-1].argmax(-1).numpy() == texts[:4, 13:]).all()
    assert not (logits[:, 12:-1].argmax(-1).numpy() == texts[4:, 13:]).all()


def test_a_batch_follows_from_its_step_and_some_are_the_librarys():
    tokens = some_tokens()
    texts = np.full((8, 40), 7, dtype=np.uint16)
    batches = [batch_at(texts, tokens, PLAN, step) for step in range(8)]
    assert all(torch.equal(batch, batch_at(texts, tokens, PLAN, step)) for step, batch in enumerate(batches))
    assert [bool((batch == 7).all()) for batch in batches] == [step % 4 != 0 for step in range(8)]


def test_the_rate_rises_and_falls_to_nothing():
    rates = [learning_rate_at(PLAN, step) for step in range(PLAN.steps + 1)]
    assert rates[0] == PLAN.learning_rate / 2 and max(rates) == PLAN.learning_rate == rates[1] and rates[-1] == 0
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_it_learns_the_target_and_resumes(pair, tmp_path):
    target, tokens = pair[0], some_tokens()
    texts = np.random.default_rng(1).integers(3, tiny.VOCAB, (8, 40)).astype(np.uint16)
    whole, parts = a_draft(), a_draft()
    curve = refine(whole, target, texts, tokens, PLAN, tmp_path / "whole.pt")
    refine(parts, target, texts, tokens, PLAN, tmp_path / "parts.pt", stop_at=10)
    assert not torch.equal(parts.lm_head.weight, whole.lm_head.weight)
    parts = a_draft()
    assert refine(parts, target, texts, tokens, PLAN, tmp_path / "parts.pt") == curve
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
    ids = torch.from_numpy(texts.astype(np.int64))
    with torch.no_grad():
        wanted = target(input_ids=ids).logits.log_softmax(-1).flatten(0, 1)
        apart = [
            F.kl_div(draft(ids).logits.log_softmax(-1).flatten(0, 1), wanted, log_target=True, reduction="batchmean")
            for draft in (a_draft(), whole)
        ]
    assert apart[1] < 0.9 * apart[0]
    with pytest.raises(ValueError, match="belongs to another plan"):
        refine(parts, target, texts, tokens, replace(PLAN, seed=3), tmp_path / "parts.pt")


def test_the_shipped_draft_was_refined():
    report = json.loads((WEIGHTS / "training.json").read_text())
    assert report["draft_top1_agreement"] > report["refinement"]["top1_agreement_before"]
    assert report["refinement"]["plan"] == {**vars(Refinement())}
