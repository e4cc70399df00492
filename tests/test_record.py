"""Records: what is refused, what is kept, and that each belongs to its commit."""

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest

import fastllama
from fastllama.lab.points import figures
from fastllama.lab.records import changes, record, schema, sources, words
from fastllama.lab.records import git as lab_git
from tests.fake_records import COMMIT, commit, current, fake_record, git, make_repository, make_tree, point


def write(folder, content) -> None:
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(content if isinstance(content, str) else json.dumps(content))


def stored(root, made) -> dict:
    write(root / "tb_logs" / made["id"], made)
    return made


# --- reading


def test_a_record_is_read_as_it_was_written(tmp_path):
    made = stored(tmp_path, fake_record())
    assert record.read(tmp_path / "tb_logs" / made["id"] / "record.json") == made


EDITS = {
    "tok_per_s": (("tok_per_s",), 4000.0),
    "decode_tok_per_s": (("decode_tok_per_s",), 40.5),
    "ttft_ms": (("ttft_ms",), 1.0),
    "baseline.tok_per_s": (("baseline", "tok_per_s"), 1.0),
    "decode_speedup": (("decode_speedup",), 3.0),
    "speedup": (("speedup",), 3.0),
    "ceiling_fraction": (("ceiling_fraction",), 0.9),
    "runs[1].total_s": (("runs", 1, "total_s"), -1.0),
    "runs[0] ": (("runs", 0, "total_s"), 0.0),
    "max_mem_mb": (("max_mem_mb",), -1),
    "schema": (("schema",), 3),
    "parity": (("parity",), "equal"),
    "reference_hash": (("reference_hash",), "deadbeef"),
    "hash": (("hash",), "0D6AA042"),
    "dtype": (("dtype",), "fp8"),
    "batch_size": (("batch_size",), 0),
    "new_tokens": (("new_tokens",), True),
    "switches.compile": (("switches", "compile"), "always"),
    "environment.threads": (("environment", "threads"), "two"),
    "warmup_s": (("warmup_s",), float("nan")),
    "load_s": (("load_s",), float("inf")),
    "commit": (("commit",), "abc"),
    "id": (("commit",), "f" * 40),
    "source_sha256": (("source_sha256",), "x"),
    "recorded_at": (("recorded_at",), "yesterday"),
    "recorded_at ": (("recorded_at",), "2026-02-31T12:00:00+00:00"),
}


@pytest.mark.parametrize("named", EDITS)
def test_an_edited_record_is_refused_and_the_field_named(tmp_path, named):
    path, value = EDITS[named]
    made = fake_record()
    inner = made
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    stored(tmp_path, made)
    with pytest.raises(ValueError) as error:
        record.read_all(tmp_path)
    assert made["id"] in str(error.value) and named.strip() in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", sorted(fake_record()))
def test_a_record_without_a_field_is_refused_and_the_field_named(tmp_path, name):
    made = fake_record()
    folder = tmp_path / "tb_logs" / made["id"]
    del made[name]
    write(folder, made)
    with pytest.raises(ValueError, match=rf"record\.json: .*{name}"):
        record.read(folder / "record.json")


def test_a_truncated_record_is_refused_by_name(tmp_path):
    text = json.dumps(fake_record())
    for length in (0, 1, len(text) // 2, len(text) - 1):
        folder = tmp_path / str(length)
        write(folder, text[:length])
        with pytest.raises(ValueError, match=rf"{length}.record\.json: not valid JSON"):
            record.read(folder / "record.json")


def test_a_record_in_another_records_folder_is_refused(tmp_path):
    write(tmp_path / "tb_logs" / "002-0123456", fake_record(1))
    with pytest.raises(ValueError, match="not the name of its folder"):
        record.read_all(tmp_path)


def test_parity_words_agree_with_the_hashes():
    for parity in ("tie", "differs"):
        with pytest.raises(ValueError, match=parity):
            schema.check_point(point(parity=parity), "p")
        assert schema.check_point(point(parity=parity, reference_hash="00000000"), "p")
    assert schema.check_point(point(parity="half", dtype="bf16", reference_hash="00000000"), "p")
    with pytest.raises(ValueError, match="no baseline"):
        schema.check_point(point(vanilla=None, parity="exact"), "p")


def test_deep_nesting_is_a_value_error(tmp_path):
    path = tmp_path / "record.json"
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"record\.json"):
        record.read(path)


