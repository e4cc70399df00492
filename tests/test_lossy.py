"""Lossy points: never called equal, always scored, and shown with the score wherever points are shown."""

from dataclasses import fields as dataclass_fields

import pytest
import torch

from fastllama import FastConfig
from fastllama.lab.measuring import measure, parity
from fastllama.lab.pages import board
from fastllama.lab.pages import table as terminal
from fastllama.lab.points.point import Point
from fastllama.lab.points.workload import Workload
from fastllama.lab.quality import quality
from fastllama.lab.quality import score as scores
from fastllama.lab.records import changes, columns, digest, lossy, readme, schema, schema2, tables
from fastllama.lab.suite import line
from tests.fake_records import COMMIT, SCORE, current, fake_record, lossy_record

OTHER = "f" * 40
REFERENCE = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]])


def changed(made: dict, **values) -> dict:
    return digest.seal({**made, **values})


# the verdict


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_no_output_of_a_lossy_switch_is_called_equal(dtype):
    assert parity.compare(REFERENCE.clone(), REFERENCE, dtype, lambda row, position: 0.0, lossy=True) == ("lossy", None)
    ours = REFERENCE.clone()
    ours[1, 1] = ours[0, 2] = 9
    verdict, divergence = parity.compare(ours, REFERENCE, dtype, lambda row, position: 1e-9, lossy=True)
    assert verdict == "lossy" and (divergence.row, divergence.position) == (1, 1)
    assert parity.worst(["exact", "lossy", "half"]) == "lossy" and parity.worst(["lossy", "differs"]) == "differs"


def test_the_schema_knows_the_lossy_switches():
    lossy_fields = [field.name for field in dataclass_fields(FastConfig) if not field.metadata["lossless"]]
    assert list(schema2.LOSSY_SWITCHES) == lossy_fields


def test_only_a_switch_that_is_set_makes_a_point_lossy():
    def point(**switches):
        return Point("demo", "fp32", "cpu", Workload(1, 8, 4), True, switches)

    assert point(weights=None, bucket=64).lossy_switches == {}
    assert point(weights="int8", cache_k="q4_0", bucket=64).lossy_switches == {"weights": "int8", "cache_k": "q4_0"}
    assert measure.steps(point(weights="int8")) == measure.steps(point()) + 1


def test_a_line_of_the_suite_does_not_ask_for_the_text_of_a_lossy_point():
    asked = (line.Bound("decode_tok_per_s", ">=", 1.0),)
    for verdict, reached in (("lossy", True), ("exact", True), ("differs", False)):
        measured = line.Measured({"decode_tok_per_s": 2.0}, checks=[("fp32", verdict)])
        assert line.judge(asked, measured)[0] is reached


# the schema


def test_a_lossy_record_is_read():
    for made in (
        lossy_record(),
        lossy_record(switches={"cache_k": "q8_0", "cache_v": "q4_0"}),
        lossy_record(reference_hash="0d6aa042"),  # the ids are vanilla's, and it is lossy all the same
        lossy_record(score=None, not_scored="random weights say nothing about quality"),
    ):
        assert schema.check_record(made, "r") is made


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"parity": "exact"}, "parity is exact"),
        ({"parity": "differs"}, "lossy switches"),
        ({"score": None}, "score is None and not_scored is None"),
        ({"not_scored": "why"}, "not_scored is 'why'"),
        ({"score": {**SCORE, "top1_agreement": 1.01}}, "score.top1_agreement"),
        ({"score": {**SCORE, "perplexity": 0.5}}, "score.perplexity"),
        ({"score": {**SCORE, "mean_kl": -1e-9}}, "score.mean_kl"),
        ({"score": {**SCORE, "positions": 0}}, "score.positions"),
        ({"score": {**SCORE, "extra": 1}}, "score.extra"),
        ({"score": {name: value for name, value in SCORE.items() if name != "p99_kl"}}, "score.p99_kl"),
        ({"score": 3}, "field score"),
        ({"first_divergence": None}, "first_divergence"),
    ],
)
def test_a_lossy_record_that_contradicts_itself_is_refused(values, named):
    with pytest.raises(ValueError, match=named):
        schema.check_record(changed(lossy_record(), **values), "r")


