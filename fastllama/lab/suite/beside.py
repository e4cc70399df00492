"""Lines that are points of the laboratory: ours beside vanilla, beside compiled vanilla, beside ours in other sizes."""

from dataclasses import replace

from fastllama.lab.measuring import measure
from fastllama.lab.points.point import Point
from fastllama.lab.records import digest
from fastllama.lab.suite.line import NOT_COMPARED, Case, Measured
from fastllama.lab.sweeping import plan


class Alone(Point):
    """A point of ours without vanilla beside it, for what vanilla would take minutes to do: parity is not compared."""

    @property
    def contestants(self) -> tuple[str, ...]:
        return ("ours",)


def _point(point: Point) -> dict:
    record = measure.measure(point)
    if not isinstance(point, Alone):
        return record
    return digest.seal({**record, "parity": NOT_COMPARED, "reference_hash": None})


def _over(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def vanilla(case: Case, device: str) -> Measured:
    """Decoding beside vanilla."""
    record = _point(case.point(device))
    names = ("decode_speedup", "ceiling_fraction", "decode_tok_per_s", "ceiling_gb_per_s")
    figures = {name: record[name] for name in names}
    figures["vanilla_decode_tok_per_s"] = record["baseline"]["decode_tok_per_s"]
    return Measured(figures, [record])


def without_vanilla(case: Case, device: str) -> Measured:
    """Decoding in a half precision without vanilla, and the prefill beside that in fp32."""
    record = _point(case.point(device, Alone))
    full = _point(case.point(device, dtype="fp32", new_tokens=8, runs=min(case.runs, 3)))
    figures = {name: record[name] for name in ("ceiling_fraction", "decode_tok_per_s", "ttft_ms")}
    figures |= {"fp32_ttft_ms": full["ttft_ms"], "prefill_over_fp32": _over(record["ttft_ms"], full["ttft_ms"])}
    return Measured(figures, [record, full])


def batch(case: Case, device: str) -> Measured:
    """Decoding of several rows beside vanilla, and beside ours with one row."""
    record = _point(case.point(device))
    # The fastest that one row can be had for.
    fastest = "native" if case.compile == "static" and device == "cpu" else case.compile
    one = _point(case.point(device, Alone, batch_size=1, compile=fastest, products="auto"))
    figures = {name: record[name] for name in ("decode_speedup", "decode_tok_per_s")}
    figures["one_row_decode_tok_per_s"] = one["decode_tok_per_s"]
    figures["times_one_row"] = _over(record["decode_tok_per_s"], one["decode_tok_per_s"])
    return Measured(figures, [record, one])


def prefill(case: Case, device: str) -> Measured:
    """Time to first token beside vanilla."""
    record = _point(case.point(device))
    theirs = record["baseline"]["ttft_ms"]
    figures = {"ttft_speedup": _over(theirs, record["ttft_ms"]), "ttft_ms": record["ttft_ms"]}
    return Measured({**figures, "vanilla_ttft_ms": theirs}, [record])


def compiled_vanilla(case: Case, device: str) -> Measured:
    """As vanilla, and beside vanilla with its own static cache, compiled."""
    ours = vanilla(case, device)
    compiled = _point(case.point(device, preallocate=False))
    speed = compiled["decode_tok_per_s"]
    ours.figures["compiled_vanilla_decode_tok_per_s"] = speed
    ours.figures["times_compiled_vanilla"] = _over(ours.figures["decode_tok_per_s"], speed)
    return replace(ours, points=[*ours.points, compiled])


def batch_curve(case: Case, device: str) -> Measured:
    """Decode speed of all rows per batch size, with vanilla beside each."""
    figures, points = {}, []
    for size in plan.NAMED["batch"][1]:
        record = _point(case.point(device, batch_size=size))
        figures[f"decode_tok_per_s_{size}"] = record["decode_tok_per_s"]
        figures[f"decode_speedup_{size}"] = record["decode_speedup"]
        points.append(record)
    return Measured(figures, points)
