"""Measuring: workload, parity, memory, ceiling, and vanilla on our memory."""

import hashlib
import os
import platform
import socket
import struct
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import transformers

import fastllama
from fastllama.demo.text import held_out_text
from fastllama.demo.tokenizer import train_tokenizer
from fastllama.lab.fault import explained, sentence
from fastllama.lab.measuring import ceiling, checkpoint, contestant, measure, parity, vanilla
from fastllama.lab.measuring.environment import environment
from fastllama.lab.memory import memory
from fastllama.lab.points import workload
from fastllama.lab.points.point import Point
from fastllama.lab.points.workload import Workload
from fastllama.lab.records import schema

CPU = torch.device("cpu")


def write_tiny(folder, tie=True, head_dim=8, vocabulary=None):
    """A checkpoint of a two-layer Llama and its tokenizer; logits wide enough that text varies."""
    tokenizer = train_tokenizer([held_out_text()[:20_000]])
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary or len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=512,
        tie_word_embeddings=tie,
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def a_point(model, **changes):
    values = {
        "dtype": "fp32",
        "device": "cpu",
        "workload": Workload(2, 24, 6),
        "preallocate": True,
        "runs": 2,
        "warmup": 1,
        **changes,
    }
    return Point(model, **values)


# workload


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return transformers.AutoTokenizer.from_pretrained(tiny)


def test_prompts_are_real_text_of_different_lengths(tokenizer):
    prompt = workload.prompt(Workload(4, 60, 5, seed=3), tokenizer)
    assert prompt.input_ids.shape == prompt.attention_mask.shape == (4, 60)
    assert prompt.lengths[0] == 60 and len(set(prompt.lengths)) == 4 and min(prompt.lengths) >= 30
    for row, length in enumerate(prompt.lengths):
        assert prompt.attention_mask[row].tolist() == [0] * (60 - length) + [1] * length
        assert (prompt.input_ids[row, : 60 - length] == tokenizer.pad_token_id).all()
        real = prompt.input_ids[row, 60 - length :]
        assert real[0] == tokenizer.bos_token_id
        assert tokenizer.decode(real[1:]).strip("\ufffd") in held_out_text()


def test_rows_start_at_different_places_and_follow_the_seed(tokenizer):
    first, same, other = (workload.prompt(Workload(3, 40, 5, seed=seed), tokenizer) for seed in (1, 1, 2))
    assert torch.equal(first.input_ids, same.input_ids)
    assert not torch.equal(first.input_ids, other.input_ids)
    ends = {tuple(row[-10:].tolist()) for row in first.input_ids}
    assert len(ends) == 3


def test_a_larger_batch_starts_with_the_smaller_ones_rows(tokenizer):
    small, large = (workload.prompt(Workload(rows, 40, 5), tokenizer) for rows in (2, 5))
    assert torch.equal(small.input_ids, large.input_ids[:2])


def test_more_rows_than_lengths(tokenizer):
    assert sorted(workload.row_lengths(Workload(6, 5, 1))) == [3, 3, 3, 4, 4, 5]
    assert workload.row_lengths(Workload(3, 1, 1)) == [1, 1, 1]
    assert workload.prompt(Workload(3, 1, 1), tokenizer).input_ids.tolist() == [[0]] * 3


def test_prompt_file(tokenizer, tmp_path):
    file = tmp_path / "own.txt"
    file.write_text("def main():\n    return 1\n" * 20)
    ids = workload.prompt(Workload(1, 20, 5, prompt_file=str(file)), tokenizer).input_ids[0]
    assert tokenizer.decode(ids[1:]) in file.read_text()
    with pytest.raises(ValueError, match=r"prompt file .*own\.txt has \d+ tokens and the prompt needs 5000"):
        workload.prompt(Workload(1, 5000, 5, prompt_file=str(file)), tokenizer)
    file.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        workload.prompt(Workload(1, 20, 5, prompt_file=str(file)), tokenizer)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        workload.prompt(Workload(1, 20, 5, prompt_file=str(tmp_path / "nowhere")), tokenizer)


def test_a_text_is_encoded_once_by_each_tokenizer(tiny, monkeypatch):
    one, other, changed = (transformers.AutoTokenizer.from_pretrained(tiny) for _ in range(3))
    changed.add_tokens(["def "])
    text = "def main():\n    return 1\n" * 9
    expected = [each(text, add_special_tokens=False).input_ids for each in (one, changed)]
    assert expected[0] != expected[1]
    monkeypatch.setattr(workload, "_encoded", {})
    assert [workload.encoded(each, text) for each in (one, changed)] == expected
    monkeypatch.setattr(type(one), "__call__", lambda *given, **named: pytest.fail("encoded again"))
    assert [workload.encoded(each, text) for each in (other, changed)] == expected


