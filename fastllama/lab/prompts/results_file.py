"""Files of results: written as they come beside the file that is asked for, which appears whole, in order, at the end.

FILE.partial begins with a line that says what was asked; a run that was interrupted goes on from it.
"""

import json
from pathlib import Path

from fastllama.kernels.whole_file import of, whole
from fastllama.lab.lines import write_all

_FORMAT = 1


class Results:
    """The results of `count` prompts, for `asked`: a JSON object that two runs have in common, or are not the same.

    Raises `FileExistsError` where the file is there already, `FileNotFoundError` where its folder is not, and
    `ValueError` where FILE.partial is of another run.
    """

    def __init__(self, path: str | Path, asked: dict, count: int):
        self.path, self.count = Path(path), count
        self.partial = self.path.with_name(self.path.name + ".partial")
        if not self.path.resolve().parent.is_dir():
            raise FileNotFoundError(f"there is no folder {self.path.parent} to write {self.path.name} in")
        self.lines: dict[int, str] = {}
        header = {"format": _FORMAT, **asked}
        # A header that was not finished says nothing, and nothing is behind it.
        if self.partial.exists() and b"\n" in self.partial.read_bytes():
            self._resume(header)
        elif self.path.exists():
            raise FileExistsError(f"{self.path} is there already: give another --out, or remove it")
        else:
            with whole(self.partial) as unfinished:
                unfinished.write_text(_words(header), encoding="utf-8")
        self._file = open(self.partial, "ab", buffering=0)  # noqa: SIM115

    def _resume(self, header: dict) -> None:
        content = self.partial.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]  # the last line may have been cut off
        first, *lines = whole.split(b"\n")[:-1]
        try:
            found = json.loads(first)
            if not isinstance(found, dict):
                raise ValueError
            results = [(json.loads(line)["index"], line.decode()) for line in lines]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{self.partial} is no file of results: remove it, or give another --out") from None
        differing = [name for name in {**header, **found} if header.get(name) != found.get(name)]
        if differing:
            name = differing[0]
            raise ValueError(
                f"{self.partial} was begun with other {name.replace('_', ' ')} ({_shown(found.get(name))}, now "
                f"{_shown(header.get(name))}): ask for the same, remove it, or give another --out"
            )
        self.lines = {index: line for index, line in results if isinstance(index, int) and 0 <= index < self.count}
        if len(whole) < len(content):
            with open(self.partial, "r+b") as file:
                file.truncate(len(whole))

    @property
    def done(self) -> set[int]:
        """Which prompts have their result."""
        return set(self.lines)

    def add(self, index: int, result: dict) -> None:
        """Writes a result, which another process can read at once."""
        words = _words({"index": index, **result})
        try:
            write_all(self._file.fileno(), words.encode())
        except OSError as fault:  # what is half there the next run removes
            raise of(fault, self.partial) from fault
        self.lines[index] = words[:-1]

    def close(self) -> None:
        """Leaves what is there for the next run."""
        self._file.close()

    def finish(self) -> None:
        """Puts all results in their place, in order. `ValueError` where one is missing."""
        missing = next((index for index in range(self.count) if index not in self.lines), None)
        if missing is not None:
            raise ValueError(f"prompt {missing} has no result")
        self.close()
        with whole(self.path) as unfinished, open(unfinished, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(self.lines[index] + "\n" for index in range(self.count))
        self.partial.unlink()


def _words(content: dict) -> str:
    return json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n"


def _shown(value) -> str:
    words = json.dumps(value)
    return words if len(words) <= 60 else f"{words[:57]}..."
