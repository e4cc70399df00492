"""python -m fastllama.lab options: its tokens are generate's, its tables what can be computed again by hand."""

import csv
import hashlib
import json
import math
import statistics
import struct

import pytest
import torch
import transformers

import fastllama
from fastllama.lab.__main__ import main
from fastllama.lab.options import flags, loop, split, text_score
from fastllama.lab.options.reason import Facts, reason
from fastllama.lab.options.setting import Setting
from fastllama.lab.options.store import Store
from fastllama.lab.options.subject import Subject, find
from fastllama.lab.options.timings import Timings
from fastllama.lab.records import readme
from tests.test_measure import write_tiny

SEED = 987654321
CPU = torch.device("cpu")
TABLE = """
[default]
-c 64 -t 1 --top-p 0.9 --min-p 0.1
[temp]
--temp 0/cold
--temp 0.8/same
[keep]
--keep 4/kept
-c 20 --keep 4/overflow
[mirostat]
--mirostat 2/mirostat_2
[split]
-np 0.1 -ns 2 -ps 0.2/split
[many]
-np 2 -ns 3/many
[threads]
-t 2/two
[nkvo]
-nkvo/nkvo
[window]
--repeat-last-n 8/window
[groups]
-gaw 32/alone
[long]
-c 8/short_context
"""
PROMPTS = {"one": "import os\nimport sys\n\ndef ", "two": "class Test(unittest.TestCase):\n    def"}


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    for name, text in PROMPTS.items():
        (folder / f"{name}.txt").write_text(text)
    (folder / "table.txt.own").write_text(TABLE)
    return folder


def command(model, inputs, out, *more):
    return [
        "options",
        *("--model", str(model), "--inputs", str(inputs), "--options", str(inputs / "table.txt.own")),
        *("--new-tokens", "12", "--runs", "2", "--out", str(out), "--device", "cpu", *more),
    ]


@pytest.fixture(scope="module")
def swept(tiny, inputs, tmp_path_factory):
    """A folder that a whole sweep wrote."""
    out = tmp_path_factory.mktemp("swept")
    assert main(command(tiny, inputs, out, "--draft", tiny, "--json", str(out / "means.json"))) == 0
    return out


def read_csv(out, option):
    with open(out / "aggregation" / f"tiny_{option}.csv", newline="") as file:
        return {(row["name"], row["prompt"]): row for row in csv.DictReader(file)}


def read_run(out, option, name, prompt, run=1):
    return json.loads(
        (out / "outputs" / f"tiny_{option}" / "outputs_log" / f"{prompt}_{name}_run{run}.json").read_text()
    )


# tokens


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--temp 0",
        "--mirostat 1 --mirostat-ent 3",
        "--mirostat 2",
        "--repeat-penalty 1.5 --repeat-last-n 8 --presence-penalty 0.2",
        "--typical 0.5 --tfs 0.9 --top-k 5",
        "--temp 0 --repeat-penalty 1.3",
        "-c 24 --keep 4",
        "-c 64 -gan 2 -gaw 8 -ctk f32 -ctv bf16",
    ],
)
def test_the_loops_tokens_are_those_of_generate(tiny, words):
    values = {**flags.DEFAULTS, "threads": 1, "context": 64, **flags.parse(words)}
    subject = Subject(find(tiny, torch.float32), torch.float32, CPU, "no", None)
    ids, sampling = list(range(5, 20)), flags.sampling(values, SEED)
    threads = torch.get_num_threads()
    subject.reserve(values, shifts=values["context"] == 24)
    found = loop.run(subject, ids, sampling, 20)
    given = torch.tensor([ids])
    expected = subject.model.generate(
        given, attention_mask=torch.ones_like(given), sampling=sampling, max_new_tokens=20, eos_token_id=1
    )
    torch.set_num_threads(threads)
    assert found.ids == expected[0, len(ids) :].tolist()
    assert len(found.ids) == 20 or found.ids[-1] == 1
    phases = found.timings.phases
    assert phases["sample"][1] == len(found.ids) and phases["eval"][1] == len(found.ids) - 1
    assert phases["prompt_eval"][1] == 15 and sum(ms for ms, _ in phases.values()) <= found.timings.total_ms


def others(kind, folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(write_tiny(folder))
    torch.manual_seed(0)
    shared = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.4}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_positions=64, n_embd=32, n_layer=2, n_head=2, **shared)
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.MistralConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            sliding_window=16,
            **shared,
        )
        model = transformers.MistralForCausalLM(config)
    model.save_pretrained(folder)
    return folder, model.eval()


