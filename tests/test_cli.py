"""fastllama generate: the text is that of model.generate."""

import importlib
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch
from transformers import AutoModelForCausalLM

import fastllama
from fastllama import demo
from fastllama.lab.cli import answer
from fastllama.lab.cli.command import main
from fastllama.lab.cli.stream import Detokenizer
from fastllama.lab.cli.timings import Timings
from tests.cli import generate

PROMPT = "def main(argv):\n"
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder():
    return demo.resolve("demo", torch.float32)


@pytest.fixture(scope="module")
def models(folder):
    """(vanilla, ours), float32."""
    return tuple(
        cls.from_pretrained(folder, dtype=torch.float32) for cls in (AutoModelForCausalLM, fastllama.LlamaForCausalLM)
    )


def text_of(model, tokenizer, prompt=PROMPT, seed=7, **arguments) -> str:
    """What `generate` of the model writes."""
    inputs = tokenizer(prompt, return_tensors="pt")
    torch.manual_seed(seed)
    ids = model.generate(**inputs, **arguments)[0, inputs.input_ids.shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True)


# the text


def test_greedy_text_is_generates_streamed_or_not(capsys, models, demo_tokenizer):
    expected = text_of(models[0], demo_tokenizer, max_new_tokens=40, do_sample=False)
    said = generate(capsys, "-p", PROMPT, "-n", 40, "--dtype", "fp32")
    assert said.code == 0 and said.out == expected + "\n"
    assert "greedy; preallocated" in said.err and "prompt eval" in said.err
    assert generate(capsys, "-p", PROMPT, "-n", 40, "--dtype", "fp32", "--no-stream").out == said.out
    assert generate(capsys, "-n", 40, "--dtype", "fp32", "-q", stdin=PROMPT + "\n") == (0, said.out, "")


def test_drawn_text_is_vanillas_seed_for_seed(capsys, models, demo_tokenizer):
    """Where nothing else is said, drawing is transformers': its order, and its top_k 50."""
    for flags, arguments in (
        (["--temperature", 0.7], {"temperature": 0.7}),
        (["--do-sample", "--top-p", 0.9, "--repetition-penalty", 1.2], {"top_p": 0.9, "repetition_penalty": 1.2}),
        (["--top-k", 5, "--min-p", 0.1], {"top_k": 5, "min_p": 0.1}),
    ):
        said = generate(capsys, "-p", PROMPT, "-n", 30, "--seed", 7, "--dtype", "fp32", *flags)
        expected = text_of(models[0], demo_tokenizer, max_new_tokens=30, do_sample=True, **arguments)
        assert said.out == expected + "\n"
        assert "seed 7" in said.err