def test_pad_id_without_a_pad_token(tiny):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    assert workload.pad_id(tokenizer) == 2
    tokenizer.pad_token = None
    assert workload.pad_id(tokenizer) == tokenizer.eos_token_id == 1
    tokenizer.eos_token = None
    assert workload.pad_id(tokenizer) == 0


# point


@pytest.mark.parametrize("name", ["batch_size", "prompt_length", "new_tokens"])
@pytest.mark.parametrize("value", [0, -3])
def test_sizes_below_one_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, not {value}"):
        Workload(**{name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int8"}, "dtype 'int8' is unknown"),
        ({"runs": 0}, "runs must be at least 1"),
        ({"cache_length": 29}, "a cache of 29 positions is too short for a prompt of 24 and 6 new tokens"),
        ({"preallocate": False, "cache_length": 90}, "--cache-length needs --preallocate"),
        ({"preallocate": False, "switches": {"bucket": 64}}, "--bucket needs --preallocate"),
        ({"switches": {"warp": 9}}, "--warp is not a switch"),
        ({"switches": {"compile": "maybe"}}, "compile='maybe' is not allowed"),
    ],
)
def test_points_that_cannot_be_honoured(changes, message):
    with pytest.raises(ValueError, match=message):
        a_point("tiny", **changes)


def test_a_point_survives_the_way_to_another_process(tiny):
    point = a_point(tiny, switches={"bucket": 64}, cache_length=40)
    assert Point.from_dict(asdict(point)) == point


def test_the_command_holds_no_path(tiny, tmp_path):
    file = tmp_path / "own.txt"
    point = a_point(tiny, switches={"bucket": 64}, workload=Workload(1, 5, 5, prompt_file=str(file)))
    assert point.command() == (
        "python run_llama.py --model tiny --dtype fp32 --device cpu --preallocate --compile no --bucket 64 "
        "--batch-size 1 --prompt-length 5 --new-tokens 5 --seed 0 --runs 2 --warmup 1 --prompt-file own.txt"
    )


# parity


def test_hash_of_known_ids():
    ids = torch.tensor([[1, 2, 3], [4, 5, 2**40]])
    digest = hashlib.sha256(struct.pack("<2q", 2, 3) + struct.pack("<6q", 1, 2, 3, 4, 5, 2**40)).hexdigest()
    assert parity.output_hash(ids) == digest[:8] == "8103141c"
    assert parity.output_hash(ids.t().contiguous().t()) == digest[:8]
    assert parity.output_hash(ids.view(3, 2)) != digest[:8]


REFERENCE = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]])


def test_equal_ids_are_exact():
    def never(row, position):
        raise AssertionError("nothing differs")

    for dtype in ("fp32", "bf16"):
        assert parity.compare(REFERENCE.clone(), REFERENCE, dtype, never) == ("exact", None)


@pytest.mark.parametrize(
    ("margins", "dtype", "verdict", "where"),
    [
        ({(1, 1): 5e-5, (0, 2): 0.0}, "fp32", "tie", (1, 1)),
        ({(1, 1): 5e-5, (0, 2): 1e-4}, "fp32", "differs", (0, 2)),  # one tie does not excuse another row
        ({(1, 1): 0.5, (0, 2): 0.0}, "fp32", "differs", (1, 1)),
        ({(1, 1): float("nan"), (0, 2): 0.0}, "fp32", "differs", (1, 1)),
        ({(1, 1): 0.5, (0, 2): 0.0}, "bf16", "half", (1, 1)),
        ({(1, 1): 0.0, (0, 2): 0.0}, "fp16", "half", (1, 1)),
    ],
)
def test_verdicts(margins, dtype, verdict, where):
    ours = REFERENCE.clone()
    ours[0, 2:] = 9
    ours[1, 1:] = 9
    found, divergence = parity.compare(ours, REFERENCE, dtype, lambda row, position: margins[row, position])
    assert found == verdict and (divergence.row, divergence.position) == where


def test_other_shapes_do_not_compare():
    with pytest.raises(ValueError, match="do not compare"):
        parity.compare(REFERENCE[:, :3], REFERENCE, "fp32", lambda row, position: 0.0)


def test_the_worst_run_counts():
    assert parity.worst(["exact", "differs", "tie"]) == "differs"


def test_the_margin_is_of_the_best_two():
    assert parity.top_margin(torch.tensor([1.0, 9.0, 4.0, 3.5])) == 5.0


