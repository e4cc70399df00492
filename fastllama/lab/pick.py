"""Picking one of several points by name."""

from fastllama.lab.point import Point

FIELDS = ("batch_size", "prompt_length", "new_tokens")


def point_name(point: Point) -> str:
    """The name of a point among others: "batch_size=8,prompt_length=128,new_tokens=10"."""
    return ",".join(f"{field}={getattr(point.workload, field)}" for field in FIELDS)


def pick(points: list[Point], name: str) -> Point:
    """The point that has this name, of which what all points share may be left out.

    Raises `ValueError`, with the names there are, if it fits none or several.
    """
    wanted = set(name.replace(" ", "").split(","))
    fitting = [point for point in points if wanted <= set(point_name(point).split(","))]
    if len(fitting) != 1:
        names = "; ".join(map(point_name, points))
        raise ValueError(f"{name!r} names {len(fitting)} points of {len(points)}: {names}")
    return fitting[0]