@pytest.mark.parametrize(
    "flags, changes",
    [
        ([], {}),
        (["--temp", 1.1, "--top-k", 0, "--tfs", 0.9], {"temperature": 1.1, "top_k": 0, "tfs_z": 0.9}),
        (["--repeat-penalty", 1.3, "--presence-penalty", 0.2], {"repeat_penalty": 1.3, "presence_penalty": 0.2}),
        (["--sampling-seq", "kmt"], {"sampler_order": ("top_k", "min_p", "temperature")}),
        (
            ["--mirostat", 2, "--mirostat-lr", 0.2, "--mirostat-ent", 4],
            {"mirostat": 2, "mirostat_eta": 0.2, "mirostat_tau": 4.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        ),
    ],
)
def test_llama_cpps_defaults_draw_as_generate_does(capsys, models, demo_tokenizer, flags, changes):
    said = generate(capsys, "-p", PROMPT, "-n", 30, "-s", 7, "--dtype", "fp32", "--defaults", "llama.cpp", *flags)
    sampling = fastllama.Sampling.llama_cpp(**changes)
    assert said.out == text_of(models[1], demo_tokenizer, max_new_tokens=30, sampling=sampling) + "\n"


def test_switches_and_drafts_change_no_greedy_text(capsys, models, demo_tokenizer):
    expected = text_of(models[0], demo_tokenizer, max_new_tokens=30, do_sample=False) + "\n"
    for flags in (
        ["--compile", "native"],
        ["-c", 400, "-t", 1],
        ["--draft-model", "demo-draft", "--draft", 3],
        ["--assistant-model", "demo-draft", "-ps", 0.2],
        ["--prompt-lookup", 4],
    ):
        said = generate(capsys, "-p", PROMPT, "-n", 30, "--dtype", "fp32", *flags)
        assert (said.code, said.out) == (0, expected), said.err


def test_threads_are_put_back(capsys):
    before = torch.get_num_threads()
    seen = []
    original, answer.report = answer.report, lambda *how: seen.append(torch.get_num_threads())
    try:
        assert generate(capsys, "-p", PROMPT, "-n", 2, "-t", 1).code == 0
    finally:
        answer.report = original
    assert seen == [1] and torch.get_num_threads() == before


def test_a_text_goes_on_past_its_cache(capsys, models, demo_tokenizer):
    ours = models[1]
    ours.preallocate(batch_size=1, cache_length=48, context_shift=True, keep=3, cache_k="q8_0")
    try:
        expected = text_of(ours, demo_tokenizer, max_new_tokens=90, do_sample=False)
    finally:
        ours.free()
    flags = ["--context-shift", "--keep", 3, "-c", 48, "-ctk", "q8_0", "--dtype", "fp32"]
    said = generate(capsys, "-p", PROMPT, "-n", 90, *flags)
    assert said.out == expected + "\n" and "context shifted" in said.err


def test_a_text_without_an_end_is_the_same_as_far_as_it_is_read(capsys, monkeypatch, models, demo_tokenizer):
    """-n -1 with --context-shift steps by itself, since generate wants a length."""
    ours, pieces = models[1], []
    ours.preallocate(batch_size=1, cache_length=48, context_shift=True)
    try:
        expected = text_of(ours, demo_tokenizer, max_new_tokens=90, do_sample=False)
    finally:
        ours.free()

    def read(text):
        pieces.append(text)
        if len("".join(pieces)) >= len(expected):
            raise KeyboardInterrupt

    monkeypatch.setattr(answer, "write", read)
    flags = ["-n", -1, "--context-shift", "-c", 48, "--dtype", "fp32", "--ignore-eos"]
    assert generate(capsys, "-p", PROMPT, *flags).code == 130
    assert "".join(pieces).startswith(expected)


def test_new_tokens_until_the_cache_is_full(capsys):
    for count in (-1, -2):
        found = json.loads(generate(capsys, "-p", PROMPT, "-n", count, "-c", 40, "--json").out)
        assert len(found["prompt_ids"]) + len(found["ids"]) == 40


def test_json_is_one_object(capsys, demo_tokenizer):
    said = generate(capsys, "-p", PROMPT, "-n", 12, "--json", "--temp", 0.9, "-s", 3, "--dtype", "fp32")
    assert said.err == ""
    found = json.loads(said.out)
    assert found["text"] == demo_tokenizer.decode(found["ids"]) and found["finish"] == "length"
    assert found["sampling"] == {"temperature": 0.9, "top_k": 50, "seed": 3}
    assert found["timings"]["eval_tokens"] == 11 and found["timings"]["prompt_tokens"] == len(found["prompt_ids"])
    assert found["timings"]["sample_tokens"] == 12 and found["timings"]["sample_ms"] > 0
    again = generate(capsys, "-p", PROMPT, "-n", 12, "--temp", 0.9, "-s", 3, "--dtype", "fp32", "--display-prompt")
    assert again.out == PROMPT + found["text"] + "\n"
    assert re.search(r"^sample +[\d.]+ ms, 12 tokens, .* ms/token", again.err, re.MULTILINE)


def test_choosing_is_a_part_of_its_own_of_the_time():
    now, timings = [100.0], Timings(begun=100.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastllama.lab.cli.timings.time.perf_counter", lambda: now[0])
        timings.start(5)
        for passed, chosen in ((3.0, 1.0), (2.0, 0.5), (2.0, 0.5)):
            now[0] += passed
            timings.chosen(chosen)
            timings.token()
        found = timings.figures()
    assert (found["sample_ms"], found["sample_tokens"]) == (2000, 3)
    assert (found["prompt_eval_ms"], found["eval_ms"], found["total_ms"]) == (2000, 3000, 7000)
    assert "sample       not told apart from the rest of this run" in Timings().lines()


def test_several_texts_of_a_prompt(capsys):
    flags = ["-p", PROMPT, "-n", 8, "-ns", 3, "--dtype", "fp32"]
    drawn = json.loads(generate(capsys, *flags, "-np", 2, "--temp", 1, "-s", 1, "--json").out)["texts"]
    assert len({tuple(each["ids"]) for each in drawn}) == 3
    said = generate(capsys, *flags)
    texts = said.out.removesuffix("\n").split("\n---\n")
    assert len(texts) == 3 and len(set(texts)) == 1
    assert "warning: -ns 3: greedy texts of a prompt are all the same" in said.err


def test_a_text_ends_where_the_model_ends_it(capsys, models, folder, tmp_path):
    """The token that ends a text is whichever comes fifth here, so that there is one."""
    ids = json.loads(generate(capsys, "-p", PROMPT, "-n", 12, "--dtype", "fp32", "--json").out)["ids"]
    end = ids[4]
    kept = ids[: ids.index(end)]
    for name in os.listdir(folder):
        (tmp_path / name).write_bytes((Path(folder) / name).read_bytes())
    config = json.loads((tmp_path / "generation_config.json").read_text()) | {"eos_token_id": end}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    flags = ["-p", PROMPT, "-n", 12, "--dtype", "fp32", "-m", tmp_path, "--json"]
    found = json.loads(generate(capsys, *flags).out)
    assert found["ids"] == [*kept, end] and found["finish"] == "stop"
    longer = json.loads(generate(capsys, *flags, "--ignore-eos").out)
    assert len(longer["ids"]) == 12 and end not in longer["ids"] and longer["finish"] == "length"


def test_a_text_ends_behind_a_stop_string(capsys):
    flags = ["-p", PROMPT, "-n", 40, "--dtype", "fp32", "--json"]
    free = json.loads(generate(capsys, *flags).out)
    stop = free["text"].split()[2]
    end = free["text"].index(stop) + len(stop)
    for more in ([], ["-md", "demo-draft"], ["--context-shift", "-n", -1, "--ignore-eos"]):
        found = json.loads(generate(capsys, *flags, "--stop-strings", "not there", "-r", stop, *more).out)
        assert found["finish"] == "stop" and found["ids"] == free["ids"][: len(found["ids"])]
        assert len(found["text"]) >= end and stop not in found["text"][: end - 1]
    (one, two) = json.loads(generate(capsys, *flags, "-r", stop, "-ns", 2).out)["texts"]
    assert one == two == {name: found[name] for name in ("text", "ids", "finish")}


def test_escapes_are_read_where_they_are_asked_for(capsys):
    def prompt_of(*flags):
        return json.loads(generate(capsys, "-n", 1, "--json", *flags).out)["prompt_ids"]

    assert prompt_of("-p", r"a\n\"\\n", "-e") == prompt_of("-p", 'a\n"\\n') != prompt_of("-p", r"a\n\"\\n")


def test_a_file_is_a_prompt(capsys, tmp_path):
    (tmp_path / "prompt.txt").write_text(PROMPT + "\n")
    from_file = generate(capsys, "-f", tmp_path / "prompt.txt", "-n", 5).out
    assert from_file == generate(capsys, "-p", PROMPT, "-n", 5).out != ""


@pytest.mark.parametrize("text", ["naïve — 日本語 🙂 end", "  two  spaces\n\n\tand a tab", "x" * 50, ""])
def test_pieces_of_text_are_the_whole_text(demo_tokenizer, text):
    prompt, ids = demo_tokenizer("é — ").input_ids, demo_tokenizer(text, add_special_tokens=False).input_ids
    detokenizer = Detokenizer(demo_tokenizer, prompt)
    pieces = [detokenizer.add(token) for token in ids]
    assert "".join(pieces) + detokenizer.end() == text
    assert not any("\ufffd" in piece for piece in pieces)


# as a program


def test_the_program_is_installed(monkeypatch):
    found = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: found.update(arguments))
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    (script,) = found["entry_points"]["console_scripts"]
    name, module, function = script.replace("=", ":").split(":")
    assert name == "fastllama" and getattr(importlib.import_module(module), function) is main


@pytest.mark.usefixtures("forked")
def test_the_program_streams_and_ends_quietly_with_its_reader(models, demo_tokenizer):
    command = [sys.executable, "-m", "fastllama", "generate", "-p", PROMPT, "-n", "1500", "-c", "0", "--ignore-eos"]
    child = subprocess.Popen(
        [*command, "--dtype", "fp32"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True
    )
    first = child.stdout.read(30)
    child.stdout.close()  # as `| head` does
    errors = child.stderr.read()
    child.stderr.close()
    assert child.wait(300) == 0
    assert errors == ""
    expected = text_of(models[0], demo_tokenizer, max_new_tokens=30, do_sample=False)
    assert first == expected[:30]
