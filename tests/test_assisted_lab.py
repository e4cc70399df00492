"""Assistance in the laboratory: its options, what is refused, the contestants, and what a record says of it."""

import copy
from dataclasses import asdict, replace

import pytest
import torch

import fastllama
import run_llama
from fastllama.lab.measuring import assisted, ceiling, drafting, measure
from fastllama.lab.memory import memory, peak
from fastllama.lab.pages import table
from fastllama.lab.points import figures, option, points_file
from fastllama.lab.points.assistance import Assistance
from fastllama.lab.points.point import Point
from fastllama.lab.points.sampler import Sampler
from fastllama.lab.points.workload import Workload
from fastllama.lab.records import assisted_table, changes, columns, digest, readme, schema, tables
from fastllama.lab.sweeping import plan, swept
from tests import command, fake_records
from tests.test_measure import write_tiny

DRAFT = Assistance(draft="demo-draft", draft_tokens=3, draft_schedule="constant")
BESIDE = replace(DRAFT, draft_device="cpu")
WINDOWED = replace(DRAFT, draft_window=48)


def a_point(model="demo", assistance=DRAFT, new_tokens=8, sampler=None, **more) -> Point:
    work = Workload(2, 12, new_tokens, sampler=sampler or Sampler())
    settings = {"runs": 2, "warmup": 0} | more
    return Point(model, "fp32", "cpu", work, True, assistance=assistance, **settings)


