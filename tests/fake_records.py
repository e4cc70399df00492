"""Made-up points and repositories for the tests of the log: no model, no clock."""

import os
import subprocess
from pathlib import Path

from fastllama.lab.points import figures
from fastllama.lab.records import digest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ENVIRONMENT = {"cpu": "Example CPU", "threads": 2, "torch": "2.13.0"}
WHOLE_ENVIRONMENT = {
    "cores": 2,
    "usable_cores": 2,
    "interop_threads": 2,
    "cpu_capability": "AVX2",
    "cpu_bf16": False,
    "governor": None,
    "ram_gb": 16.0,
    **dict.fromkeys(("gpu", "gpu_memory_gb", "gpu_driver", "gpu_power_limit", "cuda")),
    "os": "Linux 6.1 x86_64",
    "python": "3.11.7",
    **dict.fromkeys(("transformers", "accelerate", "tokenizers", "safetensors"), "1.0.0"),
    "compiler": None,
    "memory_from": "anonymous memory",
    "flags": {"float32_matmul_precision": {"value": "high", "default": "highest"}},
    "variables": {"OMP_NUM_THREADS": "2", "LD_PRELOAD": "(path)"},
}


def runs(speed: float, new_tokens: int = 200, spread: float = 0.01) -> list[dict]:
    """Three samples whose median decode speed of one row is `speed`, a share `spread` apart."""
    return [
        {"total_s": 0.5 + (new_tokens - 1) / value, "first_s": 0.5}
        for value in (speed * (1 - spread), speed, speed * (1 + spread))
    ]


def measured(samples: list[dict], batch_size: int, new_tokens: int, **fields) -> dict:
    return {
        "path": "preallocated, no",
        **figures.summary(samples, batch_size, new_tokens),
        "max_mem_mb": 400.0,
        "max_reserved_mb": None,
        "load_s": 0.5,
        "warmup_s": 0.25,
        "runs": samples,
        "hash": "0d6aa042",
        **fields,
    }


def current(old: dict) -> dict:
    """A point or record of schema 2, sealed, with the content of one of schema 1."""
    made = {**old, "schema": 2, "prompt_hash": "42c9c303", "mapped_weights_mb": None, "max_reserved_mb": 900.0}
    made["cache_length"] = old["cache_length"] or old["prompt_length"] + old["new_tokens"]
    made["environment"] = {**WHOLE_ENVIRONMENT, **old["environment"]}
    made["switch_defaults"] = {**old["switches"], "preallocate": False, "compile": "no"}
    made.setdefault("source_sha256", "ab" * 32)
    if made["baseline"] is not None:
        made["baseline"] = {**old["baseline"], "max_reserved_mb": 800.0, "mapped_weights_mb": None}
        made["baseline"]["hash"] = made["reference_hash"]
    made["switch_defaults"] |= {name: None for name in ("weights", "cache_k", "cache_v") if name in made["switches"]}
    if made["hash"] != made["reference_hash"] and made["first_divergence"] is None:
        made["first_divergence"] = {"row": 0, "position": 0, "margin": 1e-5}
    row = made["row_tok_per_s"]
    made["step_bytes"] = 10**8 if row is None else round(old["read_gb_per_s"] * 1e9 / row)
    made["read_gb_per_s"] = None if row is None else made["step_bytes"] * row / 1e9
    made["ceiling_runs_gb_per_s"] = [old["ceiling_gb_per_s"]] * 3
    made["ceiling_fraction"] = None if row is None else made["read_gb_per_s"] / made["ceiling_gb_per_s"]
    return digest.seal(made)


def point(speed: float = 40.0, vanilla: float | None = 20.0, spread: float = 0.01, **fields) -> dict:
    """A point that follows the schema, at `speed` tok/s a row; vanilla=None makes it vanilla's own."""
    batch_size, new_tokens = fields.pop("batch_size", 1), fields.pop("new_tokens", 200)
    switches = {"preallocate": vanilla is not None, "compile": "no", "bucket": 256, "fuse": "all"}
    switches.update(fields.pop("switches", {}))
    made = {
        "schema": 1,
        "model": "demo",
        "dtype": "fp32",
        "device": "cpu",
        "batch_size": batch_size,
        "prompt_length": 1000,
        "new_tokens": new_tokens,
        "cache_length": 1200,
        "seed": 0,
        "switches": switches,
        **measured(runs(speed, new_tokens, spread), batch_size, new_tokens),
        "compile_s": 0.0,
        "reference_hash": "0d6aa042",
        "parity": "exact",
        "first_divergence": None,
        "recompiles_after_warmup": 0,
        "baseline": None,
        "speedup": 1.0,
        "decode_speedup": 1.0,
        "read_gb_per_s": 4.0,
        "ceiling_gb_per_s": 8.0,
        "ceiling_fraction": 0.5,
        "distinct_tokens": 50,
        "text_sample": "def f(x):",
        "environment": dict(ENVIRONMENT),
        "command": "python run_llama.py",
    }
    if vanilla is None:
        made.update(parity="reference", path="vanilla", cache_length=None)
    else:
        # Reversed, so that what is fast in one is not fast in the other: ratios spread by twice `spread`.
        baseline = measured(runs(vanilla, new_tokens, spread)[::-1], batch_size, new_tokens, path="vanilla")
        made["baseline"] = baseline
        made["speedup"] = made["tok_per_s"] / baseline["tok_per_s"]
        decode = made["decode_tok_per_s"]
        made["decode_speedup"] = None if decode is None else decode / baseline["decode_tok_per_s"]
    made.update(fields)
    return made


def fake_record(number: int = 1, what: str = "a change", commit: str = COMMIT, speed: float = 40.0, **fields) -> dict:
    return {
        "id": f"{number:03d}-{commit[:7]}",
        "what": what,
        "prediction": None,
        "prediction_committed": None,
        "commit": commit,
        "source_sha256": "ab" * 32,
        "recorded_at": "2026-01-31T12:00:00+00:00",
        **point(speed, **fields),
    }


SCORE = {
    "perplexity": 41.0,
    "reference_perplexity": 40.0,
    "mean_kl": 0.0123,
    "p99_kl": 0.25,
    "top1_agreement": 0.9375,
    "positions": 4096,
}


def lossy_record(number: int = 1, what: str = "fewer bits", switches: dict | None = None, **fields) -> dict:
    """A record of schema 2 of a point with a lossy switch, int8 weights if no other is named, and its score."""
    fields = {"parity": "lossy", "reference_hash": "00000000", "score": dict(SCORE), "not_scored": None} | fields
    return current(fake_record(number, what, switches=switches or {"weights": "int8"}, **fields))


def git(root: Path, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", *identity, "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()


def make_tree(root: Path) -> Path:
    """A small copy of what the repository looks like, without git."""
    (root / "fastllama" / "demo").mkdir(parents=True)
    (root / "run_llama.py").write_text("print('run')\n")
    (root / "setup.py").write_text("# setup\n")
    (root / "fastllama" / "__init__.py").write_text("")
    (root / "fastllama" / "demo" / "model.safetensors").write_bytes(bytes(range(200)))
    return root


def make_repository(root: Path) -> str:
    """make_tree, committed; returns the sha."""
    make_tree(root)
    (root / ".gitignore").write_text("__pycache__/\nevents.out.tfevents.*\n")
    git(root, "init", "-q", "-b", "main")
    return commit(root)


def commit(root: Path) -> str:
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "a change")
    return git(root, "rev-parse", "HEAD")