@pytest.mark.parametrize("kind", ["gpt2", "mistral"])
def test_other_models_run_through_transformers_and_the_output_says_so(kind, inputs, tmp_path, capsys):
    folder, model = others(kind, tmp_path / "tiny")
    names = ["temp", "keep", "mirostat", "split", "nkvo", "window", "groups"]
    assert main(command(folder, inputs, tmp_path, "--runs", "1", "--only", *names)) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "is no Llama: the fast path does not cover it" in printed
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for option, name, words in (
        ("only", "only", ""),
        ("temp", "cold", "--temp 0"),
        ("mirostat", "mirostat_2", "--mirostat 2"),
    ):
        row, run = read_csv(tmp_path, option)[name, "one"], read_run(tmp_path, option, name, "one")
        assert "the fast path does not cover it" in row["path"]
        values = {**flags.DEFAULTS, "top_p": 0.9, "min_p": 0.1, **flags.parse(words)}
        ids = tokenizer(PROMPTS["one"], return_tensors="pt")
        processor = fastllama.SamplingProcessor(flags.sampling(values, SEED))
        out = (
            model.generate(
                **ids,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=12,
                logits_processor=[processor],
            )
            if name != "cold"
            else model.generate(**ids, do_sample=False, max_new_tokens=12)
        )
        assert run["ids"] == out[0, ids.input_ids.shape[1] :].tolist()
    for option, name, flag in (("keep", "kept", "--keep"), ("split", "split", "-np"), ("nkvo", "nkvo", "-nkvo")):
        row = read_csv(tmp_path, option)[name, "two"]
        assert row["effect"] == "skipped" and row["reason"].startswith(f"{flag} is for the fast path")
    assert read_csv(tmp_path, "groups")["alone", "one"]["effect"] == "skipped"


# tables


def test_every_run_leaves_its_text_and_its_log(swept):
    for run in (1, 2):
        folder = swept / "outputs" / "tiny_temp"
        text = (folder / "outputs_res" / f"one_cold_run{run}.txt").read_text()
        record = read_run(swept, "temp", "cold", "one", run)
        assert text == PROMPTS["one"] + record["text"] + "\n"
        log = (folder / "outputs_log" / f"one_cold_run{run}.log").read_text()
        for phase in ("load time", "sample time", "prompt eval time", "eval time", "total time"):
            assert phase in log
        assert "tokens per second" in log and "--temp 0" in log and f"seed: {SEED}" in log
        assert "top_k has no effect at temperature 0" in log
    log = (swept / "outputs" / "tiny_mirostat" / "outputs_log" / "one_mirostat_2_run1.log").read_text()
    assert "top_k has no effect beside mirostat" in log and "min_p has no effect beside mirostat" in log


def test_the_table_is_what_can_be_computed_again(swept, tiny):
    vanilla = transformers.LlamaForCausalLM.from_pretrained(tiny).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    row, runs = read_csv(swept, "temp")["cold", "one"], [read_run(swept, "temp", "cold", "one", run) for run in (1, 2)]
    ids, default = runs[0]["ids"], read_run(swept, "only", "only", "one")["ids"]
    assert runs[0]["text"] == tokenizer.decode(ids)
    assert row["hash"] == hashlib.sha256(struct.pack(f"<{len(ids) + 2}q", 1, len(ids), *ids)).hexdigest()[:8]
    differing = [place for place in range(min(len(ids), len(default))) if ids[place] != default[place]]
    assert row["effect"] == "changed" and int(row["first_difference"]) == differing[0]
    for n in (1, 2, 3):
        grams = {tuple(ids[place : place + n]) for place in range(len(ids) - n + 1)}
        assert float(row[f"distinct_{n}"]) == pytest.approx(len(grams) / (len(ids) - n + 1))
    fours = [tuple(ids[place : place + 4]) for place in range(len(ids) - 3)]
    assert float(row["repetition"]) == pytest.approx(sum(g in fours[:i] for i, g in enumerate(fours)) / len(fours))
    said, loss = tokenizer(PROMPTS["one"]).input_ids, 0.0
    assert int(row["prompt_tokens"]) == len(said) and int(row["new_tokens"]) == len(ids)
    for token in ids:
        with torch.no_grad():
            loss -= vanilla(torch.tensor([said])).logits[0, -1].log_softmax(-1)[token].item()
        said = [*said, token]
    assert float(row["perplexity"]) == pytest.approx(math.exp(loss / len(ids)), rel=1e-3)
    for phase in ("sample", "prompt_eval", "eval", "total"):
        for rate in ("ms", "ms_per_token", "tok_per_s"):
            values = [run["timings"][f"{phase}_{rate}"] for run in runs]
            assert float(row[f"{phase}_{rate}_mean"]) == pytest.approx(sum(values) / 2)
            assert float(row[f"{phase}_{rate}_sd"]) == pytest.approx(statistics.stdev(values))
        ms, count = runs[0]["timings"][f"{phase}_ms"], runs[0]["timings"][f"{phase}_count"]
        assert int(row[f"{phase}_count"]) == count
        assert runs[0]["timings"][f"{phase}_tok_per_s"] == pytest.approx(1000 * count / ms)
    assert float(row["load_ms"]) > 0


