"""What a user should know before a run: said on stderr, and nothing is refused."""

import sys

from fastllama.lab.measuring import checkpoint
from fastllama.lab.points.point import Point


def say(points: list[Point]) -> None:
    """Warns of a slow dtype, and of texts longer than the model was made for."""
    point = points[0]
    if point.dtype == "fp16" and point.device == "cpu":
        print("warning: fp16 is slow on a CPU, which computes it through fp32; fp32 or bf16 suit it", file=sys.stderr)
    found = checkpoint.outline(point.model, point.torch_dtype)
    longest = max(point.positions for point in points)
    # preallocate says so itself.
    if not point.preallocate and longest > found.config.max_position_embeddings:
        print(
            f"warning: {longest} positions are more than the {found.config.max_position_embeddings} "
            f"(max_position_embeddings) that {point.model_name} was made for",
            file=sys.stderr,
        )
