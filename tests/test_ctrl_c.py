"""Ctrl-C, sent as a signal to a command that has said on its standard output that it is generating."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests import forked
from tests.command import run
from tests.interruptions import heed

ROOT = Path(__file__).parent.parent
# run_llama.py writes its results without a word; here it says one for each.
TELLING = """
import sys
import run_llama
from fastllama.lab.prompts.results_file import Results
add = Results.add
def told(self, *how):
    add(self, *how)
    print("added", flush=True)
Results.add = told
sys.exit(run_llama.main(sys.argv[1:]))
"""


def interrupted(*words) -> subprocess.CompletedProcess:
    """Runs python, sends SIGINT at the first byte on standard output, and waits."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    child = forked.Popen(command, **pipes, env=environment, cwd=ROOT, preexec_fn=heed)
    try:
        first = child.stdout.read(1)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=600)
    finally:
        child.kill()
    return subprocess.CompletedProcess(command, child.returncode, (first + out).decode(), err.decode())


def test_fastllama_generate_ends_with_130():
    done = interrupted(
        "-m", "fastllama", "generate", "-p", "def main():", "-n", 3000, "--ignore-eos", "--dtype", "fp32"
    )
    assert done.returncode == 130, done.stderr
    assert done.stdout and "Traceback" not in done.stderr


def test_a_file_of_prompts_is_resumable(tmp_path, capsys):
    """What was finished is kept, and the same command makes the rest, once each."""
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"def f{n}():"}) + "\n" for n in range(20)))
    asked = ["--prompts", prompts, "--out", out, "--dtype", "fp32", "--device", "cpu", "--new-tokens", 48]
    done = interrupted("-c", TELLING, *asked, "--slots", 1)
    assert done.returncode == 130, done.stderr
    assert done.stderr.endswith("interrupted; what was measured is kept\n") and "Traceback" not in done.stderr
    partial = out.with_name("out.jsonl.partial")
    _, *kept = partial.read_text().splitlines()
    assert not out.exists() and 0 < len(kept) < 20
    assert run(*asked) == 0
    assert f"{len(kept)} of them done before" in capsys.readouterr().out
    lines = out.read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == list(range(20))
    assert set(kept) <= set(lines) and not partial.exists()
