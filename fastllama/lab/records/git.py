"""What git knows about the repository: the commit, what differs from it, and a commit's source hash."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastllama.lab.records import sources


def _git(root: Path, *arguments: str, stdin: bytes = b"") -> bytes | None:
    """Standard output of a git command in `root`; None if git reports failure."""
    # A git hook sets GIT_DIR and GIT_INDEX_FILE, which would point the command at another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, env=environment, check=False)
    except FileNotFoundError:
        raise ValueError(f"{root} is a git repository but the git command is not installed") from None
    return done.stdout if done.returncode == 0 else None


def is_repository(root: Path) -> bool:
    """True if `root` itself is the top of a git work tree."""
    return (Path(root) / ".git").exists()


def head(root: Path) -> str:
    """The full sha of HEAD. ValueError if there is no commit yet."""
    out = _git(root, "rev-parse", "--verify", "HEAD^{commit}")
    if out is None:
        raise ValueError(f"git names no commit for {root}; commit first, then record")
    return out.decode().strip()


def commit_of(root: Path, name: str) -> str | None:
    """The full sha that a commit's, branch's or tag's name stands for; None if it stands for no commit."""
    if not is_repository(root) or name.startswith("-"):
        return None
    out = _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    return None if out is None else out.decode().split()[-1]


@contextmanager
def worktrees(root: Path, commits: list[str]) -> Iterator[list[Path]]:
    """A work tree per commit in a temporary folder, and none left behind, whatever happens inside."""
    with tempfile.TemporaryDirectory(prefix="fastllama-", ignore_cleanup_errors=True) as folder:
        paths = [Path(folder) / f"{index}-{commit[:7]}" for index, commit in enumerate(commits)]
        try:
            for path, commit in zip(paths, commits, strict=True):
                # Somebody's hook on checkout is not part of what is measured.
                hooks = ("-c", f"core.hooksPath={os.devnull}")
                if _git(root, *hooks, "worktree", "add", "--quiet", "--detach", str(path), commit) is None:
                    raise ValueError(f"git could not make a work tree of commit {commit[:7]}")
            yield paths
        finally:
            for path in paths:
                _git(root, "worktree", "remove", "--force", "--force", str(path))
            shutil.rmtree(folder, ignore_errors=True)
            _git(root, "worktree", "prune")


def has_commit(root: Path, commit: str) -> bool:
    """True if this clone holds `commit` (a shallow clone or a copied tree may not)."""
    return is_repository(root) and _git(root, "cat-file", "-e", f"{commit}^{{commit}}") is not None


_sha256: dict[tuple[Path, str], str] = {}  # of a blob's content, which its name fixes: read once for many commits


def _blobs_sha256(root: Path, blobs: list[str]) -> list[str]:
    """Of each blob's content, from one process of git. Raises `ValueError` where this clone lacks one."""
    missing = [blob for blob in dict.fromkeys(blobs) if (root, blob) not in _sha256]
    # Of each: its name, kind and size, a line; its content; a line's end.
    out = _git(root, "cat-file", "--batch", stdin="".join(f"{blob}\n" for blob in missing).encode()) if missing else b""
    at = 0
    for blob in missing:
        end = (out or b"").find(b"\n", at)
        words = out[at:end].split() if out and end >= 0 else []
        if len(words) != 3:
            raise ValueError(f"git object {blob} is missing from {root}")
        content, at = out[end + 1 : end + 1 + int(words[2])], end + 2 + int(words[2])
        _sha256[root, blob] = hashlib.sha256(content).hexdigest()
    return [_sha256[root, blob] for blob in blobs]


def digests_of_commit(root: Path, commit: str, schema: int = 2) -> dict[str, str]:
    """As sources.digests, of the files that `commit` holds. ValueError if the commit is not in this clone.

    schema: of the record whose files they are, as sources.is_source takes it.
    """
    listing = _git(root, "ls-tree", "-r", "-z", commit)
    if listing is None:
        raise ValueError(f"commit {commit} is not in this clone")
    blobs = {}
    for entry in listing.decode("utf-8", "surrogateescape").split("\0")[:-1]:
        (_, kind, blob), name = entry.split("\t", 1)[0].split(), entry.split("\t", 1)[1]
        if kind == "blob" and sources.is_source(name, schema):
            blobs[name] = blob
    names = sorted(blobs)
    return dict(zip(names, _blobs_sha256(Path(root), [blobs[name] for name in names]), strict=True))


def source_sha256_of_commit(commit: str, root: Path = sources.ROOT, schema: int = 2) -> str:
    """sources.source_sha256 computed from git objects instead of the files on disk."""
    return sources.combine(digests_of_commit(root, commit, schema))


def dirty_files(root: Path) -> list[str]:
    """Source files whose content differs from HEAD, or that only one of HEAD and the disk has.

    Judged by what source_sha256 covers, so changes.md, records and documentation may differ.
    """
    here, there = sources.digests(root), digests_of_commit(root, head(root))
    return sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))


def file_at(root: Path, commit: str, path: str) -> bytes | None:
    """Content of `path` in `commit`; None if the commit has no such file."""
    return _git(root, "cat-file", "blob", f"{commit}:{path}")
