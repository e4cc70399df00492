"""Files of results: written as they come beside the file that is asked for, which appears whole, in order, at the end.

FILE.partial begins with a line that says what was asked; a run that was interrupted goes on from it. Each of several
processes writes a FILE.partial.N of its own, of the same kind, which whoever comes next takes in.
"""

import glob
import json
from pathlib import Path

from fastllama.kernels.whole_file import raise_named, whole
from fastllama.lab.lines import write_all

_FORMAT = 1


class Results:
    """The results of `count` prompts, for `asked`: a JSON object that two runs have in common, or are not the same.

    Raises `FileExistsError` where the file is there already, `FileNotFoundError` where its folder is not, and
    `ValueError` where FILE.partial is of another run.
    """

    def __init__(self, path: str | Path, asked: dict, count: int):
        self.path, self.count = Path(path), count
        self.partial = self.partial_of(self.path)
        if not self.path.resolve().parent.is_dir():
            raise FileNotFoundError(f"there is no folder {self.path.parent} to write {self.path.name} in")
        self.lines: dict[int, str] = {}
        self.header = {"format": _FORMAT, **asked}
        if _is_begun(self.partial):
            self._resume()
        elif self.path.exists():
            raise FileExistsError(f"{self.path} is there already: give another --out, or remove it")
        else:
            self._require_parts()
            with whole(self.partial) as unfinished:
                unfinished.write_text(_words(self.header), encoding="utf-8")
        self._file = _Lines(self.partial, "ab")
        self.take_in()

    @staticmethod
    def partial_of(path: Path) -> Path:
        """Where results stand until all are there."""
        return path.with_name(path.name + ".partial")

    def _resume(self) -> None:
        self.lines, length = _read(self.partial, self.header, self.count)
        self._require_parts()
        if length < self.partial.stat().st_size:
            with open(self.partial, "r+b") as file:
                file.truncate(length)

    def _parts(self) -> list[Path]:
        found = self.path.parent.glob(glob.escape(self.partial.name) + ".*")
        return sorted(path for path in found if path.suffix[1:].isdecimal() and _is_begun(path))

    def _require_parts(self) -> None:
        for part in self._parts():
            _read(part, self.header, self.count)

    def take_in(self) -> None:
        """Takes over what several processes wrote in files of their own, which are then gone."""
        for part in self._parts():
            found, _ = _read(part, self.header, self.count)
            new = {index: line for index, line in found.items() if index not in self.lines}
            for line in new.values():
                self._file.add(line + "\n")
            self.lines |= new
            part.unlink()

    def part(self, number: int) -> "Part":
        """Where one of several processes writes, once this was made."""
        return Part(self.partial, self.header, number)

    @property
    def done(self) -> set[int]:
        """Which prompts have their result."""
        return set(self.lines)

    def add(self, index: int, result: dict) -> None:
        """Writes a result, which another process can read at once."""
        words = _words({"index": index, **result})
        self._file.add(words)
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


class Part:
    """The results of process `number`, for a `Results` that begins with `header` to take in."""

    def __init__(self, partial: Path, header: dict, number: int):
        self._file = _Lines(Path(f"{partial}.{number}"), "wb")
        self._file.add(_words(header))

    def add(self, index: int, result: dict) -> None:
        """Writes a result."""
        self._file.add(_words({"index": index, **result}))

    def close(self) -> None:
        """Leaves what is there."""
        self._file.close()


class _Lines:
    """A file that lines are added to; another process can read each at once."""

    def __init__(self, path: Path, mode: str):
        self._path, self._file = path, open(path, mode, buffering=0)  # noqa: SIM115

    def add(self, line: str) -> None:
        """`OSError` names the file; what is half there the next run removes."""
        try:
            write_all(self._file.fileno(), line.encode())
        except OSError as fault:
            raise_named(fault, self._path)

    def close(self) -> None:
        self._file.close()


def _is_begun(path: Path) -> bool:
    # A header that was not finished says nothing, and nothing is behind it.
    return path.exists() and b"\n" in path.read_bytes()


def _read(path: Path, header: dict, count: int) -> tuple[dict[int, str], int]:
    """(whole lines by index, their bytes). Raises `ValueError` where the file is of another run, or none of results."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]  # the last line may have been cut off
    first, *lines = whole.split(b"\n")[:-1]
    try:
        found = json.loads(first)
        if not isinstance(found, dict):
            raise ValueError
        results = [(json.loads(line)["index"], line.decode()) for line in lines]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is no file of results: remove it, or give another --out") from None
    differing = [name for name in {**header, **found} if header.get(name) != found.get(name)]
    if differing:
        name = differing[0]
        raise ValueError(
            f"{path} was begun with other {name.replace('_', ' ')} ({_shown(found.get(name))}, now "
            f"{_shown(header.get(name))}): ask for the same, remove it, or give another --out"
        )
    return {index: line for index, line in results if isinstance(index, int) and 0 <= index < count}, len(whole)


def _words(content: dict) -> str:
    return json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n"


def _shown(value) -> str:
    words = json.dumps(value)
    return words if len(words) <= 60 else f"{words[:57]}..."
