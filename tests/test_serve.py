"""fastllama serve: OpenAI's API, asked through a real client, answered by our class on its fast path."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import pytest
import torch
import transformers
from transformers import AutoTokenizer

import fastllama
from fastllama import FastConfig
from fastllama.lab.cli import serve
from fastllama.lab.cli.command import main
from tests.interruptions import heed
from tests.test_at_home import CHATS, with_template

NEW = 12
FAST = (  # the demo's head is large enough for huge pages, where the system gives them
    r"generated: preallocated on first use, no compile, fused qkv, gate\+up, "
    r"products: 25 stock(, 1 in huge pages)?, cache q8_0/q8_0"
)


class Server:
    """`fastllama serve` in a process of its own, on a port that the system chose."""

    def __init__(self, *arguments: str):
        command = [sys.executable, "-m", "fastllama", "serve", *arguments, "--host", "127.0.0.1", "--port", "0"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = subprocess.Popen([*command, "--device", "cpu"], **pipes, env=environment, preexec_fn=heed)
        self.lines, self._ready = [], threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self._ready.wait(timeout=600)
        found = re.search(r"running on (http://127\.0\.0\.1:\d+)", self.said())
        if found is None:
            self.stop()
            pytest.fail(f"the server did not start: {self.said()}")
        self.address = found[1]

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line)
            if "running on" in line:
                self._ready.set()
        self._ready.set()

    def said(self) -> str:
        return "".join(self.lines)

    def stop(self) -> int:
        """Ctrl-C; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            code = self.process.wait(timeout=600)
        finally:
            self.process.kill()
            self._reader.join()
        return code


def require_packages() -> None:
    for name in ("fastapi", "uvicorn", "openai", "pydantic"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install fastllama[serve]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return with_template(tmp_path_factory.mktemp("served") / "demo")


@pytest.fixture(scope="module")
def server(folder):
    require_packages()
    started = Server("--fast", "cache_k=q8_0,cache_v=q8_0,products=stock", "--dtype", "float32")
    yield started
    if started.process.poll() is None:
        started.stop()


@pytest.fixture(scope="module")
def expected(folder):
    """What a model with those switches writes, by the text of the prompt."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    fast = FastConfig(cache_k="q8_0", cache_v="q8_0", products="stock")
    model = fastllama.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, fast=fast)

    def write(prompt) -> str:
        if isinstance(prompt, str):
            inputs = tokenizer(prompt, return_tensors="pt")
        else:
            options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
            inputs = tokenizer.apply_chat_template(prompt, **options)
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=NEW)[0, inputs["input_ids"].shape[1] :]
        return tokenizer.decode(ids, skip_special_tokens=True)

    return write


def test_chat_through_openais_client(server, folder, expected):
    openai = pytest.importorskip("openai", reason="openai is not installed: pip install fastllama[serve]")
    client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", timeout=600, max_retries=0)
    before = len(re.findall(FAST, server.said()))
    asked = {"model": str(folder), "messages": CHATS[0], "max_tokens": NEW, "temperature": 0}
    answer = client.chat.completions.create(**asked)
    assert answer.choices[0].message.content == expected(CHATS[0])
    assert answer.usage.completion_tokens == NEW
    pieces = [chunk.choices[0].delta.content for chunk in client.chat.completions.create(**asked, stream=True)]
    pieces = [piece for piece in pieces if piece]
    assert "".join(pieces) == expected(CHATS[0]) and len(pieces) > 3
    assert len(re.findall(FAST, server.said())) == before + 2, server.said()


def test_raw_requests(server, folder, expected):
    def ask(what: str, **body) -> dict:
        content = json.dumps({"model": str(folder), "max_tokens": NEW, "temperature": 0, **body}).encode()
        request = urllib.request.Request(f"{server.address}/v1/{what}", content, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)

    assert ask("chat/completions", messages=CHATS[1])["choices"][0]["message"]["content"] == expected(CHATS[1])
    text = "import os\nimport "
    try:
        assert ask("completions", prompt=text)["choices"][0]["text"] == expected(text)
    except urllib.error.HTTPError as fault:
        assert fault.code == 404  # an older transformers has no such address


def test_ctrl_c_ends_it(server):
    """The last test of this file: the server is gone afterwards."""
    assert server.stop() == 130, server.said()
    assert "Traceback" not in server.said()


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--fast"], "--fast needs a value"),
        (["--colour"], "--colour"),
        (["--fast", "native"], "--fast 'native' is not NAME=VALUE"),
        (["--fast=speed=1"], "--fast has no switch 'speed'; there are compile, "),
        (["--fast", "compile=fast"], "compile"),
        (["--fast", "bucket=16", "--fast", "bucket=32"], "--fast gives bucket twice"),
    ],
)
def test_what_is_wrong_is_one_sentence(capsys, argv, words):
    require_packages()
    assert main(["serve", *argv]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1 and words in said.err


def test_help_is_ours_and_theirs(capsys):
    require_packages()
    assert main(["serve", "--help"]) == 0
    said = capsys.readouterr().out
    assert "--fast NAME=VALUE" in said and "--port" in said
    assert transformers.LlamaForCausalLM is not fastllama.LlamaForCausalLM


def test_a_missing_package_is_named(capsys, monkeypatch):
    from transformers.utils import import_utils

    monkeypatch.setattr(import_utils, "is_fastapi_available", lambda: False)
    assert main(["serve"]) == 2
    assert "serve needs fastapi: pip install fastapi" in capsys.readouterr().err


def test_switches_are_read(capsys):
    assert serve.config([]) is None
    found = serve.config(["compile=native", "cache-k=q8_0", "bucket=64", "context_shift=true"])
    assert found == FastConfig(compile="native", cache_k="q8_0", bucket=64, context_shift=True)
