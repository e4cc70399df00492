"""What a measurement depends on: the files whose content is part of every record."""

import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]

# A clone has both, and an installed copy only the first.
_TOP_LEVEL = ("run_llama.py", "setup.py")
_PACKAGE = "fastllama/"
# Prompts, tokenizer and weights decide a hash and a speed as much as the code does.
_SUFFIXES = (".py", ".safetensors", ".json", ".txt", ".cpp", ".h")
# Records of schema 1 were hashed without the C++ sources, and are verified so.
_SUFFIXES_1 = (".py", ".safetensors", ".json", ".txt")


def require_clone(root: Path, kept: str = "records are kept") -> None:
    """ValueError, one sentence, where `root` is no tree of the repository but, say, where a package is installed."""
    # With git at hand a file that was removed is a change, and whoever asks about changes will say so.
    for name in _TOP_LEVEL[:1] if (Path(root) / ".git").exists() else _TOP_LEVEL:
        if not (Path(root) / name).is_file():
            raise ValueError(f"{kept} in a clone of the repository, and {root} is not one (it has no {name})")


def is_source(path: str, schema: int = 2) -> bool:
    """True if the file at `path` (relative to the repository, with "/") takes part in a measurement.

    schema: of the record whose hash it is.
    """
    if path in _TOP_LEVEL:
        return True
    hidden = any(part.startswith(".") or part == "__pycache__" for part in path.split("/"))
    return path.startswith(_PACKAGE) and path.endswith(_SUFFIXES_1 if schema == 1 else _SUFFIXES) and not hidden


def digests(root: Path = ROOT) -> dict[str, str]:
    """sha256 (hex) of every source file's bytes, by relative path, in order of path."""
    root = Path(root)
    candidates = [root / name for name in _TOP_LEVEL] + list((root / _PACKAGE).rglob("*"))
    found = {path.relative_to(root).as_posix(): path for path in candidates if path.is_file()}
    return {name: hashlib.sha256(found[name].read_bytes()).hexdigest() for name in sorted(found) if is_source(name)}


def combine(digests: dict[str, str]) -> str:
    """One sha256 (hex) over the sorted (relative path, sha256 of content) pairs."""
    lines = "".join(f"{name}\0{digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


def source_sha256(root: Path = ROOT) -> str:
    """The hash (hex) of the source files as they lie on disk now."""
    return combine(digests(root))