@pytest.mark.parametrize(
    ("option", "name", "why"),
    [
        ("temp", "same", "these are the default's values"),
        ("keep", "kept", "fits the context of 64: nothing is dropped"),
        ("split", "split", "-np 0.1 runs one sequence at a time"),
        ("split", "split", "a drafted token stands only where the model draws the same"),
        ("many", "many", "each sequence draws by itself"),
        ("threads", "two", "threads change speed only"),
        ("nkvo", "nkvo", "on the CPU already"),
        ("window", "window", "nothing is penalised"),
        ("groups", "alone", "-gan 1 makes no groups"),
    ],
)
def test_what_has_no_effect_says_why(swept, option, name, why):
    for prompt in PROMPTS:
        row = read_csv(swept, option)[name, prompt]
        assert (row["effect"], row["first_difference"]) == ("no effect", "none") and why in row["reason"]
        assert row["hash"] == read_csv(swept, "only")["only", prompt]["hash"]


def test_what_has_an_effect_or_cannot_run_says_so_too(swept):
    kept = read_csv(swept, "keep")["overflow", "one"]
    assert kept["effect"] == "changed" and "context shifted" in kept["path"]
    short = read_csv(swept, "long")["short_context", "two"]
    assert short["effect"] == "skipped" and short["runs"] == "0" and "and the context 8" in short["reason"]
    log = (swept / "outputs" / "tiny_split" / "outputs_log" / "one_split_run1.log").read_text()
    assert "-np 0.1 is read as 0 by llama.cpp, and 1 runs" in log and "drafted tokens accepted" in log
    assert "2 sequences, 1 at a time" in log and "assisted by a draft, constant K of 5, up to 4 branches" in log


def test_each_sequence_has_draws_of_its_own(swept, tiny):
    served, plain = read_run(swept, "many", "many", "one")["sequences"], read_run(swept, "only", "only", "one")
    assert served["slots"] == 2 and len(served["ids"]) == 3 and served["ids"][0] == plain["ids"]
    assert read_run(swept, "split", "split", "one")["sequences"]["ids"] == served["ids"][:2]
    subject = Subject(find(tiny, torch.float32), torch.float32, CPU, "no", None)
    ids = transformers.AutoTokenizer.from_pretrained(tiny)(PROMPTS["one"]).input_ids
    values = plain["asked"]["values"]
    threads = torch.get_num_threads()
    subject.reserve(values, False)
    torch.set_num_threads(threads)
    for row in range(3):
        assert served["ids"][row] == loop.run(subject, ids, flags.sampling(values, SEED + row), 12).ids
    assert len({tuple(each) for each in served["ids"]}) == 3
    row = read_csv(swept, "many")["many", "one"]
    assert int(row["sequences_tokens"]) == sum(map(len, served["ids"])) and float(row["sequences_tok_per_s_mean"]) > 0


def test_mirostat_follows_each_sequence_by_itself(tiny):
    def asked(words):
        given = flags.parse(words)
        values = {**flags.DEFAULTS, "threads": 1, "context": 64, **given}
        return subject.refuses(Setting("own", "own", words, given), values, 15, 12), values

    subject = Subject(find(tiny, torch.float32), torch.float32, CPU, "no", tiny)
    why, values = asked("--mirostat 2 --mirostat-ent 3 -np 2 -ns 3")
    assert why is None
    ids, threads = list(range(5, 20)), torch.get_num_threads()
    subject.reserve(values, False, 2)
    served = split.sequences(subject, ids, values, 12, SEED)
    subject.reserve(values, False)
    expected = [loop.run(subject, ids, flags.sampling(values, SEED + row), 12).ids for row in range(3)]
    torch.set_num_threads(threads)
    assert served.ids == expected and len(set(map(tuple, expected))) == 3
    assert "-ps proposes tokens that may not stand" in asked("--mirostat 2 -ps 0.2")[0]
    assert "move at different times" in asked("-np 2 -ns 2 -gan 2 -gaw 8")[0]


