"""--from-llama-cpp: what a command line of llama.cpp's main is here, and what it is not."""

import json
import shlex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastllama
from fastllama.lab.cli import llama_cpp
from fastllama.lab.cli import settings as cli_settings
from fastllama.lab.cli.parser import parse
from fastllama.lab.cli.table import OPTIONS, find
from fastllama.lab.cli.unmapped import UNMAPPED
from tests.cli import generate


def rows(line: str) -> dict[str, tuple[str | None, str]]:
    """By llama.cpp's words: ours and the note."""
    return {theirs: (ours, note) for theirs, ours, note in llama_cpp.translate(line).rows}


def made(line: str, *beside) -> cli_settings.Settings:
    return cli_settings.make(llama_cpp.under(llama_cpp.translate(line), parse([str(word) for word in beside])))


def test_a_usual_line():
    line = './main -m models/7B/model.gguf -p "Once upon a time" -n 64 --temp 0.7 -ngl 99 -t 8 -c 2048 -s 42 --top_k 20'
    found = rows(line)
    assert found["-p 'Once upon a time'"] == ("--prompt 'Once upon a time'", "")
    assert found["-n 64"] == ("--max-new-tokens 64", "")
    assert found["--top_k 20"] == ("--top-k 20", "")
    assert found["-ngl 99"] == (None, "layers on a GPU: use --device")
    assert found["-m models/7B/model.gguf"] == (None, "a .gguf file is not loaded here: name a checkpoint with --model")
    run, sampling = made(line).run, made(line).sampling
    assert (run.prompt, run.new_tokens, run.threads, run.cache_length, run.seed) == (
        "Once upon a time",
        64,
        8,
        2048,
        42,
    )
    assert run.model == "demo"
    assert sampling == fastllama.Sampling.llama_cpp(temperature=0.7, top_k=20)


def test_every_option_of_the_sweep():
    """The seed's options: flags of main in its inputs/option."""
    line = (
        "llama-cli -f prompt.txt --mirostat 2 --mirostat-lr 0.1 --mirostat-ent 5 --keep 20 -ctk q8_0 -ctv q4_0 -gan 2 "
        "-gaw 512 -nkvo --repeat-penalty 1.1 --repeat-last-n 32 --presence-penalty 0.1 --frequency-penalty 0.2 -ps 0.2 "
        "-md demo-draft --draft 8 -np 2 -ns 4 --ignore-eos --tfs 0.9 --typical 0.8 --top-p 0.9 --min-p 0.1"
    )
    translation = llama_cpp.translate(line)
    assert all(ours is not None for _, ours, _ in translation.rows), translation.table()
    values = parse(translation.argv).values
    assert (
        values["keep"] == 20 and values["cache_k"] == "q8_0" and values["draft_tokens"] == 8 and values["parallel"] == 2
    )


def test_what_stands_beside_counts_more():
    beside = made(
        "main -m a.gguf -n 5 --temp 0.2 -p one", "--model", "demo-draft", "-n", 7, "--defaults", "transformers"
    )
    assert (beside.run.model, beside.run.new_tokens, beside.run.prompt) == ("demo-draft", 7, "one")
    assert beside.sampling == fastllama.Sampling(temperature=0.2, top_k=50)


@pytest.mark.parametrize(
    "line, words, note",
    [
        ("main --grammar 'root ::= x'", "--grammar 'root ::= x'", "grammars are not built"),
        ("main -fa on -n 2", "-fa on", "attention never makes an N x N mask"),
        ("main -fa -n 2", "-fa", "attention never makes an N x N mask"),
        ("main --lora-scaled a.bin 0.5 -n 2", "--lora-scaled a.bin 0.5", "adapters are loaded in Python, by PEFT"),
        ("main --mlock -n 2", "--mlock", "weights are loaded by transformers"),
        ("main --no_mmap", "--no_mmap", "weights are loaded by transformers"),
        ("main --shiny 3 -n 2", "--shiny 3", "not an option that is known here"),
        ("main --shiny -n 2", "--shiny", "not an option that is known here"),
        ("main --json", "--json", "not an option that is known here"),  # ours, and not theirs
        ("main --weights int8 -n 2", "--weights int8", "not an option that is known here"),
        ("main stray -n 2", "stray", "not an option that is known here"),
        ("main -md draft.GGUF", "-md draft.GGUF", "name a checkpoint with --draft-model"),
        ("main -dev Vulkan0", "-dev Vulkan0", "devices go by torch's names"),
        ("main -hf org/model-GGUF", "-hf org/model-GGUF", "names a .gguf file"),
    ],
)
def test_what_is_not_mapped_is_said_with_the_reason(line, words, note):
    ours, why = rows(line)[words]
    assert ours is None and note in why
    if "-n 2" in line:
        assert rows(line)["-n 2"] == ("--max-new-tokens 2", "")


