"""The table of options: every name of each reaches the field that it is for, and no words make a traceback."""

import io
import shlex
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastllama
from fastllama.lab.cli import settings as cli_settings
from fastllama.lab.cli.command import main
from fastllama.lab.cli.parser import parse, parser
from fastllama.lab.cli.run import Run
from fastllama.lab.cli.table import GROUPS, OPTIONS, find
from fastllama.lab.points.assistance import Assistance
from tests.cli import generate

# What is typed, and what the field then holds; None for what only exists in one name that turns it off.
EXAMPLES = {
    "prompt": ("-a text", "-a text"),
    "file": ("a file", "a file"),
    "escape": (None, True),
    "interactive": (None, True),
    "system_prompt": ("Be brief.", "Be brief."),
    "chat_template": (None, False),
    "from_llama_cpp": ("main -n 3", "main -n 3"),
    "dry_run": (None, True),
    "model": ("a/model", "a/model"),
    "dtype": ("bf16", "bf16"),
    "device": ("cpu", "cpu"),
    "weights": ("int8", "int8"),
    "compile": ("native", "native"),
    "threads": ("2", 2),
    "no_kv_offload": (None, True),
    "n_predict": ("-1", -1),
    "cache_length": ("0", 0),
    "ignore_eos": (None, True),
    "stop_strings": ("User:", ("User:",)),
    "sequences": ("3", 3),
    "parallel": ("2", 2),
    "defaults": ("llama.cpp", "llama.cpp"),
    "do_sample": (None, True),
    "seed": ("-1", -1),
    "temperature": ("0.7", 0.7),
    "top_k": ("-1", -1),
    "top_p": (".9", 0.9),
    "min_p": ("0.1", 0.1),
    "tfs_z": ("0.95", 0.95),
    "typical_p": ("0.5", 0.5),
    "repeat_penalty": ("1.1", 1.1),
    "repetition_penalty": ("1.2", 1.2),
    "repeat_last_n": ("-1", -1),
    "frequency_penalty": ("-0.5", -0.5),
    "presence_penalty": ("-1e-1", -0.1),
    "mirostat": ("2", 2),
    "mirostat_eta": ("0.2", 0.2),
    "mirostat_tau": ("3", 3.0),
    "min_keep": ("2", 2),
    "sampler_order": ("top-k;typ_p;temp", ("top_k", "typical_p", "temperature")),
    "sampling_seq": ("kfypmte", ("top_k", "tfs_z", "typical_p", "top_p", "min_p", "temperature", "penalties")),
    "cache_k": ("q8_0", "q8_0"),
    "cache_v": ("iq4_nl", "iq4_nl"),
    "context_shift": (None, True),
    "keep": ("-1", -1),
    "grp_attn_n": ("2", 2),
    "grp_attn_w": ("256", 256),
    "draft_model": ("demo-draft", "demo-draft"),
    "draft_tokens": ("4", 4),
    "p_split": ("0.2", 0.2),
    "draft_branches": ("3", 3),
    "draft_schedule": ("constant", "constant"),
    "draft_device": ("cpu", "cpu"),
    "draft_window": ("64", 64),
    "draft_weights": ("int4", "int4"),
    "prompt_lookup": ("5", 5),
}
# Options that need another beside them.
BESIDE = {"system_prompt": ["-i"], "chat_template": ["-i"]}
DRAFTED = ("draft_tokens", "p_split", "draft_branches", "draft_schedule", "draft_device", "draft_window")
BESIDE |= {name: ["-md", "x"] for name in DRAFTED}
BESIDE |= {"grp_attn_w": ["-gan", "2"], "min_keep": ["--temp", "1"]}
SHOWN = ("stream", "json", "display_prompt", "quiet", "debug")  # flags like the others
NAMES = [(option.name, name) for option in OPTIONS.values() for name in option.names]


def reached(option, made: cli_settings.Settings):
    """What the option's field holds."""
    if option.target == "run":
        return getattr(made.run, option.field)
    if option.target == "config":
        return getattr(made.config, option.field)
    if option.target == "assistance":
        return getattr(made.assistance, option.field)
    return getattr(made.sampling, option.field)


def test_every_option_has_an_example():
    assert {*EXAMPLES, *SHOWN} == OPTIONS.keys()
    names = [name for option in OPTIONS.values() for name in (*option.names, *option.off)]
    assert len(names) == len(set(names)), "a name stands for two options"


@pytest.mark.parametrize("option, name", NAMES, ids=[name for _, name in NAMES])
def test_every_name_reaches_its_field(option, name):
    option = OPTIONS[option]
    typed, expected = EXAMPLES.get(option.name, (None, True))
    for spelled in {name, name[:2] + name[2:].replace("-", "_") if name.startswith("--") else name}:
        words = [spelled] if typed is None else [spelled, typed]
        parsed = parse([*BESIDE.get(option.name, []), *words])
        assert parsed.typed[option.name] == spelled
        assert reached(option, cli_settings.make(parsed)) == expected
        if typed is not None and spelled.startswith("--"):
            assert parse([f"{spelled}={typed}"]).values[option.name] == expected


@pytest.mark.parametrize("name", [name for option in OPTIONS.values() for name in option.off])
def test_every_name_that_turns_off_does(name):
    option = find(name)
    made = cli_settings.make(parse([*BESIDE.get(option.name, []), *option.names[:1], name]))
    assert reached(option, made) is False


def test_the_last_word_counts():
    assert parse(["-n", "3", "--max-new-tokens", "4"]).values["n_predict"] == 4
    assert parse(["--context-shift", "--no_context_shift"]).values["context_shift"] is False


def test_help_has_every_name():
    text = parser().format_help()
    for option in OPTIONS.values():
        assert all(name in text for name in (*option.names, *option.off)), option.name
    assert all(title + ":" in text for title in GROUPS)