def test_the_second_table_has_the_mean_of_each_setting_and_option(swept):
    with open(swept / "aggregation" / "tiny_means.csv", newline="") as file:
        means = {(row["option"], row["name"]): row for row in csv.DictReader(file)}
    rows = [row for (name, _), row in read_csv(swept, "temp").items()]
    assert float(means["temp", "all"]["perplexity_mean"]) == pytest.approx(
        statistics.fmean(float(row["perplexity"]) for row in rows)
    )
    cold = [row for row in rows if row["name"] == "cold"]
    assert means["temp", "cold"]["texts"] == "2" and means["temp", "cold"]["changed"] == "2"
    assert float(means["temp", "cold"]["eval_ms_mean"]) == pytest.approx(
        statistics.fmean(float(row["eval_ms_mean"]) for row in cold)
    )
    assert means["long", "short_context"]["skipped"] == "2" and ("only", "all") not in means


def test_readme_has_a_table_of_the_kept_means(swept, tmp_path):
    assert "No sweep is kept yet" in readme.BLOCKS["options"]([], tmp_path)
    folder = tmp_path / "tb_logs" / "options"
    folder.mkdir(parents=True)
    kept = json.loads((swept / "means.json").read_text())
    (folder / "tiny.json").write_text(json.dumps(kept))
    text = readme.BLOCKS["options"]([], tmp_path)
    assert "| threads | two: `-t 2` | no effect |" in text and "threads change speed only" in text
    assert "| long | short_context: `-c 8` | skipped |" in text and "_ms" not in json.dumps(kept["means"])


def test_options_are_combined_and_what_lacks_a_draft_is_skipped(tiny, inputs, tmp_path, capsys):
    names = ["temp", "keep", "split"]
    asked = command(tiny, inputs, tmp_path, "--only", *names, "--combine", "2", "--runs", "1")
    assert main(asked) == 0
    assert (tmp_path / "outputs" / "tiny_temp+keep" / "outputs_res" / "one_cold+overflow_run1.txt").exists()
    both = read_csv(tmp_path, "temp+keep")
    assert {name for name, _ in both} == {"cold+kept", "cold+overflow", "same+kept", "same+overflow"}
    assert both["cold+kept", "one"]["flags"] == "--temp 0 --keep 4"
    assert both["same+kept", "one"]["reason"].endswith("nothing is dropped")
    assert both["cold+kept", "one"]["runs"] == "1" and both["cold+kept", "one"]["eval_ms_sd"] == ""
    row = read_csv(tmp_path, "temp+split")["cold+split", "two"]
    assert (row["effect"], row["runs"]) == ("skipped", "0") and "needs a draft" in row["reason"]
    assert (tmp_path / "aggregation" / "tiny_means_2.csv").exists()
    assert "skipped" in capsys.readouterr().out


def test_a_text_follows_from_its_own_setting_and_prompt_alone(swept, tiny, inputs, tmp_path):
    (tmp_path / "inputs").mkdir()
    for name, text in (("a", PROMPTS["two"]), ("z", "another text, of another length")):
        (tmp_path / "inputs" / f"{name}.txt").write_text(text)
    asked = command(tiny, tmp_path / "inputs", tmp_path, "--only", "mirostat", "--runs", "1")
    asked[asked.index("--options") + 1] = str(inputs / "table.txt.own")
    assert main(asked) == 0
    for option, name in (("only", "only"), ("mirostat", "mirostat_2")):
        ids = read_run(tmp_path, option, name, "a")["ids"]
        assert ids == read_run(swept, option, name, "two")["ids"] and len(ids) == 12


# again, and what is refused


def test_what_is_on_disk_is_not_repeated(tiny, inputs, tmp_path, monkeypatch, capsys):
    asked = command(tiny, inputs, tmp_path, "--only", "temp", "keep")
    plain, written = Store.write, []

    def write(self, setting, prompt, run, *rest):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append((setting.name, prompt.name, run))
        plain(self, setting, prompt, run, *rest)

    monkeypatch.setattr(Store, "write", write)
    assert main(asked) == 130
    assert "the same command goes on" in capsys.readouterr().err
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    assert len(files) == 5
    assert not (tmp_path / "aggregation" / "tiny_temp.csv").exists()
    again = []
    monkeypatch.setattr(
        Store, "write", lambda self, *args: (again.append((args[0].name, args[1].name, args[2])), plain(self, *args))
    )
    assert main(asked) == 0
    assert not set(written) & set(again) and len(again) == 5 * 2 * 2 - 5
    assert all(path.stat().st_mtime_ns == when for path, when in files.items())
    before = (tmp_path / "aggregation" / "tiny_temp.csv").read_text()
    monkeypatch.setattr(Subject, "__init__", None)  # nothing is left that a model is needed for
    capsys.readouterr()
    assert main(asked) == 0
    assert "20 of them done before" in capsys.readouterr().out
    assert (tmp_path / "aggregation" / "tiny_temp.csv").read_text() == before


