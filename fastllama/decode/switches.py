"""The switches of a reservation: a whole config, or single ones on top of what the model was loaded with."""

from dataclasses import replace

from fastllama.model.config import FastConfig


def switched(
    config: FastConfig | None, default: FastConfig | None, switches: dict, what: str = "preallocate"
) -> FastConfig:
    """`config`, or without one `default` with `switches`. Raises `ValueError` for both, and for an unknown one.

    `what`: the function that was called.
    """
    if config is not None and switches:
        raise ValueError(f"pass either config or single switches to {what}, not both")
    unknown = sorted(switches.keys() - FastConfig.__dataclass_fields__.keys())
    if unknown:
        allowed = ", ".join(FastConfig.__dataclass_fields__)
        raise ValueError(f"{what} has no switch {unknown[0]!r}; allowed: {allowed}")
    return replace(default or FastConfig(), **switches) if config is None else config