def test_the_fields_are_there():
    known = {
        "run": {field.name for field in fields(Run)},
        "config": {*fastllama.FastConfig.__dataclass_fields__},
        "assistance": {*Assistance.__dataclass_fields__},
        "sampling": {*fastllama.Sampling.__dataclass_fields__},
    }
    for option in OPTIONS.values():
        assert option.field in known.get(option.target, known["sampling"])
    # A field that has no option would be a switch that the command line does not have.
    reached_of = {target: {o.field for o in OPTIONS.values() if o.target == target} for target in known}
    assert known["run"] == reached_of["run"] and known["assistance"] == reached_of["assistance"]
    assert known["sampling"] - reached_of["sampling"] == {"sampler_order", "seed"}
    # cache_device is --no-kv-offload.
    left_out = {"bucket", "prefill_chunk", "fuse", "products", "cache_device"}
    assert known["config"] - reached_of["config"] == left_out


# what is drawn


def sampling(*argv) -> fastllama.Sampling:
    return cli_settings.make(parse([str(word) for word in argv])).sampling


def test_defaults_of_the_two_sides():
    assert sampling().is_greedy and sampling("--repetition-penalty", 1.1).is_greedy
    assert sampling("--do-sample") == fastllama.Sampling(top_k=50)
    assert sampling("--top-p", 0.9) == fastllama.Sampling(top_k=50, top_p=0.9)
    assert sampling("--temp", 0, "--do-sample").is_greedy
    assert sampling("--defaults", "llama.cpp") == fastllama.Sampling.llama_cpp()
    assert sampling("--defaults", "llama.cpp", "--temp", 0).is_greedy
    assert sampling("--defaults", "llama.cpp", "--samplers", "transformers").sampler_order == "transformers"
    assert sampling("--temp", 1, "--samplers", "llama.cpp") == fastllama.Sampling(top_k=50, sampler_order="llama.cpp")


def test_filters_that_nobody_asked_for_are_not_said_to_have_no_effect():
    for argv in (
        ["--mirostat", 2],
        ["--defaults", "llama.cpp", "--mirostat", 1],
        ["--defaults", "llama.cpp", "--temp", 0],
    ):
        assert sampling(*argv).ignored == []
    assert sampling("--mirostat", 2, "--top-k", 5).ignored == ["top_k has no effect beside mirostat"]


def test_the_name_of_a_penalty_says_how_far_back_it_looks():
    assert sampling("--repeat-penalty", 1.1).repeat_last_n == 64
    assert sampling("--presence-penalty", 1).repeat_last_n == 64
    assert sampling("--repetition-penalty", 1.1).repeat_last_n == -1
    assert sampling("--defaults", "llama.cpp", "--repetition-penalty", 1.1).repeat_last_n == -1
    assert sampling("--repetition-penalty", 1.1, "--repeat-last-n", 8).repeat_last_n == 8
    both = sampling("--repetition-penalty", 1.1, "--frequency-penalty", 1, "--repeat-last-n", 8)
    assert (both.repeat_penalty, both.frequency_penalty, both.repeat_last_n) == (1.1, 1.0, 8)


def test_a_dry_run_says_what_would_run_and_how_to_say_it_again(capsys):
    argv = ["-p", "it's", "-n", "5", "--temp", "0.7", "-ctk", "q8_0", "--no-context-shift", "--samplers", "top_k;temp"]
    said = generate(capsys, *argv, "--dry-run")
    assert said.code == 0 and said.err == ""
    assert "temperature 0.7, top_k 50; order top_k, temperature" in said.out and "cache_k q8_0" in said.out
    again = shlex.split(said.out.splitlines()[-1])
    assert again[:2] == ["fastllama", "generate"]
    assert parse(again[2:]).values == parse(argv).values


# no words make a traceback

WORDS = st.sampled_from(sorted({name for option in OPTIONS.values() for name in (*option.names, *option.off)}))
VALUES = st.sampled_from(
    ["0", "1", "-1", "2", "0.5", "nan", "inf", "-inf", "1e400", "9" * 400, "", " ", "q8_0", "demo", "top_k;top_p",
     "kfe", "llama.cpp", "native", "--", "-", "=", "main -p a", "\udcff", "\x00", "cpu", "int8", "٣"]
) | st.text(max_size=6).filter(lambda text: text not in ("-h", "--help"))  # fmt: skip
ARGV = st.lists(WORDS | VALUES | st.tuples(WORDS, VALUES).map("=".join), max_size=8)


@settings(deadline=None, max_examples=600)
@given(argv=ARGV)
def test_no_words_make_a_traceback(argv):
    try:
        made = cli_settings.make(parse(argv))
    except ValueError as error:
        assert "\n" not in str(error).replace("\\n", "")
        return
    assert isinstance(made, cli_settings.Settings)


@settings(deadline=None, max_examples=300)
@given(argv=ARGV)
def test_the_command_ends_in_what_would_run_or_in_one_sentence(argv):
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(["generate", "--dry-run", *(word for word in argv if word != "--debug")])
    if code == 0:
        assert err.getvalue() == "" and "fastllama generate" in out.getvalue()
    else:
        assert code == 2 and out.getvalue() == ""
        assert err.getvalue().startswith("error: ") and "shows where" not in err.getvalue()


@settings(deadline=None, max_examples=300)
@given(pairs=st.lists(st.tuples(WORDS, VALUES), max_size=5))
def test_no_options_with_values_make_a_traceback(pairs):
    argv = []
    for name, value in pairs:
        argv += [name] if find(name).kind is None else [name, value]
    try:
        cli_settings.make(parse(argv))
    except ValueError as error:
        assert str(error)
