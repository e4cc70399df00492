"""Half precision: equality is reported, closeness is promised.

T positions, V vocabulary
"""

import pytest
import torch
import transformers

import fastllama
from fastllama import demo
from fastllama.decode.cache_name import CACHE_NAME
from fastllama.demo.text import held_out_text
from fastllama.kernels import native
from fastllama.kernels.linear import can_pack
from fastllama.lab.measuring.parity import teacher_forced_rms

POSITIONS = 1024
PREFIX = 64
WAYS = [
    {"compile": "static"},
    {"compile": "native"},
    {"compile": "no", "products": "stock"},
    {"compile": "no", "products": "native"},
    {"compile": "no", "products": "packed"},
]
# What takes longest in fp16 as well is under full: bf16 shows it every day.
CASES = [
    pytest.param(
        dtype,
        switches,
        id="-".join((name, *switches.values())),
        marks=[pytest.mark.full] if name == "fp16" and {"static", "stock"} & {*switches.values()} else [],
    )
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16))
    for switches in WAYS
]


@pytest.fixture(scope="module")
def folder():
    return demo.resolve("demo", torch.float32)


@pytest.fixture(scope="module")
def reference(folder, demo_tokenizer):
    """(ids [1, T], fp32 logits [T', V]): the reference's own tokens and what it thought of each of the new ones."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = torch.tensor([demo_tokenizer.encode(held_out_text())[:PREFIX]])
    torch.manual_seed(0)  # sampled, because greedy text of a small model soon repeats itself
    ids = model.generate(prompt, max_new_tokens=POSITIONS, min_new_tokens=POSITIONS, do_sample=True, top_k=0)
    assert len(set(ids[0, PREFIX:].tolist())) >= 100
    with torch.no_grad():
        return ids, model(input_ids=ids).logits[0, PREFIX - 1 : -1]


@pytest.fixture(scope="module")
def known():
    """Vanilla's logits by dtype, asked once for all ways of ours."""
    return {}


@pytest.fixture
def vanilla(request, folder, reference, known):
    """(dtype, logits [T', V]) of vanilla in half precision, one decode step a position."""
    if request.param not in known:
        known[request.param] = _stepped(folder, request.param, reference[0])
    return request.param, known[request.param]


@torch.no_grad()
def _stepped(folder, dtype: torch.dtype, ids: torch.Tensor) -> torch.Tensor:
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    out = model(input_ids=ids[:, :PREFIX], use_cache=True)
    logits = [out.logits[0, -1]]
    for position in range(PREFIX, ids.shape[1] - 1):
        token = ids[:, position : position + 1]
        out = model(input_ids=token, use_cache=True, **{CACHE_NAME: out[CACHE_NAME]})
        logits.append(out.logits[0, -1])
    return torch.stack(logits)


@pytest.mark.parametrize(("vanilla", "switches"), CASES, indirect=["vanilla"])
def test_our_logits_are_no_further_from_fp32_than_vanillas(switches, folder, reference, vanilla):
    ids, fp32 = reference
    dtype, theirs = vanilla
    ours = fastllama.LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    if "native" in switches.values() and native.load() is not None:
        pytest.skip(native.load())
    if switches.get("products") == "packed" and not can_pack(ours.lm_head.weight):
        pytest.skip(f"torch packs no {dtype} here")
    ours.preallocate(1, ids.shape[1], **switches)
    logits = [ours.prefill(ids[:, :PREFIX])[0]]
    logits += [ours.step(ids[:, position : position + 1])[0, -1] for position in range(PREFIX, ids.shape[1] - 1)]
    assert len(logits) == len(theirs) == POSITIONS
    assert teacher_forced_rms(torch.stack(logits), theirs, fp32) <= 1.1
