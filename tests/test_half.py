"""Half precision: equality is reported, closeness is promised."""

import pytest
import torch
import transformers

import fastllama
from fastllama import demo
from fastllama.demo.text import held_out_text
from fastllama.lab.parity import teacher_forced_rms

POSITIONS = 1024
PREFIX = 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("compile", ["no", "static"])
def test_our_logits_are_no_further_from_fp32_than_vanillas(dtype, compile, demo_tokenizer):
    """Teacher-forced on the reference's own tokens: one decode step a position, for ours and for vanilla."""
    folder = demo.resolve("demo", torch.float32)
    reference = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = torch.tensor([demo_tokenizer.encode(held_out_text())[:PREFIX]])
    torch.manual_seed(0)  # sampled, because greedy text of a small model soon repeats itself
    ids = reference.generate(prompt, max_new_tokens=POSITIONS, min_new_tokens=POSITIONS, do_sample=True, top_k=0)
    assert len(set(ids[0, PREFIX:].tolist())) >= 100
    vanilla = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    ours = fastllama.LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    ours.preallocate(1, ids.shape[1], compile=compile)
    with torch.no_grad():
        fp32 = reference(input_ids=ids).logits[0, PREFIX - 1 : -1]
        past = vanilla(input_ids=ids[:, :PREFIX], use_cache=True)
        theirs, mine = [past.logits[0, -1]], [ours.prefill(ids[:, :PREFIX])[0]]
        for position in range(PREFIX, ids.shape[1] - 1):
            token = ids[:, position : position + 1]
            past = vanilla(input_ids=token, past_key_values=past.past_key_values, use_cache=True)
            theirs.append(past.logits[0, -1])
            mine.append(ours.step(token)[0, -1])
    ratio = teacher_forced_rms(torch.stack(mine), torch.stack(theirs), fp32)
    assert len(mine) == POSITIONS
    assert ratio <= 1.1
