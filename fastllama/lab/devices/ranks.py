"""What a point that several processes measure together has beside another: the memory of each, by number."""

import socket
from dataclasses import replace

from fastllama.lab.devices.world import of_peers
from fastllama.lab.memory import memory
from fastllama.lab.memory.memory import Peaks
from fastllama.lab.points.point import Point
from fastllama.model.spread import heads_obstacle


def require_vanilla(point: Point, config) -> None:
    """Raises `ValueError` where transformers' own model, which is measured beside, cannot be so spread."""
    kv_heads = config.num_key_value_heads
    reason = heads_obstacle(config, point.world_size)
    if reason is None and kv_heads % point.world_size:
        reason = f"transformers' own attention cannot run {kv_heads} kv heads in {point.world_size} processes"
    if reason is not None:
        raise ValueError(f"{point.model_name} cannot be measured: {reason}")


def _port() -> str:
    with socket.socket() as found:
        found.bind(("", 0))
        return str(found.getsockname()[1])


def peaks(point: Point, name: str) -> tuple[Peaks, list[float]]:
    """(the peaks of the process that took most, max_mem_mb of each), of new processes that hold the model together."""
    # They meet at a place of their own: their launcher's serves their parents.
    place = {"MASTER_PORT": of_peers(_port())[0], "TORCHELASTIC_USE_AGENT_STORE": "False"}
    every = of_peers(memory.peaks(point, name, place))
    largest = max(every, key=lambda one: one.max_mem_mb)
    return replace(largest, load_s=max(one.load_s for one in every)), [one.max_mem_mb for one in every]
