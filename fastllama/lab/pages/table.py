"""The tables that a run prints."""

from rich.console import Group
from rich.table import Table
from rich.text import Text

from fastllama.lab.measuring import assisted
from fastllama.lab.points.figures import assistance, spread, subject_name, workload_name
from fastllama.lab.points.workload import Workload, row_lengths
from fastllama.lab.quality import score

PARITY_STYLES = {
    "exact": "green",
    "reference": "dim",
    "tie": "yellow",
    "half": "yellow",
    "lossy": "magenta",
    "drawn": "yellow",
    "differs": "bold red",
}


def number(value: float | None) -> str:
    """Three digits or more; "-" for what was not measured."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _cell(point: dict, name: str, baseline: bool) -> str:
    """The median, and below it the smallest and the largest sample."""
    source = point["baseline"] if baseline else point
    ends = spread(point, name, baseline)
    if ends is None or len(source["runs"]) < 2:
        return number(source[name])
    return "\n".join([number(source[name]), *map(number, ends)])


def _row(point: dict, baseline: bool) -> list:
    source = point["baseline"] if baseline else point
    is_reference = baseline or point["baseline"] is None
    name = "vanilla" if is_reference else subject_name(point)
    parity = "reference" if is_reference else point["parity"]
    speedup = "1.00x" if is_reference else f"{point['speedup']:.2f}x"
    decode = None if is_reference else point["decode_speedup"]
    return [
        name + ("\n  min\n  max" if len(source["runs"]) > 1 else ""),
        *(_cell(point, name, baseline) for name in ("tok_per_s", "decode_tok_per_s", "ttft_ms")),
        number(source["max_mem_mb"]),
        source["hash"],
        Text(parity, style=PARITY_STYLES[parity]),
        speedup if decode is None else f"{speedup}\n({decode:.2f}x)",
    ]


def _unassisted_row(point: dict) -> list:
    """The same model without its assistance; what it was measured as in memory is not its own."""
    plain, against = point["assisted"]["unassisted"], point["baseline"]
    alone = {**point, **plain}
    speedup = f"{plain['tok_per_s'] / against['tok_per_s']:.2f}x"
    decode = plain["decode_tok_per_s"], against["decode_tok_per_s"]
    return [
        "unassisted" + ("\n  min\n  max" if len(plain["runs"]) > 1 else ""),
        *(_cell(alone, name, False) for name in ("tok_per_s", "decode_tok_per_s", "ttft_ms")),
        "-",
        plain["hash"],
        "-",
        f"{speedup}\n({decode[0] / decode[1]:.2f}x)" if all(decode) else speedup,
    ]


def _prefill_tok_per_s(point: dict, source: dict) -> float:
    """Prompt tokens of all rows over the time to the first new token, which choosing it is part of."""
    work = Workload(point["batch_size"], point["prompt_length"], point["new_tokens"], point["seed"])
    return 1000 * sum(row_lengths(work)) / source["ttft_ms"]


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


def _notes(point: dict, is_random: bool) -> list:
    baseline = point["baseline"]
    lines: list[str | Text] = [] if baseline is None else [f"vanilla's path: {baseline['path']}"]
    if "assisted" in point:
        lines.append(f"assisted, {assistance(point)}: {assisted.told(point)}")
        lines.append(
            f"beside unassisted: {point['assisted']['parity']}; unassisted: {point['assisted']['unassisted']['path']}"
        )
    lines.append(f"{'path' if baseline is None else 'path measured'}: {point['path']}")
    lines.append(
        f"prefill {number(_prefill_tok_per_s(point, point))} tok/s"
        + ("" if baseline is None else f" (vanilla {number(_prefill_tok_per_s(point, baseline))})")
        + (", and no decode step: one new token" if point["new_tokens"] == 1 else "")
    )
    if point["ceiling_fraction"] is not None:
        lines.append(
            f"{point['ceiling_fraction']:.0%} of the ceiling: decoding reads {point['read_gb_per_s']:.2f} GB/s "
            f"of the {point['ceiling_gb_per_s']:.1f} GB/s measured here"
        )
    lines.append(
        f"load {_seconds(point['load_s'])}, compile {_seconds(point['compile_s'])}, "
        f"warm-up {_seconds(point['warmup_s'])}; recompiles after warm-up: {point['recompiles_after_warmup']}; "
        f"medians of {len(point['runs'])}"
    )
    if "predicted_mb" in point:
        lines.append(f"peak predicted before loading: {number(point['predicted_mb'])} MB")
    if "rank_mem_mb" in point:
        each = ", ".join(number(value) for value in point["rank_mem_mb"])
        lines.append(f"tensor parallel over {point['world_size']} processes, with peaks of {each} MB")
    found = point["first_divergence"]
    if found is not None:
        margin = found["margin"]
        why = "" if margin is None else f", where the reference's top-1/top-2 margin is {margin:.2g}"
        lines.append(f"first divergence: row {found['row']}, new token {found['position']}{why}")
    if point["parity"] == "lossy":
        lines.append(f"lossy, against fp32: {score.of_record(point)}")
    if point["parity"] == "differs":
        lines.append(Text("the outputs differ from vanilla transformers: this speed is not for the same text", "red"))
    if is_random:
        lines.append(Text("random weights: they say nothing about quality or acceptance", "yellow"))
    return lines


def point_table(point: dict, is_random: bool) -> Group:
    """One measured point: vanilla beside what was measured, and below it what one must know to trust it."""
    reserves = point["switches"]["preallocate"] or point["switches"].get("static_cache")
    length = f", cache {point['cache_length']}" if reserves else ""
    title = f"{workload_name(point)}{length}, on {point['device']}"
    table = Table(title=title, title_justify="left", padding=(0, 0, 0, 1))
    for name, justify in (
        ("", "left"),
        ("tok/s", "right"),
        ("decode\ntok/s", "right"),
        ("first\ntoken ms", "right"),
        ("peak\nMB", "right"),
        ("hash", "left"),
        ("parity", "left"),
        ("speed-up\n(decode)", "right"),
    ):
        table.add_column(name, justify="left" if justify == "left" else "right", no_wrap=True)
    if point["baseline"] is not None:
        table.add_row(*_row(point, baseline=True))
    if "assisted" in point:
        table.add_row(*_unassisted_row(point))
    table.add_row(*_row(point, baseline=False))
    # Not as markup: a path may hold brackets.
    return Group(table, *(line if isinstance(line, Text) else Text(line) for line in _notes(point, is_random)))
