"""FastConfig: the switches, validated in one place."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class FastConfig:
    """How to generate. A value that is not allowed raises `ValueError` before any work."""

    compile: str = field(default="no", metadata={"help": "compile the decode step", "allowed": "no", "lossless": True})

    def __post_init__(self):
        if self.compile != "no":
            raise ValueError(f"compile={self.compile!r} is not allowed; allowed: no")
