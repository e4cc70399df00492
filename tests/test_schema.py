"""Schema 2: what it demands, that no edit passes, and that the records of schema 1 are read as they are."""

import copy
import hashlib
import json

import pytest

from fastllama.lab.records import changes, digest, record, schema, schema2, sources, words
from tests.fake_records import current, fake_record, make_repository, point
from tests.places import at, places, put

# Of the committed records of schema 1, 001 to 043: names and bytes.
FIRST_43 = "f143336adc277a64601ce0bc22fa0512024ee261b3449c9208aa6bc624d1daa5"


def test_the_first_records_are_still_what_they_were_and_still_read():
    folders = [folder for folder in sorted((sources.ROOT / "tb_logs").glob("0*")) if int(folder.name[:3]) <= 43]
    content = hashlib.sha256()
    for folder in folders:
        assert record.read(folder / "record.json")["schema"] == 1
        content.update(folder.name.encode() + b"\0" + (folder / "record.json").read_bytes())
    assert len(folders) == 43 and content.hexdigest() == FIRST_43


def test_a_field_that_schema_1_does_not_know_still_passes():
    assert schema.check_record({**fake_record(), "note": "by hand"}, "r")


def test_schema_2_keeps_what_later_readers_need():
    made = current(fake_record())
    schema.check_record(made, "r")
    assert made["switch_defaults"].keys() == made["switches"].keys()
    for name in ("cores", "threads", "interop_threads", "governor", "gpu_driver", "gpu_power_limit", "flags"):
        assert name in schema2.ENVIRONMENT


WHOLE = current(point(parity="tie", reference_hash="00000000"))
SEALED = current(fake_record())
# Flags and variables are whatever was set: one may be missing without a gap in what is known.
FIELDS = [
    path
    for path in places(WHOLE)
    if isinstance(path[-1], str) and path[:2] not in (("environment", "variables"), ("switches", "bucket"))
]


def sealed_again(made: dict) -> dict:
    """As one would who edits a record and then computes its digest; a digest that was taken out stays out."""
    return digest.seal(made) if "digest" in made else made


@pytest.mark.parametrize("path", [path for path in FIELDS if len(path) < 3 or path[1] != "flags"], ids=str)
def test_a_point_without_a_field_is_refused_though_it_is_sealed(path):
    made = copy.deepcopy(WHOLE)
    del at(made, path[:-1])[path[-1]]
    with pytest.raises(ValueError) as error:
        schema.check_point(sealed_again(made), "the point")
    assert str(path[-1]) in str(error.value)


@pytest.mark.parametrize("inside", [(), ("baseline",), ("environment",), ("runs", 1), ("first_divergence",)], ids=str)
def test_a_field_that_schema_2_does_not_know_is_refused_by_its_name(inside):
    made = copy.deepcopy(WHOLE)
    at(made, inside)["added"] = 1
    with pytest.raises(ValueError, match="added is not one that the schema knows"):
        schema.check_point(sealed_again(made), "the point")


CONTRADICTIONS = {
    "tok_per_s": (("tok_per_s",), 18.9),
    "baseline.ttft_ms": (("baseline", "ttft_ms"), 500.001),
    "speedup": (("speedup",), 1.90867),
    "ceiling_fraction": (("ceiling_fraction",), 0.51),
    "ceiling_gb_per_s": (("ceiling_runs_gb_per_s",), [8.0, 9.0, 9.0]),
    "read_gb_per_s": (("step_bytes",), 10**8 + 1),
    "first_divergence": (("first_divergence",), None),
    "baseline.hash": (("baseline", "hash"), "11111111"),
    "runs": (("baseline", "runs"), WHOLE["baseline"]["runs"][1:2]),
    "cache_length": (("cache_length",), 1199),
    "distinct_tokens": (("distinct_tokens",), 201),
    "environment.variables": (("environment", "variables", "LD_PRELOAD"), "/opt/lib.so"),
    "environment.flags": (("environment", "flags", "x"), {"value": 1}),
    "switch_defaults": (("switch_defaults", "other"), 1),
    "63 bits": (("seed",), 2**63),
    "utf-8": (("text_sample",), "\ud800"),
    "max_reserved_mb": (("max_reserved_mb",), None),
    "row|first_divergence": (("first_divergence", "row"), 1),
}


