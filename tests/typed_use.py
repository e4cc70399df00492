"""A user's script with types, read by the type checker (`mypy`, see pyproject.toml) and run by nobody.

The first half must be allowed. In the second each wrong call is marked, and a mark that hides nothing is an error, so
the checker fails where it would no longer find one.
"""

import torch
from transformers import AutoTokenizer, TextIteratorStreamer

import fastllama
from fastllama import FastConfig, Generated, LlamaForCausalLM, Sampling, SamplingProcessor, demo


def allowed() -> list[int]:
    name: str = demo.resolve("demo", torch.float32)
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(name, fast=FastConfig(compile="native", bucket=64))
    tokenizer = AutoTokenizer.from_pretrained(name)
    reserved: int = model.preallocate(batch_size=2, cache_length=256, memory="1GB", cache_k="q8_0")
    streamer = TextIteratorStreamer(tokenizer)
    ids = torch.tensor([[1, 2, 3]])
    model.generate(ids, max_new_tokens=8, streamer=streamer, sampling=Sampling.llama_cpp(seed=3))
    logits: torch.Tensor = model.step(model.prefill(ids).argmax(-1, keepdim=True))
    seen: list[Generated] = []
    results = model.generate_many([[1, 2], ids[0]], max_new_tokens=[4, 8], on_result=lambda _, one: seen.append(one))
    scores: torch.Tensor = SamplingProcessor(Sampling(top_k=5), torch.ones_like(ids))(ids, logits[:, -1])
    fastllama.register()
    report = model.assisted
    accepted = 0 if report is None else report.accepted_tokens
    model.free()
    path: str = f"{model.path} {fastllama.__version__}"
    return [*results[0].ids, results[0].new_tokens, accepted, reserved, len(scores), len(path)]


def refused(model: LlamaForCausalLM) -> None:
    FastConfig(bucket="64")  # type: ignore[arg-type]
    FastConfig(compiled="static")  # type: ignore[call-arg]
    FastConfig().bucket = 32  # type: ignore[misc]
    Sampling(top_p="0.9")  # type: ignore[arg-type]
    SamplingProcessor(0.9)  # type: ignore[arg-type]
    LlamaForCausalLM.from_pretrained("demo", fast="native")  # type: ignore[arg-type]
    model.preallocate(batch_size="2")  # type: ignore[arg-type]
    model.preallocate(1, 256, "static")  # type: ignore[arg-type]
    model.generate(sampling={"top_k": 5})  # type: ignore[arg-type]
    model.generate_many("import os", slots=2.5)  # type: ignore[arg-type]
    model.prefill([[1, 2, 3]])  # type: ignore[arg-type]
    words: int = model.path  # type: ignore[assignment]
    fastllama.register(model, words)  # type: ignore[call-arg]
