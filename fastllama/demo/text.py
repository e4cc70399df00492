"""The demo's text: standard-library sources, split into training files and held-out files.

Training reads the library of the running Python. The held-out modules never enter training; a copy of
them ships with the package (under the PSF licence) as the source of real prompts and of perplexity.
"""

import hashlib
import json
import sysconfig
from pathlib import Path

HELD_OUT_MODULES = (
    "calendar",
    "configparser",
    "contextlib",
    "csv",
    "difflib",
    "fractions",
    "heapq",
    "queue",
    "shlex",
    "statistics",
    "textwrap",
)
HELD_OUT_DIR = Path(__file__).parent / "heldout"
MANIFEST = HELD_OUT_DIR / "manifest.json"

# Tests differ between distributions, and character tables are not language.
_SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "turtledemo",
    "__pycache__",
}


def training_files() -> list[Path]:
    """Standard-library sources of the running Python, sorted, without the held-out modules."""
    library = Path(sysconfig.get_paths()["stdlib"])
    return [
        path
        for path in sorted(library.rglob("*.py"))
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(library).parts)
        and not any(part.startswith("config-") for part in path.relative_to(library).parts)
        and not (path.parent == library and path.stem in HELD_OUT_MODULES)
    ]


def training_documents() -> list[str]:
    """Texts of `training_files()`, skipping the few that are not UTF-8 or are nearly empty."""
    documents = []
    for path in training_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if len(text) > 200:
            documents.append(text)
    return documents


def held_out_documents() -> list[str]:
    """Texts of the shipped held-out files, in name order.

    Raises `ValueError` naming the file when one does not match its sha256 in the manifest.
    """
    manifest = json.loads(MANIFEST.read_text())
    documents = []
    for name, entry in sorted(manifest["files"].items()):
        data = (HELD_OUT_DIR / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise ValueError(f"held-out file {name} does not match its sha256 in {MANIFEST.name}")
        documents.append(data.decode("utf-8"))
    return documents


def held_out_text() -> str:
    """All held-out documents, joined in name order."""
    return "\n".join(held_out_documents())