# --- figures


def test_figures_follow_their_definitions():
    samples = [{"total_s": 2.0, "first_s": 1.0}, {"total_s": 3.0, "first_s": 1.0}, {"total_s": 5.0, "first_s": 1.0}]
    summary = figures.summary(samples, batch_size=3, new_tokens=11)
    assert summary == {"tok_per_s": 11.0, "decode_tok_per_s": 15.0, "row_tok_per_s": 5.0, "ttft_ms": 1000.0}
    assert figures.summary(samples, 3, 1)["decode_tok_per_s"] is None


# --- saving


def test_saving_writes_the_record_the_log_and_the_board(tmp_path):
    sha = make_repository(tmp_path)
    path = record.save(point(), "first", root=tmp_path)
    second = record.save(point(50.0), "second", root=tmp_path)
    assert [path.parent.name, second.parent.name] == [f"001-{sha[:7]}", f"002-{sha[:7]}"]
    kept = record.read(path)
    assert (kept["what"], kept["commit"], kept["prediction"]) == ("first", sha, None)
    assert kept["source_sha256"] == record.source_sha256(tmp_path) == lab_git.source_sha256_of_commit(sha, tmp_path)
    assert {name: kept[name] for name in point()} == point()
    assert "| first |" in (tmp_path / "changes.md").read_text()
    assert len(list((tmp_path / "tb_logs").glob("*/events.out.tfevents.*"))) == 2
    assert not list((tmp_path / "tb_logs").rglob("*.tmp"))


def test_a_bad_point_leaves_nothing_behind(tmp_path):
    make_repository(tmp_path)
    with pytest.raises(ValueError, match="the measured point: field tok_per_s"):
        record.save(point(tok_per_s=1.0), "first", root=tmp_path)
    assert not (tmp_path / "tb_logs").exists() and not (tmp_path / "changes.md").exists()


def test_a_point_measured_on_other_source_is_refused(tmp_path):
    make_repository(tmp_path)
    source = record.source_sha256(tmp_path)
    assert record.read(record.save(point(source_sha256=source), "first", root=tmp_path))["source_sha256"] == source
    with pytest.raises(ValueError, match="changed while the point was measured"):
        record.save(point(source_sha256="0" * 64), "second", root=tmp_path)
    assert len(record.read_all(tmp_path)) == 1


ROUNDS = 6


def _save(root, barrier):
    # Both look which number is free before either takes it, so that one finds it taken.
    real, first = os.mkdir, []

    def mkdir(path, *given):
        if first and Path(path).parent.name == "tb_logs":
            first.clear()
            barrier.wait(120)
        return real(path, *given)

    os.mkdir = mkdir
    for number in range(ROUNDS):
        first.append(True)
        made = current(point(source_sha256=record.source_sha256(root)))
        record.save(made, f"by {multiprocessing.current_process().name}{number}", root=root)


