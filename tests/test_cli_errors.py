"""fastllama generate: what is wrong, or has no effect, is said in one sentence."""

import pytest

from fastllama.lab.cli import answer
from fastllama.lab.cli.command import main
from tests.cli import generate

PROMPT = "def main(argv):\n"

# what has no effect is said


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--top-p", 0.9, "--temp", 0], "top_p has no effect at temperature 0"),
        (["-nkvo"], "-nkvo has no effect: weights and cache are on the CPU"),
        (["-gaw", 256], "-gaw has no effect without --grp-attn-n"),
        (["-np", 4], "-np has no effect: there is one text"),
        (["--keep", 4], "keep=4 without effect"),
        (["--samplers", "top_k;dry;temperature"], "--samplers: dry is not built and left out"),
    ],
)
def test_options_without_effect(capsys, flags, words):
    said = generate(capsys, "-p", PROMPT, "-n", 2, *flags)
    assert said.code == 0 and words in said.err


# what is wrong


@pytest.mark.parametrize(
    "argv, words",
    [
        (["-p", ""], "the prompt is empty"),
        ([], "the prompt is empty"),
        (["-p", "a", "-f", "b"], "-p and -f both give the prompt: leave one out"),
        (["-f", "there/is/none"], "there is no prompt file there/is/none"),
        (["-p"], "-p has no value"),
        (["-p", "a", "--max_new_tokens", "many"], "--max_new_tokens many is not a whole number"),
        (["-p", "a", "-n", 0], "-n 0 is not allowed"),
        (["-i", "--ctx_size", 1], "--ctx_size 1 is not allowed; allowed: 0 (the model's own) or"),
        (["-p", "a", "--temp", "nan"], "--temp nan is not allowed; allowed: a finite number"),
        (["-p", "a", "-r", ""], "-r '' is empty"),
        (["-p", "a", "--min_p", 2], "--min_p 2 is not allowed; allowed: a number from 0 to 1"),
        (["-p", "a", "--typical-p", 0], "--typical-p 0 is not allowed"),
        (["-p", "a", "--mirostat", 3], "--mirostat 3 is not allowed; allowed: 0, 1, 2"),
        (["-p", "a", "--repeat-last-n", -2], "--repeat-last-n -2 is not allowed"),
        (["-p", "a", "-ctk", "q9"], "-ctk q9 is not allowed; allowed: f32, f16"),
        (["-p", "a", "--keep", -2], "--keep -2 is not allowed"),
        (["-p", "a", "-gan", 3], "--grp-attn-w 512 is not a multiple of -gan 3"),
        (["-p", "a", "--compile", "often"], "--compile often is not allowed"),
        (["-p", "a", "--samplers", "top_k;magic"], "names 'magic', which is none of"),
        (["-p", "a", "--samplers", "top_k;top_k"], "names top_k twice"),
        (["-p", "a", "--samplers", "top_k", "--sampling-seq", "k"], "both give an order"),
        (["-p", "a", "--repeat-penalty", 1.1, "--repetition-penalty", 1.1], "are one penalty: leave one out"),
        (["-p", "a", "--repetition-penalty", 1.1, "--frequency-penalty", 1], "say which by --repeat-last-n"),
        (["-p", "a", "--draft", 4], "--draft needs --draft-model"),
        (["-p", "a", "--draft", "demo-draft"], "--draft demo-draft is not a whole number"),
        (["-p", "a", "-md", "demo-draft", "--prompt-lookup", 3], "leave it or --prompt-lookup out"),
        (["-p", "a", "-md", "demo-draft", "--context-shift"], "--context-shift does not go with -md"),
        (["-p", "a", "-ns", 2, "-n", -1, "--context-shift"], "-ns 2 does not go with --context-shift and -n -1"),
        (["-p", "a", "-i", "--json"], "--json does not go with -i"),
        (["-p", "a", "-i", "-md", "demo-draft"], "-md does not go with -i"),
        (["-p", "a", "-sys", "b"], "-sys belongs to --interactive"),
        (
            ["-p", "a", "-c", 4, "-n", 20],
            "a cache of 4 positions (-c) is too short for a prompt of 2 and 20 new tokens",
        ),
        (["-p", "a b c d e f", "-c", 4], "too short for a prompt of"),
        (["-p", "a", "-m", "none/"], "there is no model folder none/"),
        (["-p", "a", "-m", "x.gguf"], "-m x.gguf: a .gguf file is not loaded here"),
        (["-p", "a", "--device", "nowhere"], "device 'nowhere' cannot be used"),
        (["-p", "a\udcff"], "is not UTF-8 text"),
        (["-p", "a", "--from-llama-cpp", 'main -p "'], "a shell could not read this line"),
        (["surplus"], "surplus is not an option"),
        (["--json=1"], "--json takes no value"),
        (["-ie"], "-ie is not an option"),
        (["-n5"], "-n5 is not an option"),
    ],
)
def test_what_is_wrong_is_one_sentence(capsys, argv, words):
    said = generate(capsys, *argv)
    assert said.code == 2 and said.out == ""
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and words in said.err, said.err


def test_commands(capsys):
    assert main(["--help"]) == 0 and "fastllama generate" in capsys.readouterr().out
    assert main([]) == 2 and "no command was given" in capsys.readouterr().err
    assert main(["grow"]) == 2 and "there is no command 'grow'" in capsys.readouterr().err
    assert main(["generate", "--help"]) == 0 and "--mirostat-lr" in capsys.readouterr().out


def test_a_fault_is_told_where_it_is(capsys, monkeypatch):
    def fail(*how):
        raise RuntimeError("it broke. Badly")

    monkeypatch.setattr(answer, "run", fail)
    said = generate(capsys, "-p", "a")
    assert said == (2, "", "error: RuntimeError: it broke (--debug shows where)\n")
    assert "Traceback" in generate(capsys, "-p", "a", "--debug").err