def test_rms_ratio():
    exact = torch.zeros(10, 4)
    assert parity.teacher_forced_rms(exact + 0.2, exact - 0.1, exact) == pytest.approx(2.0)
    assert parity.teacher_forced_rms(exact, exact, exact) == 1.0
    assert parity.teacher_forced_rms(exact + 1, exact, exact) == float("inf")


# vanilla on our memory


@pytest.mark.parametrize("tie", [True, False])
def test_vanilla_shares_every_parameter(tmp_path, tie):
    folder = write_tiny(tmp_path / "model", tie=tie)
    found = checkpoint.find(folder, torch.float32)
    ours, _ = checkpoint.load(found, fastllama.LlamaForCausalLM, torch.float32, CPU)
    ours.preallocate(batch_size=1, cache_length=32)
    shared = vanilla.share(ours, found.config)
    assert type(shared) is transformers.LlamaForCausalLM
    mine, theirs = (dict(model.named_parameters(remove_duplicate=False)) for model in (ours, shared))
    assert mine.keys() == theirs.keys() and len(mine) == 21
    assert all(mine[name].data_ptr() == theirs[name].data_ptr() for name in mine)
    assert (shared.lm_head.weight.data_ptr() == shared.model.embed_tokens.weight.data_ptr()) is tie
    own = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(shared(ids).logits, own(ids).logits)


# ceiling


@pytest.mark.parametrize("tie", [True, False])
def test_bytes_of_a_step(tmp_path, tie):
    folder = write_tiny(tmp_path / "model", tie=tie, vocabulary=4096)
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    vocabulary = 4096 * 32
    layer = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 48 * 32 + 2 * 32
    # Only one of the two tables is read in full, tied or not.
    weights = 2 * (vocabulary + 2 * layer + 32)
    cache = 2 * (2 * 2 * 2 * 8) * (24 + 13 + 2 * 3)
    assert ceiling.step_bytes(model, [24, 13], 6) == weights + cache
    small = (2 * 2) * (8 + 2 + 2 * 8) * (24 + 13 + 2 * 3)
    assert ceiling.step_bytes(model, [24, 13], 6, "int8", "bf16") == weights + small


def test_the_ceiling_is_the_median_of_what_was_measured():
    probe = ceiling.Ceiling(CPU, 2**20)
    samples = [probe.measure() for _ in range(3)]
    assert probe.samples == samples and probe.gb_per_s == sorted(samples)[1] > 0


# measuring


def test_a_point_follows_the_schema(tiny, light):
    told = []
    point = a_point(tiny)
    record = measure.measure(point, told.append)
    schema.check_point(record, "the point")
    assert len(told) == measure.steps(point)
    assert record["parity"] == "exact" and record["hash"] == record["reference_hash"] == record["baseline"]["hash"]
    assert record["model"] == "tiny" and record["cache_length"] == 30
    assert record["path"].startswith("preallocated") and record["baseline"]["path"] == "transformers, eager"
    assert len(record["runs"]) == len(record["baseline"]["runs"]) == 2
    assert record["load_s"] != 0.5 and record["baseline"]["load_s"] == 0.5
    assert record["recompiles_after_warmup"] == 0
    assert record["max_mem_mb"] == 10.0 and record["baseline"]["max_reserved_mb"] == 20.0


def test_vanilla_alone_is_the_reference(tiny, light):
    record = measure.measure(a_point(tiny, preallocate=False))
    schema.check_point(record, "the point")
    assert record["parity"] == "reference" and record["baseline"] is None and record["speedup"] == 1.0
    assert record["switches"]["preallocate"] is False


def test_one_new_token_decodes_nothing(tiny, light):
    record = measure.measure(a_point(tiny, workload=Workload(1, 8, 1)))
    schema.check_point(record, "the point")
    assert record["decode_tok_per_s"] is None and record["ceiling_fraction"] is None


def test_what_ours_gets_wrong_is_seen(tiny, light, monkeypatch):
    right = contestant.Contestant.generate

    def wrong(self, prompt, new_tokens):
        ids, seconds = right(self, prompt, new_tokens)
        # Only in the second run: each run is looked at.
        if self.name == "ours" and new_tokens > 1 and len(self.runs) == 1:
            ids[1, 3] = (ids[1, 3] + 1) % 100
        return ids, seconds

    monkeypatch.setattr(contestant.Contestant, "generate", wrong)
    record = measure.measure(a_point(tiny))
    schema.check_point(record, "the point")
    assert record["parity"] == "differs" and record["hash"] != record["reference_hash"]
    assert record["first_divergence"]["row"] == 1 and record["first_divergence"]["position"] == 3
    assert record["first_divergence"]["margin"] >= parity.TIE_MARGIN