def test_only_lossy_points_have_a_score():
    made = current(fake_record())
    for values in ({"score": dict(SCORE), "not_scored": None}, {"parity": "lossy"}, {"score": dict(SCORE)}):
        with pytest.raises(ValueError, match=r"lossy|score"):
            schema.check_record(changed(made, **values), "r")
    with pytest.raises(ValueError, match="parity"):
        schema.check_record(fake_record(parity="lossy"), "r")  # schema 1 had no such verdict


# measured


def a_point(model, **switches):
    work = Workload(2, 24, 6)
    return Point(model, "fp32", "cpu", work, True, {"cache_k": "q8_0", "cache_v": "q8_0"} | switches, runs=2, warmup=1)


@pytest.fixture
def wide(tmp_path_factory):
    """A checkpoint whose heads are as wide as a block of a small cache."""
    from tests.test_measure import write_tiny

    return write_tiny(tmp_path_factory.mktemp("models") / "wide", head_dim=32)


@pytest.mark.parametrize("switches", [{}, {"weights": "int8", "cache_k": None, "cache_v": None}], ids=str)
def test_a_lossy_point_is_scored(wide, light, switches):
    told = []
    point = a_point(wide, **switches)
    record = measure.measure(point, told.append)
    schema.check_point(record, "the point")
    assert record["parity"] == "lossy" and len(told) == measure.steps(point) and "scoring" in told
    assert record["not_scored"] is None and record["score"]["positions"] == 4096
    assert record["score"]["mean_kl"] < 0.1 and record["score"]["top1_agreement"] > 0.8
    # Small weights share nothing with the reference, whose own score would be zero but for rounding.
    assert not switches or record["score"]["mean_kl"] > 1e-6


def test_points_of_a_sweep_share_the_reference(wide, light, monkeypatch):
    made = []
    right = quality.make_reference
    monkeypatch.setattr(quality, "make_reference", lambda *rest: made.append(1) or right(*rest))
    for bucket in (32, 64):
        measure.measure(a_point(wide, bucket=bucket))
    assert len(made) == 1


@pytest.mark.parametrize(
    ("name", "fault", "why"),
    [("random:llama-160m", None, "random weights"), (None, MemoryError("the reference takes 32 GB"), "takes 32 GB")],
)
def test_why_a_point_has_no_score(wide, monkeypatch, name, fault, why):
    from fastllama.lab.measuring import checkpoint

    def refuse(*rest):
        raise fault

    monkeypatch.setattr(quality, "_reference_of", refuse)
    found = checkpoint.find(wide, torch.float32)
    stored, reason = quality.of_point(a_point(name or wide), found)
    assert stored is None and why in reason


def test_a_reference_that_does_not_fit_is_refused_before_it_is_loaded(wide, monkeypatch):
    from fastllama.lab.measuring import checkpoint

    monkeypatch.setattr(quality, "available_bytes", lambda device: 10**6)
    with pytest.raises(MemoryError, match=r"the reference takes .* for the logits of 4096 positions, and 0\.0 GB"):
        quality.require_room(checkpoint.find(wide, torch.float32), torch.float32, 4096, torch.device("cpu"))


# shown


WORDS = "perplexity 41 (+2.50 %), mean KL 0.012, 99 % of 4096 positions below 0.25, top-1 agreement 93.8 %"


def test_the_terminal_shows_verdict_and_score(capsys):
    from rich.console import Console

    console = Console(width=200)
    console.print(terminal.point_table(lossy_record(), False))
    console.print(terminal.point_table(lossy_record(reference_hash="0d6aa042"), False))
    text = capsys.readouterr().out
    assert text.count("lossy, against fp32: " + WORDS) == 2 and text.count("ids are vanilla's all the same") == 1