def test_values_in_our_words():
    assert rows("main -dev CUDA1")["-dev CUDA1"] == ("--device cuda:1", "")
    assert rows("main --device none")["--device none"] == ("--device cpu", "")
    assert rows("main --temp 0")["--temp 0"] == ("--temperature 0", "(greedy)")
    assert rows("main -s -1")["-s -1"] == ("--seed -1", "(another one each time)")
    assert rows("main --no-context-shift") == {"--no-context-shift": ("--no-context-shift", "")}
    assert made("main -dev CUDA1").run.device == "cuda:1"
    assert rows("main --n-predict=9") == {"--n-predict 9": ("--max-new-tokens 9", "")}


def test_notes_of_the_whole_line():
    def notes(line):
        return "\n".join(llama_cpp.translate(line).notes)

    assert "here --context-shift does" in notes("main -n 5")
    assert "--context-shift" not in notes("main -n 5 --context-shift") + notes("main -gan 2")
    assert "here --escape does" in notes(r"main -p 'a\nb'") and "--escape" not in notes(r"main -e -p 'a\nb'")
    assert "'|' head: what a shell does is not part of it" in notes("main -n 5 | head")
    assert "OMP_NUM_THREADS: a variable of the environment" in notes("OMP_NUM_THREADS=2 ./build/bin/main -n 5")
    assert "llama-server is not a name of llama.cpp's main" in notes("llama-server -n 5")
    assert "not a name" not in notes("/opt/llama-cli.exe -n 5")
    assert "the model is demo unless --model names another" in notes("main") and "the model" not in notes("main -m x/y")


def test_lines_that_continue_are_one_line():
    assert [row[0] for row in llama_cpp.translate("main -n 5 \\\n  -p hello").rows] == ["-n 5", "-p hello"]


@pytest.mark.parametrize(
    "line, words",
    [
        ("main -p 'a", "a shell could not read this line: no closing quotation"),
        ("main -n", "--from-llama-cpp: -n has no value"),
        ("main -n five", "--from-llama-cpp: -n five is not a whole number"),
        ("main --samplers magic", "names 'magic'"),
    ],
)
def test_a_wrong_line_is_one_sentence(capsys, line, words):
    said = generate(capsys, "--from-llama-cpp", line)
    assert said.code == 2 and said.out == "" and words in said.err and said.err.count("\n") == 1


def test_a_wrong_value_is_refused_by_their_name(capsys):
    said = generate(capsys, "--from-llama-cpp", "main -p a --min_p 3", "--dry-run")
    assert (said.code, said.err) == (2, "error: --min_p 3 is not allowed; allowed: a number from 0 to 1\n")


def test_a_dry_run_prints_the_mapping_and_runs_nothing(capsys):
    said = generate(capsys, "--from-llama-cpp", "./main -m x.gguf -p hello -n 5 -ngl 99 -s 3", "--dry-run")
    assert said.code == 0 and said.err == ""
    lines = said.out.splitlines()
    assert lines[2].split() == ["-n", "5", "--max-new-tokens", "5"]
    assert lines[3] == "-ngl 99    not mapped: layers on a GPU: use --device"
    assert lines[-1] == "fastllama generate --defaults llama.cpp --prompt hello --max-new-tokens 5 --seed 3"


def test_a_line_runs_as_its_translation(capsys):
    said = generate(capsys, "--from-llama-cpp", "./main -m x.gguf -p 'def f(' -n 9 -s 3 -ngl 9", "--dtype", "fp32")
    argv = ["--defaults", "llama.cpp", "-p", "def f(", "-n", 9, "-s", 3, "--dtype", "fp32"]
    assert said.code == 0 and said.out == generate(capsys, *argv).out
    assert "-ngl 9       not mapped: layers on a GPU: use --device" in said.err
    quiet = generate(capsys, "--from-llama-cpp", "main -p 'def f(' -n 9 -s 3 --log-disable", "--json")
    assert quiet.err == "" and json.loads(quiet.out)["sampling"]["seed"] == 3


def test_no_name_is_both_mapped_and_not():
    assert not [name for name in UNMAPPED if find(name) is not None and name in find(name).llama_cpp]


NAMES = st.sampled_from(sorted({*UNMAPPED, *(name for option in OPTIONS.values() for name in option.llama_cpp)}))
VALUE = st.sampled_from(["1", "-1", "0.5", "x.gguf", "q8_0", "", "'", '"', "|", "a b", "\\", "=", "on"]) | st.text(
    max_size=5
)


@settings(deadline=None, max_examples=300)
@given(words=st.lists(NAMES | VALUE, max_size=8), quoted=st.booleans())
def test_no_line_makes_a_traceback(words, quoted):
    line = shlex.join(words) if quoted else " ".join(words)
    try:
        cli_settings.make(llama_cpp.under(llama_cpp.translate(line), parse([])))
    except ValueError as error:
        assert str(error)