def test_two_processes_that_save_at_once_both_succeed(tmp_path):
    sha = make_repository(tmp_path)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # what both import is imported once
    barrier = context.Barrier(2)
    processes = [context.Process(target=_save, args=(tmp_path, barrier), name=name) for name in ("a", "b")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0, 0]
    records = record.read_all(tmp_path)
    assert [made["id"] for made in records] == [f"{number:03d}-{sha[:7]}" for number in range(1, 2 * ROUNDS + 1)]
    assert {made["what"] for made in records} == {f"by {name}{number}" for name in "ab" for number in range(ROUNDS)}
    assert changes.is_current(records, tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_record_that_arrives_while_the_log_is_written_is_in_it(tmp_path, monkeypatch):
    make_repository(tmp_path)
    real, arrived = changes.write, []

    def write(records, root):
        if not arrived:
            arrived.append(True)
            record.save(point(50.0), "meanwhile", root=tmp_path)
        return real(records, root)  # without the one that arrived

    monkeypatch.setattr(changes, "write", write)
    record.save(point(), "first", root=tmp_path)
    text = (tmp_path / "changes.md").read_text()
    assert "| first |" in text and "| meanwhile |" in text


def dirty_change(root, name):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("changed = True\n")


@pytest.mark.parametrize(
    "name",
    [
        "run_llama.py",
        "setup.py",
        "fastllama/__init__.py",
        "fastllama/new.py",
        "fastllama/demo/model.safetensors",
        "fastllama/kernels/native_code/step.h",
        "fastllama/kernels/native_code/operators.cpp",
    ],
)
def test_a_dirty_tree_is_refused_and_the_file_named(tmp_path, name):
    make_repository(tmp_path)
    dirty_change(tmp_path, name)
    with pytest.raises(ValueError, match=f"dirty.*{name}"):
        record.check_recordable(root=tmp_path)
    git(tmp_path, "add", "-A")
    with pytest.raises(ValueError, match=f"dirty.*{name}"):
        record.check_recordable(root=tmp_path)
    with pytest.raises(ValueError, match="dirty"):
        record.save(point(), "first", root=tmp_path)
    assert not (tmp_path / "tb_logs").exists()
    assert commit(tmp_path) == record.check_recordable(root=tmp_path)


def test_a_removed_source_file_is_dirty(tmp_path):
    make_repository(tmp_path)
    (tmp_path / "setup.py").unlink()
    with pytest.raises(ValueError, match=r"dirty.*setup\.py"):
        record.check_recordable(root=tmp_path)


@pytest.mark.parametrize("name", ["changes.md", "tb_logs/x/record.json", "README.md", "fastllama/__pycache__/a.py"])
def test_what_no_measurement_depends_on_may_differ(tmp_path, name):
    sha = make_repository(tmp_path)
    dirty_change(tmp_path, name)
    assert record.check_recordable(root=tmp_path) == sha


def test_the_named_commit_must_be_the_one_checked_out(tmp_path):
    sha = make_repository(tmp_path)
    assert record.check_recordable(sha, tmp_path) == record.check_recordable(sha[:7], tmp_path) == sha
    for other in (COMMIT, sha[:3], "main"):
        with pytest.raises(ValueError, match="not the commit checked out"):
            record.check_recordable(other, tmp_path)


def test_a_repository_without_a_commit_is_refused(tmp_path):
    make_tree(tmp_path)
    git(tmp_path, "init", "-q")
    with pytest.raises(ValueError, match="no commit"):
        record.check_recordable(root=tmp_path)


def test_a_folder_that_is_not_the_repository_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"run_llama\.py"):
        record.check_recordable(COMMIT, tmp_path)


# --- a copied tree, without .git


def test_without_git_a_full_sha_is_needed(tmp_path):
    make_tree(tmp_path)
    with pytest.raises(ValueError, match="--commit SHA"):
        record.check_recordable(root=tmp_path)
    for bad in ("", "main", COMMIT[:7], COMMIT.upper(), COMMIT + "0"):
        with pytest.raises(ValueError, match="not a full sha"):
            record.check_recordable(bad, tmp_path)
    assert record.check_recordable(COMMIT, tmp_path) == COMMIT


@pytest.fixture
def copied(tmp_path):
    """A repository, its sha, and a copy of its tree without .git."""
    here, there = tmp_path / "here", tmp_path / "there"
    sha = make_repository(here)
    shutil.copytree(here, there, ignore=shutil.ignore_patterns(".git"))
    return here, sha, there