def test_the_margin_is_the_references_own(tiny):
    """The margin at a position of a padded row is that of generate's own scores there."""
    found = checkpoint.find(tiny, torch.float32)
    tokenizer = checkpoint.tokenizer(found)
    prompt = workload.prompt(Workload(2, 24, 6), tokenizer)
    alone = contestant.load_alone(a_point(tiny, preallocate=False), found, "vanilla", workload.pad_id(tokenizer))
    out = alone.model.generate(
        input_ids=prompt.input_ids,
        attention_mask=prompt.attention_mask,
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    alone.time_whole(prompt, 6)
    subject = contestant.Contestant("ours", None)
    wrong = out.sequences[:, 24:].clone()
    wrong[1, 4] += 1
    subject.outputs["x"] = wrong
    _, divergence, _, _ = measure.judged(a_point(tiny), subject, alone, prompt, lossy=False)
    assert divergence.margin == pytest.approx(parity.top_margin(out.scores[4][1]), abs=1e-4)


# memory


@pytest.mark.usefixtures("forked")
def test_peaks_come_from_a_process_of_their_own(tiny):
    point = a_point(tiny, workload=Workload(1, 8, 2))
    alone = memory.peaks(point, "ours")
    assert 20 < alone.max_mem_mb < alone.max_reserved_mb
    # A cache that is asked for is seen: two layers, two heads, keys and values, four bytes.
    longer = memory.peaks(a_point(tiny, workload=Workload(64, 8, 2), cache_length=4000), "ours")
    cache_mb = 2 * 2 * 2 * 8 * 4 * 64 * 4000 / 1e6
    assert longer.max_mem_mb - alone.max_mem_mb == pytest.approx(cache_mb, rel=0.5)


@pytest.mark.usefixtures("forked")
def test_a_failed_process_says_why(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no model folder"):
        checkpoint.find(str(tmp_path / "nothing"), torch.float32)
    with pytest.raises(OSError, match=r"measuring the memory of ours failed: there is no model folder"):
        memory.peaks(a_point(str(tmp_path / "nothing")), "ours")


def test_mapped_weights_are_counted(tiny):
    model = transformers.LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    total = sum(tensor.nbytes for tensor in model.parameters())
    mapped = memory.mapped_bytes(model)
    assert mapped is None or 0 <= mapped <= total
    copied = transformers.LlamaForCausalLM(model.config)
    assert memory.mapped_bytes(copied) in (None, 0)


# environment and failures


def test_environment_names_no_host(monkeypatch):
    for module, name in ((socket, "gethostname"), (platform, "node"), (os, "getcwd")):
        monkeypatch.setattr(module, name, lambda: "a-secret-place")
    facts = environment(CPU)
    assert facts["torch"] == torch.__version__ and facts["threads"] == torch.get_num_threads() and facts["cpu"]
    assert "a-secret-place" not in repr(facts) and str(Path.home()) + "/" not in repr(facts)


def test_sentences():
    assert sentence(OSError("We couldn't connect to 'x' to load. Check your\nconnection.")) == (
        "We couldn't connect to 'x' to load"
    )
    assert sentence(ValueError("\n\n  version 1.2 is old.\nmore")) == "version 1.2 is old"
    assert sentence(MemoryError()) == "MemoryError"


def test_full_memory_is_a_memory_error():
    for fault in (
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
        torch.OutOfMemoryError("CUDA"),
    ):
        with pytest.raises(MemoryError, match="batch 9 does not fit in memory"), explained("batch 9"):
            raise fault
    with pytest.raises(RuntimeError, match="shape"), explained("batch 9"):
        raise RuntimeError("shape mismatch")


def test_missing_tensors_are_not_invented(tmp_path, tiny):
    model = transformers.LlamaForCausalLM.from_pretrained(tiny)
    state = model.state_dict()
    del state["model.norm.weight"]
    model.save_pretrained(tmp_path / "holed", state_dict=state)
    found = checkpoint.find(str(tmp_path / "holed"), torch.float32)
    with pytest.raises(ValueError, match=r"lacks 1 tensors, the first is model\.norm\.weight"):
        checkpoint.load(found, fastllama.LlamaForCausalLM, torch.float32, CPU)


def test_transformers_own_model_has_no_native_step(tiny):
    with pytest.raises(ValueError, match="--compile native needs --preallocate"):
        a_point(tiny, preallocate=False, switches={"compile": "native"})
