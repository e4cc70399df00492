"""What tensor parallelism costs on paper; tests/test_tensor_parallel.py holds it to what processes read and send."""

import pytest

from fastllama.lab import __main__
from fastllama.lab.devices import paper
from fastllama.lab.devices.paper import BODIES, Machine
from fastllama.lab.records import readme


def test_eight_processes_of_a_70b():
    one, eight = (paper.cost(BODIES["llama-3-70b"], n, 4096) for n in (1, 8))
    body = BODIES["llama-3-70b"]
    # All parameters but the embedding's, of which a step reads a row.
    assert one.weight_bytes == 2 * (body.parameters - body.vocab_size * body.hidden_size)
    # Norms are everywhere; all else is divided.
    norms = 2 * (2 * 80 + 1) * 8192
    assert 8 * (eight.weight_bytes - norms) == one.weight_bytes - norms
    assert 8 * eight.cache_bytes == one.cache_bytes == 2 * 4096 * 80 * 2 * 8 * 128
    assert (one.messages, one.sent_bytes) == (0, 0)
    assert (eight.sums, eight.sum_bytes, eight.messages) == (161, 2 * 8192, 162)
    assert eight.sent_bytes == 2 * 161 * 16384 * 7 / 8 + 7 * 2 * 128256 / 8


def test_shared_kv_heads_are_read_by_each_process_that_has_them():
    eight, sixteen = (paper.cost(BODIES["llama-2-70b"], n, 4096) for n in (8, 16))
    assert sixteen.cache_bytes == eight.cache_bytes
    assert 2 * sixteen.weight_bytes > eight.weight_bytes


def test_time_is_reading_and_messages():
    machine = Machine(read_gb_per_s=1000, link_gb_per_s=100, latency_us=20)
    one = paper.cost(BODIES["llama-2-70b"], 4, 1000, rows=2)
    assert one.read_s(machine) == pytest.approx((one.weight_bytes + one.cache_bytes) / 1e12)
    assert one.message_s(machine) == pytest.approx(162 * 20e-6 + one.sent_bytes / 1e11)
    assert one.step_s(machine) == one.read_s(machine) + one.message_s(machine)
    whole = paper.cost(BODIES["llama-2-70b"], 1, 1000, rows=2)
    even = paper.even_processes(whole, one, machine)
    assert whole.read_s(machine) / even == pytest.approx(162 * 20e-6)


def test_the_limit_is_named():
    made = [paper.cost(BODIES["llama-2-70b"], n, 4096, rows=16) for n in (1, 8)]
    assert paper.limit(made, Machine()).endswith("it is latency that limits.")
    assert paper.limit(made, Machine(link_gb_per_s=10)).endswith("it is the link that limits.")
    assert paper.limit(made[:1], Machine()) == "One process sends no message."


def test_what_cannot_be_divided_is_refused():
    with pytest.raises(ValueError, match="over 3 processes is not possible: 64 attention heads are no whole number"):
        paper.cost(BODIES["llama-2-70b"], 3, 100)
    assert [one.processes for one in paper.costs(BODIES["llama-2-70b"], (1, 3, 8), 100)] == [1, 8]


def test_the_command_prints_the_table(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert __main__.main(["spread", "--model", "llama-2-70b", "--processes", "8", "--latency", "5"]) == 0
    said = capsys.readouterr().out
    assert "162 messages of 5 µs are 0.81 ms" in said
    assert f"{paper.cost(BODIES['llama-2-70b'], 8, 4096).weight_bytes / 1e9:.2f}" in said
    for wrong in (["--model", "gpt2"], ["--processes", "0"], ["--read", "x"], ["--processes", "5"]):
        assert __main__.main(["spread", *wrong]) == 2


def test_the_readme_has_it_as_a_block():
    found = readme.render("<!-- begin:spread -->\n<!-- end:spread -->\n", [])
    assert "| 8 | " in found and "it is latency that limits" in found
