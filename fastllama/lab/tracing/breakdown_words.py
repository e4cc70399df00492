"""A breakdown in a table and in sentences, and as JSON."""

from dataclasses import dataclass

from rich.table import Table

from fastllama.lab.tracing.breakdown import Phase, bytes_of
from fastllama.lab.tracing.parts import PARTS, PRODUCTS, Shape


@dataclass(frozen=True)
class Measured:
    """What a breakdown is judged by, from the same run: seconds without the profiler, ceilings of memory and products.

    first_s is a call for one token, whole_s one for all.
    """

    first_s: float
    whole_s: float
    ceiling_gb_per_s: float
    matrix_tflop_per_s: float


def rows(phase: Phase, shape: Shape, ceiling_gb_per_s: float) -> list[dict]:
    """One row per part, of one step or of the whole prefill; bytes are of weights and cache, None where unknown."""
    times, moved = max(phase.steps, 1), bytes_of(phase, shape)
    found = []
    for part in PARTS:
        row = phase.rows.get(part)
        if row is None:
            continue
        nbytes, ms = moved.get(part), row.us / times / 1e3
        rate = nbytes / ms / 1e6 if nbytes and ms > 0 else None
        found.append(
            {
                "part": part,
                "calls": row.calls / times,
                "ms": ms,
                "share": row.us / phase.us,
                "bytes": nbytes,
                "gb_per_s": rate,
                "ceiling_fraction": rate and rate / ceiling_gb_per_s,
                "operators_ms": {name: us / times / 1e3 for name, us in row.operators.most_common(3)},
            }
        )
    return found


def as_json(phase: Phase, shape: Shape, ceiling_gb_per_s: float) -> dict:
    """A phase, JSON-ready; layers_ms are of the marked products and norms of each layer."""
    times = max(phase.steps, 1)
    return {
        "ms": phase.us / times / 1e3,
        "steps": phase.steps,
        "parts": rows(phase, shape, ceiling_gb_per_s),
        "layers_ms": [phase.layers_us[layer] / times / 1e3 for layer in sorted(phase.layers_us)],
    }


def table(name: str, phase: Phase, shape: Shape, ceiling_gb_per_s: float) -> Table:
    """The parts of a phase, for a terminal."""
    title = f"{name} by part, under the profiler (MB: of weights and cache that must move)"
    made = Table(title=title, title_justify="left")
    made.add_column("part", overflow="fold")
    for column in ("calls", "ms", "share", "MB", "GB/s", "of ceiling"):
        made.add_column(column, justify="right")
    made.add_column("costliest operator", overflow="fold")
    for row in rows(phase, shape, ceiling_gb_per_s):
        costliest = next(iter(row["operators_ms"]), "")
        made.add_row(
            PARTS[row["part"]],
            f"{row['calls']:g}" if row["calls"] else "",
            f"{row['ms']:.3f}",
            f"{row['share']:.1%}",
            "" if row["bytes"] is None else f"{row['bytes'] / 1e6:.2f}",
            "" if row["gb_per_s"] is None else f"{row['gb_per_s']:.1f}",
            "" if row["ceiling_fraction"] is None else f"{row['ceiling_fraction']:.0%}",
            costliest,
        )
    made.add_row("all", "", f"{phase.us / max(phase.steps, 1) / 1e3:.3f}", "100.0%")
    return made


def prefill_words(phase: Phase, shape: Shape, measured: Measured) -> list[str]:
    """What a prefill's breakdown says, a sentence each."""
    tokens, flops = sum(shape.lengths), shape.prefill_flops()
    products_s = sum(phase.rows[part].us for part in PRODUCTS if part in phase.rows) / 1e6
    words = [
        f"prefill: {tokens} tokens in {phase.us / 1e3:.1f} ms under the profiler, {measured.first_s * 1e3:.1f} ms "
        "without it, to the first token."
    ]
    if phase.told_apart and products_s:
        rate = flops / products_s / 1e12
        words.append(
            f"Its products, {flops / 1e9:.1f} GFLOP, run at {rate:.3f} TFLOP/s, "
            f"{rate / measured.matrix_tflop_per_s:.0%} of the {measured.matrix_tflop_per_s:.3f} TFLOP/s of a large "
            "product in the same run."
        )
    return words + _costliest(phase)


def decode_words(phase: Phase, shape: Shape, measured: Measured) -> list[str]:
    """What the decode steps' breakdown says, a sentence each."""
    step_s = (measured.whole_s - measured.first_s) / (shape.new_tokens - 1)
    moved = sum(bytes_of(phase, shape).values())
    words = [
        f"decode: {phase.steps} steps of {phase.us / phase.steps / 1e3:.3f} ms under the profiler, "
        f"{step_s * 1e3:.3f} ms without it."
    ]
    if step_s > 0:
        rate = moved / step_s / 1e9
        above = " (above it: caches hold part of them)" if rate > measured.ceiling_gb_per_s else ""
        words.append(
            f"A step must move {moved / 1e6:.1f} MB: without the profiler {rate:.1f} GB/s, "
            f"{rate / measured.ceiling_gb_per_s:.0%} of the ceiling of {measured.ceiling_gb_per_s:.1f} GB/s"
            f"{above}."
        )
    words += _costliest(phase)
    if phase.layers_us:
        layers = [us / phase.steps / 1e3 for us in phase.layers_us.values()]
        words.append(
            f"Norms and products of a layer take {min(layers):.3f} to {max(layers):.3f} ms in the {len(layers)} layers."
        )
    if "native step" in phase.rows:
        by_part = ", ".join(f"{PARTS[part]} {nbytes / 1e6:.2f} MB" for part, nbytes in shape.step_bytes().items())
        words.append(f"A step is one C++ call: its time cannot be told apart by part, only its bytes: {by_part}.")
    if "compiled" in phase.rows:
        words.append(
            "Norms, rotary embedding, cache writes, activations and residual sums are fused by the compiler into "
            "kernels that belong to no part: they are one row, with the Python that calls them."
        )
    if "captured" in phase.rows:
        words.append("A captured graph replays its kernels without saying which part they are of: they are one row.")
    if not phase.told_apart:
        words.append("The compiler merged or replaced products, so that they could not be told apart either.")
    return words


def _costliest(phase: Phase) -> list[str]:
    ordered = sorted((part for part in phase.rows if part != "between"), key=lambda part: -phase.rows[part].us)
    named = ", ".join(f"{PARTS[part]} {phase.rows[part].us / phase.us:.0%}" for part in ordered[:3])
    between = phase.rows["between"].us / phase.us if "between" in phase.rows else 0.0
    return [f"The costliest parts: {named}; {PARTS['between']}, the profiler's own cost with it, is {between:.0%}."]