def test_the_log_shows_the_score_beside_lossy_rows(tmp_path):
    plain, lossy_row = current(fake_record()), lossy_record(2)
    assert "| quality |" not in changes.render([plain], tmp_path)
    text = changes.render([plain, lossy_row], tmp_path)
    row = next(line for line in text.splitlines() if "[002]" in line)
    assert "| lossy |" in row and f"| {WORDS} |" in row and "| quality |" in text
    unscored = lossy_record(3, score=None, not_scored="random weights say nothing about quality")
    assert "| not scored: random weights say nothing about quality |" in changes.render([unscored], tmp_path)
    for each in (plain, lossy_row):
        (tmp_path / each["id"]).mkdir()
    assert board.write_all([plain, lossy_row], tmp_path) == 2
    shown = {path.parent.name[:3]: path.read_bytes() for path in tmp_path.glob("*/events*")}
    assert b"mean KL 0.012" in shown["002"] and b"mean KL" not in shown["001"]


def test_every_format_has_columns_of_the_score():
    rows = tables.of([lossy_record(), current(fake_record(2))])["points"].objects
    shown = {**SCORE, "score_positions": SCORE["positions"], "parity": "lossy", "not_scored": None}
    del shown["positions"]
    assert {name: rows[0][name] for name in shown} == shown
    assert all(rows[1][name] is None for name in shown if name != "parity")
    assert {column.group for column in columns.of_points([lossy_record()]) if column.name in SCORE} == {"quality"}


# README


def without_bits(number, **fields):
    return current(fake_record(number, switches={"weights": None}, **fields))


def test_a_lossy_row_stands_beside_ours_without_the_switch():
    twin, record = without_bits(1, speed=40.0), lossy_record(2, speed=80.0, max_mem_mb=200.0)
    text = lossy.table([twin, record])
    cells = [cell.strip() for cell in text.splitlines()[-1].strip("|").split(" | ")]
    by_head = list(zip(lossy._HEADS, cells, strict=True))
    assert by_head[0] == ("lossy switch", "`weights` int8")
    assert cells[1].startswith("80.00 (") and cells[2].startswith("40.00 (") and cells[3] == "2.00"
    assert cells[4] == f"{record['step_bytes'] / 1e6:.1f}" and cells[5] == f"{twin['step_bytes'] / 1e6:.1f}"
    assert cells[6:8] == ["200.0", "400.0"]
    assert cells[8:12] == ["41", "+2.50 %", "0.012", "93.8 %"] and cells[12].startswith("[002](tb_logs/002-")
    assert "demo fp32, batch 1, prompt 1000, 200 new tokens; Example CPU" in text


def test_a_twin_differs_in_lossy_switches_alone():
    record = lossy_record(9, speed=80.0)
    assert lossy.float_twin(record, [record, without_bits(1), without_bits(2)])["id"].startswith("002")
    strangers = [
        without_bits(1, source_sha256="cd" * 32),
        without_bits(1, model="other"),
        without_bits(1, prompt_length=10),
        without_bits(1, cache_length=4096),
        without_bits(1, environment={"cpu": "Another", "threads": 2, "torch": "2.13.0"}),
        lossy_record(1, switches={"weights": "int4"}),
        current(fake_record(1, switches={"weights": None, "fuse": "no"})),
    ]
    for stranger in strangers:
        assert lossy.float_twin(record, [record, stranger]) is None
    line = lossy.table([record, *strangers]).splitlines()[4]
    assert line.count("| - ") == 4 and "80.00 (" in line


def test_the_newest_record_of_each_combination_is_shown():
    records = [lossy_record(1), lossy_record(2, commit=OTHER), lossy_record(3, switches={"cache_k": "q8_0"})]
    text = lossy.table(records)
    assert "[001]" not in text and "[002]" in text and "[003]" in text and "`cache_k` q8_0" in text
    unscored = lossy_record(4, score=None, not_scored="random | weights")
    assert "not scored: random \\| weights" in lossy.table([unscored])


def test_readme_says_that_nothing_is_recorded_yet(tmp_path):
    marked = "a\n<!-- begin:lossy --><!-- end:lossy -->\n<!-- begin:quality --><!-- end:quality -->\n"
    once = readme.render(marked, [current(fake_record())], tmp_path)
    assert "No lossy switch is recorded yet" in once and "No score is kept yet" in once
    assert readme.render(once, [], tmp_path) == once
    assert COMMIT[:7] in readme.render(once, [lossy_record()], tmp_path)


def test_words_of_a_point_that_is_not_lossy():
    assert scores.of_record(current(fake_record())) is None