@pytest.fixture(scope="module")
def record():
    """A measured, assisted point of the demo as a record."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "peaks", lambda point, name: memory.Peaks(10.0, 20.0, 0.5, 1.0))
        patch.setattr(measure, "Ceiling", lambda device: ceiling.Ceiling(device, 2**20))
        point = measure.measure(a_point())
    header = {name: value for name, value in fake_records.fake_record().items() if name not in fake_records.point()}
    return digest.seal({**header, **point, "source_sha256": "ab" * 32})


# options


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("draft", ""),
        ("prompt_lookup", 0),
        ("prompt_lookup", True),
        ("draft_tokens", 0),
        ("draft_tokens", 1.5),
        ("draft_schedule", "heuristics"),
        ("draft_weights", "int3"),
        ("p_split", 1.5),
        ("p_split", "0.1"),
        ("draft_branches", 0),
        ("draft_device", "gpu"),
        ("draft_window", 1),
        ("draft_window", "64"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(name, value):
    with pytest.raises(ValueError, match=rf"^{name}=.* is not allowed; allowed: "):
        Assistance(**{name: value})


def test_its_command_line_gives_a_point_back():
    lookup, own = Assistance(prompt_lookup=4, draft_schedule="constant"), Assistance(draft_weights="int8")
    splitting = replace(DRAFT, draft_tokens=2, p_split=0.25, draft_branches=3)
    for assistance in (DRAFT, lookup, own, splitting, BESIDE, WINDOWED):
        point = a_point(assistance=assistance)
        assert Point.from_dict(asdict(point)) == point
        (again,) = run_llama._plan(run_llama._parse(point.command().split()[2:])).points
        assert again.assistance == assistance and again.command() == point.command()
    assert "assisted" not in a_point(assistance=Assistance()).identity()


def test_every_option_has_a_flag():
    assert set(Assistance.__dataclass_fields__) <= set(run_llama._parse([]).__dict__)


def test_a_sweep_over_drafted_tokens_has_points_of_their_own():
    fixed = {"draft": "demo-draft", "preallocate": True, "prompt_length": [16], "new_tokens": [32]}
    made = plan.make(fixed, ["draft_tokens=2,4"], {"batch_size": [1], "prompt_length": [1], "new_tokens": [1]}, 2, 0)
    assert [point.assistance.draft_tokens for point in made.points] == [2, 4]
    entries = [
        {**fake_records.point(speed=speed), **point.identity()}
        for speed, point in zip((9.0, 8.0), made.points, strict=True)
    ]
    assert option.varied(entries) == ["draft_tokens"]
    assert swept.swept(entries, "tok_per_s").axis == "draft_tokens"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--draft", "demo-draft"], "--draft needs --preallocate"),
        (["--preallocate", "--draft-tokens", "3"], "--draft-tokens needs --draft"),
        (["--preallocate", "--draft", "demo-draft", "--prompt-lookup", "3"], "two ways to draft"),
        (
            ["--preallocate", "--prompt-lookup", "3", "--draft-tokens", "3"],
            "--draft-tokens says how many a model drafts",
        ),
        (["--preallocate", "--draft", "demo-draft", "--draft-tokens", "0"], "draft_tokens='0' is not allowed"),
        (["--preallocate", "--draft", "demo-draft", "--draft-tokens", "8"], "--draft-tokens 8 does not fit"),
        (
            ["--preallocate", "--prompt-lookup", "20"],
            "--prompt-lookup 20 is a draft longer than the target's cache of 20",
        ),
        (["--preallocate", "--draft", "no/such", "--draft-schedule", "fast"], "draft_schedule='fast' is not allowed"),
        (["--preallocate", "--draft", "/no/folder"], "there is no model folder /no/folder"),
        (["--preallocate", "--profile", "--draft", "demo-draft"], "--profile shows plain steps: leave out --draft"),
        (["--preallocate", "--p-split", "0.1"], "--p-split needs --draft or --draft-weights"),
        (["--preallocate", "--draft-device", "cpu"], "--draft-device needs --draft or --draft-weights"),
        (["--preallocate", "--prompt-lookup", "3", "--draft-branches", "2"], "--draft-branches is for a model that"),
        (
            ["--preallocate", "--draft", "demo-draft", "--p-split", "-1"],
            "p_split='-1' is not allowed; allowed: None or",
        ),
        (["--preallocate", "--draft", "demo-draft", "--draft-branches", "0"], "draft_branches='0' is not allowed"),
        (
            ["--preallocate", "--draft", "demo-draft", "--draft-tokens", "5", "--draft-branches", "4"],
            "4 branches of 5 tokens (--draft-branches, --draft-tokens) are more than the target",
        ),
        (["--preallocate", "--draft", "demo-draft", "--draft-device", "meta"], "device 'meta' holds no numbers"),
        (["--task", "decode", "--batch-size", "2"], "leave out --batch-size"),
        (["--task", "decode", "--record", "it"], "leave out --record"),
        (["--task", "decode", "--preallocate", "--draft", "demo-draft", "--draft-tokens", "30"], "30 does not fit"),
    ],
)
def test_what_cannot_be_is_one_sentence(words, says, capsys):
    sizes = [] if "--task" in words else ["--prompt-length", "12", "--new-tokens", "8"]
    assert command.run(*words, *sizes) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and "Traceback" not in error


def test_vocabularies_must_match(tmp_path, capsys):
    other = write_tiny(tmp_path / "other")
    assert command.run("--preallocate", "--draft", other, "--prompt-length", "12", "--new-tokens", "8") == 2
    error = capsys.readouterr().err
    assert "the vocabularies of demo and of the draft other do not match" in error and str(tmp_path) not in error


@pytest.mark.usefixtures("light")
def test_the_usual_number_shrinks_to_a_small_cache():
    for length, most in ((4, 11), (40, 12)):
        work, assistance = Workload(1, length, 8), Assistance(draft="demo-draft")
        point = Point("demo", "fp32", "cpu", work, True, assistance=assistance, runs=1, warmup=0)
        assert measure.measure(point)["path"].endswith(f"adaptive K of at most {most}")


# contestants and records


def test_unassisted_is_the_same_model_in_turns(record):
    schema.check_record(record, "the record")
    found = record["assisted"]
    assert found["draft"] == "demo-draft" and found["draft_tokens"] == 3 and found["mode"] == "draft"
    assert found["parity"] == "exact" and record["parity"] == "exact"
    assert record["hash"] == found["unassisted"]["hash"] == record["baseline"]["hash"]
    assert len(found["reports"]) == len(found["unassisted"]["runs"]) == len(record["runs"]) == 2
    proposed, accepted = (sum(each[name] for each in found["reports"]) for name in ("draft_tokens", "accepted_tokens"))
    assert proposed > 0 and found["acceptance"] == accepted / proposed and found["switched_off"] == 0
    pairs = zip(record["runs"], found["unassisted"]["runs"], strict=True)
    gains = sorted(plain["total_s"] / run["total_s"] for run, plain in pairs)
    assert found["speedup_end_to_end"] == pytest.approx(sum(gains) / 2)
    assert "vanilla" not in found["unassisted"]["path"]


@pytest.mark.usefixtures("light")
def test_a_token_reads_less_where_a_forward_gives_several(record):
    alone = measure.measure(a_point(assistance=Assistance(), runs=1))
    report = record["assisted"]["reports"][0]
    rounds, drafts = report["target_forwards"] - 1, report["draft_forwards"]
    assert record["step_bytes"] > rounds * alone["step_bytes"] / 7
    draft = measure.measure(a_point("demo-draft", assistance=Assistance(), runs=1))["step_bytes"]
    assert record["step_bytes"] == round((rounds * alone["step_bytes"] + drafts * draft) / 7)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda found: found.update(acceptance=0.9), "assisted.acceptance"),
        (lambda found: found.update(speedup_end_to_end=3.0), "assisted.speedup_end_to_end"),
        (lambda found: found.update(faster=True), "not one that the schema knows"),
        (lambda found: found.pop("switched_off"), "assisted.switched_off is missing"),
        (lambda found: found.update(mode="guess"), "assisted.mode"),
        (lambda found: found.update(parity="tie"), "assisted.parity is tie"),
        (lambda found: found["reports"].pop(), "2 runs beside"),
        (lambda found: found["reports"][0].update(accepted_tokens=99), "more tokens than were drafted"),
        (lambda found: found["unassisted"].update(tok_per_s=1.0), "assisted.unassisted.tok_per_s"),
        (lambda found: found["unassisted"].update(hash="00000000"), "assisted.parity is exact but"),
    ],
)
def test_what_its_samples_do_not_give_is_refused(record, change, says):
    wrong = copy.deepcopy(record)
    change(wrong["assisted"])
    with pytest.raises(ValueError, match=r"^the record: ") as fault:
        schema.check_record(digest.seal(wrong), "the record")
    assert says in str(fault.value)


def test_drawn_is_for_what_was_drawn_with_assistance(record):
    wrong = copy.deepcopy(record)
    wrong |= {"parity": "drawn", "hash": "00000000", "first_divergence": {"row": 0, "position": 0, "margin": None}}
    wrong["assisted"]["unassisted"]["hash"] = "00000000"
    with pytest.raises(ValueError, match="parity is drawn but"):
        schema.check_record(digest.seal(wrong), "the record")


@pytest.mark.usefixtures("light")
def test_what_the_parent_decoded_is_no_assisted_record(monkeypatch):
    monkeypatch.setattr(fastllama.LlamaForCausalLM, "assisted", None)
    with pytest.raises(ValueError, match="cannot be assisted on the fast path"):
        measure.measure(a_point())


def test_a_failed_point_keeps_its_options(tmp_path):
    point = a_point()
    entry = {
        "schema": points_file.SCHEMA,
        "status": "failed",
        "reason": "no luck",
        **point.identity(),
        "command": point.command(),
        "source_sha256": "ab" * 32,
        "environment": {},
    }
    points_file.append(tmp_path / "points.jsonl", entry)
    assert option.stored(points_file.read(tmp_path / "points.jsonl")[0], "draft_tokens") == 3
    with pytest.raises(ValueError, match=r"assisted\.draft_schedule"):
        points_file.check({**entry, "assisted": {**entry["assisted"], "draft_schedule": "x"}}, "it")


# what is shown of it


def test_tables_name_assistance(record, capsys):
    from rich.console import Console

    Console(width=140).print(table.point_table(record, False))
    shown = capsys.readouterr().out
    assert "unassisted" in shown and "of drafted tokens accepted" in shown and "beside unassisted: exact" in shown
    names = [column.name for column in columns.of_points([record])]
    assert {"draft", "draft_tokens", "acceptance", "speedup_end_to_end", "unassisted_tok_per_s"} <= set(names)
    row = tables.of([record])["points"].objects[0]
    assert row["acceptance"] == record["assisted"]["acceptance"] and row["draft"] == "demo-draft"
    plain = [column.name for column in columns.of_points([fake_records.point()])]
    assert "draft" not in plain and "acceptance" not in plain


def test_the_log_keeps_assisted_rows_apart(record):
    plain = fake_records.current(fake_records.fake_record(2, "without"))
    text = changes.render([plain, record])
    assert "draft demo-draft K 3 constant" in text and "no, assisted x" in text
    assert figures.workload(record) != figures.workload({name: record[name] for name in record if name != "assisted"})
    shown = assisted_table.table([plain, record])
    assert "draft demo-draft K 3 constant" in shown and assisted_table.table([plain]) == assisted_table.NONE_YET
    assert record["id"].split("-")[0] + "](" not in readme.result([record])


def test_the_peak_counts_the_draft():
    with_draft, alone = (peak.predict(a_point(assistance=how), "ours", base=0) for how in (DRAFT, Assistance()))
    assert with_draft.weights > 1.1 * alone.weights and with_draft.cache > alone.cache


def test_a_tree_is_measured_and_told():
    how = replace(DRAFT, draft_tokens=2, p_split=0.02, draft_branches=4, draft_device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "peaks", lambda point, name: memory.Peaks(10.0, 20.0, 0.5, 1.0))
        patch.setattr(measure, "Ceiling", lambda device: ceiling.Ceiling(device, 2**20))
        found = measure.measure(a_point(assistance=how, runs=1))
    told = found["assisted"]
    assert (told["mode"], told["parity"], told["p_split"], told["draft_device"]) == ("tree", "exact", 0.02, "cpu")
    report = told["reports"][0]
    assert report["draft_tokens"] > 2 * 2 * (report["target_forwards"] - 1)  # two rows of two tokens, and more branches
    assert "4 branches split above 0.02" in found["path"]
    header = {name: value for name, value in fake_records.fake_record().items() if name not in fake_records.point()}
    schema.check_record(digest.seal({**header, **found, "source_sha256": "ab" * 32}), "the record")
    assert figures.assistance(found) == "draft demo-draft on cpu K 2, 4 branches above 0.02, constant"
    row = tables.of([found])["points"].objects[0]
    assert (row["p_split"], row["draft_branches"]) == (0.02, 4)


def test_a_record_of_before_the_options_that_came_later_is_as_it_was(record):
    assert not {"p_split", "draft_branches", "draft_device"} & record["assisted"].keys()
    assert option.stored(record, "draft_branches") is None


def test_a_draft_elsewhere_is_compiled_for_its_device(monkeypatch):
    native = a_point(assistance=BESIDE, switches={"compile": "native"})
    assert drafting.config(native).compile == "native" and not drafting.is_elsewhere(native)
    monkeypatch.setattr(drafting, "is_elsewhere", lambda point: True)
    for given, wanted in (("static", "native"), ("native", "native"), ("no", "no")):
        switches = {"compile": given} | ({} if given == "native" else {"products": "stock", "fuse": "no"})
        assert drafting.config(a_point(assistance=BESIDE, switches=switches)).compile == wanted
    there = replace(BESIDE, draft_device="cuda")
    assert drafting.config(a_point(assistance=there, switches={"compile": "native"})).compile == "static"


def test_the_draft_is_reserved_like_the_target():
    point = a_point(assistance=Assistance(draft="demo-draft", draft_weights="int8", draft_schedule="constant"))
    draft = drafting.load(point, pad=2)
    assert "weights int8" in draft._engine.words() and draft._engine.cache.shape.cache_length == point.positions
    assert draft.generation_config.num_assistant_tokens == 6
    assert draft.generation_config.num_assistant_tokens_schedule == "constant"
    draft.free()
    assert drafting.load(a_point(assistance=Assistance(prompt_lookup=2)), pad=2) is None


def test_a_draft_with_fewer_vocabulary_rows_is_given_more():
    ids = torch.tensor([[0, 319, 290, 11]])
    plain = drafting.load(a_point(), pad=2)
    wide = drafting.load(a_point(), pad=2)
    drafting.widen(wide, 5000)
    assert wide.config.vocab_size == 5000 == wide.lm_head.weight.shape[0]
    one, other = (model.generate(ids, max_new_tokens=8, eos_token_id=None) for model in (plain, wide))
    assert one.equal(other) and int(other.max()) < 4096
    for model in (plain, wide):
        model.free()


def test_a_draft_with_other_vocabulary_rows_comes_with_the_tokenizers():
    draft = drafting.load(a_point(), pad=2)
    assert drafting.arguments(a_point(), draft, draft) == {"assistant_model": draft}
    wide = drafting.load(a_point(), pad=2)
    drafting.widen(wide, 5000)
    found = drafting.arguments(a_point(), wide, draft)
    assert found["assistant_model"] is draft
    assert found["tokenizer"].get_vocab() == found["assistant_tokenizer"].get_vocab()
    # The same objects each time: comparing their vocabularies takes long.
    assert drafting.arguments(a_point(), wide, draft)["tokenizer"] is found["tokenizer"]
    for model in (draft, wide):
        model.free()


def test_words_of_a_sentence():
    assert str(Assistance()) == "unassisted"
    assert str(Assistance(prompt_lookup=4)) == "prompt lookup 4 adaptive"
    assert str(Assistance(draft_weights="int4")) == "draft of the same model in int4 K adaptive"
    found = {"speedup_end_to_end": 1.5, "acceptance": None, "tokens_per_target_forward": 1.0, "switched_off": 0}
    assert assisted.told({"assisted": found}).startswith("1.50 x unassisted end to end, nothing drafted, 1.00 tokens")
