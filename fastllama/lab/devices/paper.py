"""On paper: what a token of a tensor-parallel Llama costs in bytes and messages, and where more processes stop helping.

Counted as model/spread.py computes: a process reads its heads, its part of the MLP and its rows of the output matrix;
two sums a layer and one of the embedding, and the logits side by side (Shoeybi et al. 2019, arXiv 1909.08053). A
message waits for the product before it and holds up the one behind it, so that reading and messages add up.

Legend: B rows, E hidden size.
"""

import argparse
import math
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from fastllama.demo.shapes import SHAPES, Shape
from fastllama.model.footprint import head_dim
from fastllama.model.spread import heads_obstacle

BODIES = {
    "llama-2-70b": Shape(8192, 80, 64, 8, 128, 28672, 32000, False),
    "llama-3-70b": Shape(8192, 80, 64, 8, 128, 28672, 128256, False, max_position_embeddings=8192),
    **SHAPES,
}
PROCESSES = (1, 2, 4, 8, 16, 32, 64)
HEADS = (
    "processes",
    "weights, GB",
    "cache, MB",
    "sums",
    "KB each",
    "KB sent",
    "reading, ms",
    "messages, ms",
    "step, ms",
    "x one",
)


@dataclass(frozen=True)
class Machine:
    """What the time of a token depends on.

    The defaults are an eight-way H100 SXM node's data sheet (HBM3, and NVLink in one direction); the latency of a
    message is an assumption, of the size that small sums within a node take.
    """

    read_gb_per_s: float = 3350.0
    link_gb_per_s: float = 450.0
    latency_us: float = 10.0


@dataclass(frozen=True)
class Cost:
    """What one process does for one step of `rows` rows. Bytes, and numbers of messages."""

    processes: int
    weight_bytes: int  # read
    cache_bytes: int  # read
    sums: int
    sum_bytes: int  # of each
    logits_bytes: int  # that this process has of them

    @property
    def messages(self) -> int:
        """Sums, and the logits."""
        return self.sums + 1 if self.processes > 1 else 0

    @property
    def sent_bytes(self) -> float:
        """Sent by one process, in rings: a sum passes twice, less what lies there already."""
        others = self.processes - 1
        return 2 * self.sums * self.sum_bytes * others / self.processes + others * self.logits_bytes

    def read_s(self, machine: Machine) -> float:
        """Seconds that reading takes at least."""
        return (self.weight_bytes + self.cache_bytes) / (machine.read_gb_per_s * 1e9)

    def message_s(self, machine: Machine) -> float:
        """Seconds that the messages take."""
        return self.messages * machine.latency_us * 1e-6 + self.sent_bytes / (machine.link_gb_per_s * 1e9)

    def step_s(self, machine: Machine) -> float:
        """Seconds of a step at least."""
        return self.read_s(machine) + self.message_s(machine)


def cost(config, processes: int, positions: int, rows: int = 1, itemsize: int = 2) -> Cost:
    """One process's part of a step, where each row has `positions` in the cache.

    `config`: a `Shape` or a `LlamaConfig` without biases. Raises `ValueError` where heads cannot be divided so.
    """
    obstacle = heads_obstacle(config, processes)
    if obstacle is not None:
        raise ValueError(f"tensor parallelism over {processes} processes is not possible: {obstacle}")
    hidden, dim, layers = config.hidden_size, head_dim(config), config.num_hidden_layers
    heads, kv_heads = config.num_attention_heads // processes, max(config.num_key_value_heads // processes, 1)
    inner, vocabulary = math.ceil(config.intermediate_size / processes), math.ceil(config.vocab_size / processes)
    attention = 2 * heads * dim * hidden + 2 * kv_heads * dim * hidden
    layer = attention + 3 * inner * hidden + 2 * hidden
    sums = 2 * layers + 1 if processes > 1 else 0
    return Cost(
        processes,
        itemsize * (layers * layer + hidden + vocabulary * hidden),
        itemsize * rows * positions * layers * 2 * kv_heads * dim,
        sums,
        itemsize * rows * hidden if sums else 0,
        itemsize * rows * vocabulary if sums else 0,
    )


def costs(config, processes: tuple[int, ...], positions: int, rows: int = 1, itemsize: int = 2) -> list[Cost]:
    """One for each number of processes that is possible."""
    return [cost(config, n, positions, rows, itemsize) for n in processes if heads_obstacle(config, n) is None]


def even_processes(whole: Cost, one_of_many: Cost, machine: Machine) -> float:
    """For how many processes the latency of the messages is as long as the reading that is left to each."""
    return whole.read_s(machine) / (one_of_many.messages * machine.latency_us * 1e-6)


