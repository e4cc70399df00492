"""The prompts of a sweep: every *.txt of a folder."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from fastllama.lab.points import workload

SHIPPED = Path(__file__).parent / "inputs"
_NAME = re.compile(r"[\w.=-]+")


@dataclass(frozen=True)
class PromptText:
    """`name` is the file's, without its ending."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def read(folder: str | Path | None = None) -> list[PromptText]:
    """The prompts that ship, or one's own, by name.

    Raises `FileNotFoundError` for a folder that is not there or has no *.txt, and `ValueError` for a file that is
    empty, is not UTF-8, or whose name is none for results.
    """
    folder = SHIPPED if folder is None else Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder of prompts {folder}")
    files = sorted(file for file in folder.glob("*.txt") if file.is_file())
    if not files:
        raise FileNotFoundError(f"the folder of prompts {folder} has no *.txt")
    for file in files:
        if not _NAME.fullmatch(file.stem):
            raise ValueError(f"the prompt file {file} needs a name of letters, digits and _ . = -")
    prompts = [PromptText(file.stem, workload.read_text(file, "prompt file")) for file in files]
    empty = next((prompt.name for prompt in prompts if not prompt.text.strip()), None)
    if empty is not None:
        raise ValueError(f"the prompt file {folder / empty}.txt is empty")
    return prompts