def test_a_record_of_a_copied_tree_is_verified_when_it_comes_back(copied):
    here, sha, there = copied
    path = record.save(point(), "elsewhere", commit=sha, root=there)
    assert not record.verify(record.read(path), there)
    shutil.copytree(path.parent, here / "tb_logs" / path.parent.name)
    [back] = record.read_all(here)
    assert back["what"] == "elsewhere" and record.verify(back, here)


def test_a_record_of_a_changed_copy_is_refused_by_name(copied):
    here, sha, there = copied
    (there / "run_llama.py").write_text("print('faster')\n")
    path = record.save(point(), "elsewhere", commit=sha, root=there)
    shutil.copytree(path.parent, here / "tb_logs" / path.parent.name)
    with pytest.raises(ValueError, match=f"record {path.parent.name}: its source hash is not that of commit"):
        record.read_all(here)


def test_a_commit_that_this_clone_lacks_is_not_verified(tmp_path):
    make_repository(tmp_path)
    made = stored(tmp_path, fake_record())
    assert record.read_all(tmp_path) == [made] and not record.verify(made, tmp_path)


def test_the_source_hash_moves_with_name_and_content(tmp_path):
    make_tree(tmp_path)
    seen = {sources.source_sha256(tmp_path)}
    (tmp_path / "setup.py").write_text("# other\n")
    seen.add(sources.source_sha256(tmp_path))
    (tmp_path / "fastllama" / "a.py").write_text("")
    seen.add(sources.source_sha256(tmp_path))
    (tmp_path / "fastllama" / "a.py").rename(tmp_path / "fastllama" / "b.py")
    seen.add(sources.source_sha256(tmp_path))
    assert len(seen) == 4


# --- predictions


def test_a_prediction_is_taken_from_the_file_and_known_to_be_committed(tmp_path):
    make_repository(tmp_path)
    words.predict("fused", "a tenth faster", tmp_path)
    early = record.read(record.save(point(), "fused", root=tmp_path))
    assert (early["prediction"], early["prediction_committed"]) == ("a tenth faster", False)
    commit(tmp_path)
    held = record.read(record.save(point(), "fused", root=tmp_path))
    assert (held["prediction"], held["prediction_committed"]) == ("a tenth faster", True)
    given_ = record.read(record.save(point(), "fused", prediction="twice", root=tmp_path))
    assert (given_["prediction"], given_["prediction_committed"]) == ("twice", False)
    other = record.read(record.save(point(), "other", root=tmp_path))
    assert (other["prediction"], other["prediction_committed"]) == (None, None)


def test_a_prediction_made_up_afterwards_is_refused(tmp_path):
    make_repository(tmp_path)
    path = record.save(point(), "fused", prediction="twice", root=tmp_path)
    made = {**record.read(path), "prediction_committed": True}
    words.dump_json(path, made)
    with pytest.raises(ValueError, match=f"record {made['id']}: its prediction"):
        record.read_all(tmp_path)


def test_predictions_are_not_rewritten(tmp_path):
    words.predict("fused", "a tenth faster", tmp_path)
    words.predict("fused", "a tenth faster", tmp_path)
    with pytest.raises(ValueError, match="exists already"):
        words.predict("fused", "no faster", tmp_path)
    with pytest.raises(ValueError, match="needs words"):
        words.predict(" ", "x", tmp_path)
    assert words.predictions(tmp_path) == {"fused": "a tenth faster"}


def test_every_way_to_compile_can_be_recorded():
    for mode in fastllama.FastConfig.__dataclass_fields__["compile"].metadata["allowed"].split(", "):
        assert mode.split(" ")[0] in schema.COMPILES


def test_an_object_that_a_clone_lacks_is_named(tmp_path):
    make_repository(tmp_path)
    with pytest.raises(ValueError, match=f"git object {'0' * 40} is missing from"):
        lab_git._blobs_sha256(tmp_path, ["0" * 40])
