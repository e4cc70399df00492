"""At home in the ecosystem: what transformers and its neighbours build and run once `register` was called."""

import threading

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, pipeline

import fastllama
from fastllama import FastConfig
from fastllama.demo.names import demo_folder

TEMPLATE = (
    "{% for message in messages %}# {{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}# assistant:\n{% endif %}"
)
CHATS = [
    [{"role": "system", "content": "Write Python."}, {"role": "user", "content": "import os\ndef main("}],
    [{"role": "user", "content": "class Reader:"}],
]
PROMPTS = ["import os\nimport ", "def main(arguments):\n    ", "class Reader:\n    def "]


def with_template(folder):
    """The demo's files in `folder`, and a chat template beside them."""
    folder.mkdir()
    for file in demo_folder("target").iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return with_template(tmp_path_factory.mktemp("home") / "demo")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def vanilla(folder):
    fastllama.unregister()
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def registered(vanilla):
    """From here on, and after vanilla was loaded, transformers builds ours."""
    fastllama.register()
    yield
    fastllama.unregister()


@pytest.fixture
def ours(registered, folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(model) is fastllama.LlamaForCausalLM
    return model


def texts(model, tokenizer, prompts, **options) -> list:
    """What a text-generation pipeline writes."""
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    found = writer(prompts, do_sample=False, max_new_tokens=12, **options)
    return [each[0]["generated_text"] for each in found]


def test_a_pipeline_loads_ours_and_applies_the_chat_template(registered, folder, vanilla, tokenizer):
    writer = pipeline("text-generation", model=str(folder), dtype=torch.float32, device="cpu")
    assert type(writer.model) is fastllama.LlamaForCausalLM
    found = writer(CHATS[0], do_sample=False, max_new_tokens=12)[0]["generated_text"]
    assert writer.model.path.startswith("preallocated")
    assert found[:-1] == CHATS[0] and found[-1]["role"] == "assistant"
    ids = tokenizer.apply_chat_template(CHATS[0], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    expected = vanilla.generate(**ids, do_sample=False, max_new_tokens=12)[0, ids["input_ids"].shape[1] :]
    assert found[-1]["content"] == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [2, 3])
@pytest.mark.parametrize("prompts", [PROMPTS, CHATS], ids=["texts", "chats"])
def test_batches_of_a_pipeline(ours, vanilla, tokenizer, prompts, batch_size):
    expected = texts(vanilla, tokenizer, prompts, batch_size=batch_size)
    assert texts(ours, tokenizer, prompts, batch_size=batch_size) == expected
    assert ours.path.startswith("preallocated")


def test_streaming_from_a_thread(ours, vanilla, tokenizer):
    inputs = tokenizer(PROMPTS[1], return_tensors="pt")
    expected = vanilla.generate(**inputs, do_sample=False, max_new_tokens=24)[0, inputs["input_ids"].shape[1] :]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=600)
    options = {"do_sample": False, "max_new_tokens": 24, "streamer": streamer}
    thread = threading.Thread(target=ours.generate, kwargs={**inputs, **options})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == tokenizer.decode(expected)
    assert len([piece for piece in pieces if piece]) > 5  # as it is written, not at the end
    assert ours.path.startswith("preallocated")


def test_an_adapter_by_its_folder(registered, folder, vanilla, tokenizer, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    settings = peft.LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(3)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), settings)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.save_pretrained(tmp_path)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    inner = loaded.get_base_model()
    assert type(inner) is fastllama.LlamaForCausalLM
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    options = {"do_sample": False, "max_new_tokens": 12}
    found = loaded.generate(**inputs, **options)
    assert inner.path.startswith("preallocated") and "by module" in inner.path
    plain = vanilla.generate(**inputs, **options)
    expected = peft.PeftModel.from_pretrained(vanilla, tmp_path)
    try:
        assert torch.equal(found, expected.generate(**inputs, **options))
    finally:
        expected.unload()
    assert not torch.equal(found, plain)
    assert torch.equal(loaded.merge_and_unload().generate(**inputs, **options), found)
    assert "fused qkv" in inner.path


def test_switches_of_whatever_is_loaded(folder, vanilla, tokenizer):
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    fastllama.register(fast=FastConfig(cache_k="q8_0", cache_v="q8_0", products="stock"))
    try:
        small = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        own = fastllama.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, fast=FastConfig())
        for model, words in ((small, "cache q8_0/q8_0"), (own, "SDPA by kv group")):
            model.generate(**inputs, do_sample=False, max_new_tokens=2)
            assert words in model.path
    finally:
        fastllama.unregister()
    plain = fastllama.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain.generate(**inputs, do_sample=False, max_new_tokens=2)
    assert "SDPA by kv group" in plain.path
    with pytest.raises(ValueError, match="fast='native' is not allowed; allowed: None or a FastConfig"):
        fastllama.register(fast="native")
    assert transformers.LlamaForCausalLM is not fastllama.LlamaForCausalLM


def test_paths_are_logged(ours, tokenizer, caplog):
    with caplog.at_level("INFO", logger="fastllama"):
        ours.generate(**tokenizer(PROMPTS[0], return_tensors="pt"), do_sample=False, max_new_tokens=2)
    assert caplog.messages == [f"generated: {ours.path}"]
