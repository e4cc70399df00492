"""A picture of a sweep's memory: peaks of ours and of vanilla, and the part that the reserved cache takes.

matplotlib is an extra and is imported where it is needed.
"""

from pathlib import Path

import torch

from fastllama.cache.budget import CacheShape
from fastllama.lab.measuring import checkpoint
from fastllama.lab.pictures import canvas, plot_sweep
from fastllama.lab.points.point import DTYPES
from fastllama.lab.sweeping import swept

_FIGURE = "max_mem_mb"


def cache_mb(point: dict) -> float | None:
    """MB (10^6 bytes) that a stored point of ours reserved for keys, values and mask, by its model's shape.

    None for another than ours, and for a model that does not ship with the package: a point holds no path to it.
    """
    if not point["switches"]["preallocate"]:
        return None
    name, dtype = point["model"], DTYPES[point["dtype"]]
    if not name.startswith(("random:", "inflated:")) and name != "demo":
        return None
    config = checkpoint.outline(name, dtype).config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    length = point["cache_length"] or point["prompt_length"] + point["new_tokens"]
    shape = CacheShape(
        config.num_hidden_layers, point["batch_size"], config.num_key_value_heads, length, head_dim, dtype,
        torch.device("cpu"), point["switches"].get("cache_k"), point["switches"].get("cache_v"),
    )  # fmt: skip
    return shape.nbytes / 1e6


def memory(entries: list[dict], path: Path, axis: str | None = None) -> Path:
    """Draw peak memory against what a sweep varies, with the cache's part where one option varies.

    entries, path, axis and errors: as of plot_sweep.sweep.
    """
    path, found = canvas.target(path), swept.swept(entries, _FIGURE, axis)
    caches = {id(point): cache_mb(point) for point in found.points} if found.series is None else {}

    def cache_line(axes) -> None:
        points = [point for point in found.of(None) if caches.get(id(point)) is not None]
        if not points:
            return
        order = found.values(found.axis)
        values = [swept.value(point, found.axis) for point in points]
        xs = values if found.is_numeric else [order.index(one) for one in values]
        style = {"color": "black", "marker": "x", "linestyle": ":" if found.is_numeric else "none", "linewidth": 1.2}
        sizes = [caches[id(point)] for point in points]
        axes.plot(xs, sizes, label="of which the reserved cache, by the model's shape", **style)

    return plot_sweep.draw(found, path, _FIGURE, cache_line)