@pytest.mark.parametrize("named", CONTRADICTIONS)
def test_a_point_that_contradicts_itself_is_refused_though_it_is_sealed(named):
    path, value = CONTRADICTIONS[named]
    made = copy.deepcopy(WHOLE)
    put(made, path, value)
    with pytest.raises(ValueError, match=named):
        schema.check_point(sealed_again(made), "the point")


def test_an_edit_is_refused_though_every_field_may_hold_it():
    for path, value in ((("what",), "another"), (("ram_gb",), 17.0), (("text_sample",), ""), (("command",), "python")):
        made = copy.deepcopy(SEALED)
        put(made, ("environment", *path) if path == ("ram_gb",) else path, value)
        with pytest.raises(ValueError, match="digest"):
            schema.check_record(made, "r")
    with pytest.raises(ValueError, match="digest"):
        schema.check_record({**SEALED, "digest": "0" * 64}, "r")


def test_a_record_of_schema_2_does_not_pass_for_one_of_schema_1():
    with pytest.raises(ValueError, match="schema is 1, which has no field"):
        schema.check_record({**SEALED, "schema": 1}, "r")


def test_the_order_of_fields_and_the_white_space_are_no_edit(tmp_path):
    folder = tmp_path / SEALED["id"]
    folder.mkdir()
    shuffled = dict(sorted(SEALED.items(), reverse=True))
    (folder / "record.json").write_text(json.dumps(shuffled, indent=7))
    assert record.read(folder / "record.json") == SEALED


@pytest.mark.parametrize("added", ['"hash": "00000000", ', '"runs": [], '])
def test_a_key_that_stands_there_twice_is_refused(tmp_path, added):
    folder = tmp_path / SEALED["id"]
    folder.mkdir()
    (folder / "record.json").write_text("{" + added + json.dumps(SEALED)[1:])
    with pytest.raises(ValueError, match=r"record\.json: .*stands there twice"):
        record.read(folder / "record.json")


def test_what_is_saved_is_sealed_with_its_name(tmp_path):
    sha = make_repository(tmp_path)
    made = current(point(source_sha256=record.source_sha256(tmp_path)))
    path = record.save(made, "first", root=tmp_path)
    kept = record.read(path)
    assert kept["schema"] == 2 and kept["commit"] == sha and kept["digest"] != made["digest"]
    assert all(kept[name] == made[name] for name in made if name != "digest")
    words.dump_json(path, {**kept, "what": "another"})
    with pytest.raises(ValueError, match=rf"{path.parent.name}.record\.json: .*digest"):
        record.read_all(tmp_path)


def test_a_point_edited_before_it_is_saved_is_refused(tmp_path):
    make_repository(tmp_path)
    made = current(point(source_sha256=record.source_sha256(tmp_path)))
    with pytest.raises(ValueError, match=r"the measured point: .*digest"):
        record.save({**made, "text_sample": "nicer"}, "first", root=tmp_path)
    assert not (tmp_path / "tb_logs").exists()


def test_both_schemas_stand_in_one_log(tmp_path):
    make_repository(tmp_path)
    record.save(point(), "old", root=tmp_path)
    record.save(current(point(60.0, source_sha256=record.source_sha256(tmp_path))), "new", root=tmp_path)
    records = record.read_all(tmp_path)
    assert [made["schema"] for made in records] == [1, 2] and changes.is_current(records, tmp_path)
    assert "| old |" in changes.render(records, tmp_path) and "| new |" in changes.render(records, tmp_path)