def test_what_was_asked_otherwise_is_not_mixed(swept, tiny, inputs, capsys):
    before = sorted(swept.rglob("*"))
    assert main(command(tiny, inputs, swept, "--seed", "1", "--only", "temp")) == 2
    assert f"was made with other seed ({SEED}, now 1)" in capsys.readouterr().err
    assert sorted(swept.rglob("*")) == before


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--inputs", "nowhere"], "there is no folder of prompts nowhere"),
        (["--inputs", "."], "has no *.txt"),
        (["--options", "nowhere.txt"], "there is no option table nowhere.txt"),
        (["--options", "bad"], "bad line 1: unknown flag '--heat'"),
        (["--only", "heat"], "unknown option 'heat'; the table has: only, ctk_ctv"),
        (["--combine", "5"], "--combine 5 is not allowed; allowed: 1 to 4"),
        (["--only", "temp", "--combine", "2"], "--combine 2 needs as many options, and there are 1"),
        (["--new-tokens", "0"], "--new-tokens '0' is not allowed"),
        (["--runs", "x"], "--runs 'x' is not allowed"),
        (["--dtype", "int3"], "--dtype 'int3' is not allowed"),
        (["--compile", "hard"], "compile='hard' is not allowed"),
        (["--model", "nowhere/at/all"], "there is no model folder nowhere/at/all"),
        (["--out", "bad"], "bad is no folder"),
        (["--draft", "gpt"], "--draft gpt is no Llama, and only Llama drafts here"),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence_and_writes_nothing(more, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad").write_text("--heat 3/hot")
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert main(["options", "--device", "cpu", *more]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "gpt"]


def test_a_dry_run_says_what_would_run(capsys, tmp_path):
    names = ["temp", "top_k"]
    assert (
        main(["options", "--only", *names, "--combine", "2", "--runs", "1", "--dry-run", "--out", str(tmp_path)]) == 0
    )
    out = capsys.readouterr().out
    assert "7 settings x 5 prompts x 1 runs = 35, 0 of them done before" in out and "temp_0.5+top_k_100" in out
    assert list(tmp_path.iterdir()) == []


# parts


def test_a_text_that_ends_early_differs_at_its_end():
    assert text_score.first_difference([1, 2], [1, 2, 3]) == text_score.first_difference([1, 2, 3], [1, 2]) == 2
    assert text_score.first_difference([1, 2], [1, 2]) is None
    assert text_score.distinct([7, 7, 7], 1) == pytest.approx(1 / 3) and text_score.distinct([7], 2) is None
    assert text_score.repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)


def test_reasons_are_given_only_where_they_hold():
    defaults = dict(flags.DEFAULTS)

    def why(words, tokens=100, device="cpu"):
        given = flags.parse(words)
        context = given.get("context", 512)
        return reason(given, {**defaults, **given}, defaults, Facts(tokens, context, 512, device))

    assert "nothing is dropped" in why("--keep 20") and why("--keep 20", tokens=600) is None
    assert "either context" in why("-c 128") and why("-c 64") is None
    assert "no window of 512" in why("-gan 2") and why("-gan 2 -gaw 16") is None
    assert why("-nkvo", device="cuda") is None
    assert why("--repeat-last-n 8 --repeat-penalty 1.5") is None
    assert why("--top-k 100") is None and why("--temp 0.5") is None
    assert "--mirostat 0 has no use" in why("--mirostat-lr 0.5")
    assert "beside mirostat" in (why("--mirostat 2 --top-k 5") or "beside mirostat")


def test_a_phase_that_was_not_told_apart_is_not_invented():
    found = Timings(10.0, 100.0, 20, {"eval": (50.0, 10)})
    assert "sample_ms" not in found.as_dict() and found.as_dict()["eval_tok_per_s"] == 200
    assert "not told apart" in next(line for line in found.lines() if "sample" in line)