def _cells(one: Cost, whole: Cost, machine: Machine) -> list[str]:
    return [
        str(one.processes),
        f"{one.weight_bytes / 1e9:.2f}",
        f"{one.cache_bytes / 1e6:.0f}",
        str(one.sums),
        f"{one.sum_bytes / 1e3:.1f}",
        f"{one.sent_bytes / 1e3:,.0f}",
        f"{one.read_s(machine) * 1e3:.2f}",
        f"{one.message_s(machine) * 1e3:.2f}",
        f"{one.step_s(machine) * 1e3:.2f}",
        f"{whole.step_s(machine) / one.step_s(machine):.2f}",
    ]


def limit(made: list[Cost], machine: Machine) -> str:
    """Where the limit lies, in words."""
    whole, largest = made[0], made[-1]
    if largest.messages == 0:
        return "One process sends no message."
    floor_ms = largest.messages * machine.latency_us * 1e-3
    even = even_processes(whole, largest, machine)
    sent_ms = largest.sent_bytes / machine.link_gb_per_s / 1e6
    return (
        f"{largest.messages} messages of {machine.latency_us:g} µs are {floor_ms:.2f} ms, whatever the number of "
        f"processes: no more than {1e3 / floor_ms:,.0f} tokens a second for a row. From {even:.0f} processes on, the "
        f"messages take longer than the reading. What {largest.processes} processes send takes {sent_ms:.2f} ms by its "
        f"bytes: it is {'latency' if floor_ms > sent_ms else 'the link'} that limits."
    )


def about(name: str, positions: int, rows: int, machine: Machine) -> str:
    """What was assumed, in words."""
    return (
        f"{name} in 16 bits, {rows} row{'s' * (rows != 1)}, {positions:,} positions in use; "
        f"{machine.read_gb_per_s:g} GB/s of memory and {machine.link_gb_per_s:g} GB/s of link for each process, "
        f"{machine.latency_us:g} µs a message"
    )


def in_markdown(records: list[dict] | None = None, root=None) -> str:
    """The README's table of an eight-way 70B: computed, measured by nobody."""
    machine, positions = Machine(), 4096
    made = costs(BODIES["llama-3-70b"], PROCESSES, positions)
    lines = [
        f"{about('llama-3-70b', positions, 1, machine)}:\n",
        f"| {' | '.join(HEADS)} |",
        "| ---: " * len(HEADS) + "|",
    ]
    lines += [f"| {' | '.join(_cells(one, made[0], machine))} |" for one in made]
    source = (
        f"Measured by nobody: {machine.read_gb_per_s:g} and {machine.link_gb_per_s:g} GB/s are an H100 SXM's data "
        f"sheet (HBM3; NVLink in one direction), and {machine.latency_us:g} µs a message is assumed."
    )
    return "\n".join(lines) + f"\n\n{limit(made, machine)}\n\n{source}\n"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments to its parser."""
    usual = Machine()
    parser.add_argument("--model", default="llama-3-70b", metavar="NAME", help=f"{', '.join(BODIES)} (%(default)s)")
    parser.add_argument("--processes", default=",".join(map(str, PROCESSES)), metavar="LIST", help="(%(default)s)")
    parser.add_argument("--positions", default="4096", metavar="N", help="positions in use in each row (%(default)s)")
    parser.add_argument("--rows", default="1", metavar="B", help="rows of a step (%(default)s)")
    for flag, value, unit in (
        ("read", usual.read_gb_per_s, "GB/s of each process's memory"),
        ("link", usual.link_gb_per_s, "GB/s that each process sends"),
        ("latency", usual.latency_us, "µs of a message, however short"),
    ):
        parser.add_argument(f"--{flag}", default=f"{value:g}", metavar="X", help=f"{unit} (%(default)s)")


def _number(name: str, given: str, kind=int):
    try:
        value = kind(given)
    except ValueError:
        value = 0
    if not 0 < value < 1e12:
        raise ValueError(
            f"--{name} {given!r} is not allowed; allowed: {'an integer' if kind is int else 'a number'} > 0"
        )
    return value


def run(given) -> int:
    """Print the table. `ValueError`, one sentence, for what is not allowed."""
    if given.model not in BODIES:
        raise ValueError(f"--model {given.model!r} is not one of {', '.join(BODIES)}")
    config = BODIES[given.model]
    processes = sorted({1, *(_number("processes", word) for word in given.processes.split(","))})
    positions, rows = _number("positions", given.positions), _number("rows", given.rows)
    machine = Machine(*(_number(name, getattr(given, name), float) for name in ("read", "link", "latency")))
    made = [cost(config, one, positions, rows) for one in processes]
    title = about(given.model, positions, rows, machine)
    table = Table(title=title, title_justify="left", padding=(0, 0, 0, 1))
    for head in HEADS:
        table.add_column(head.replace(", ", ",\n"), justify="right")
    for one in made:
        table.add_row(*_cells(one, made[0], machine))
    console = Console()
    console.print(table)
    console.print(limit(made, machine), highlight=False)
    return 0
