"""lm-eval on our class: the command of README, with a task that needs no download."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest

import fastllama
from fastllama.demo.names import demo_folder
from fastllama.lab.records.sources import ROOT

pytest.importorskip("lm_eval", reason='lm_eval is not installed: pip install "lm_eval[hf]"')

_TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8}}
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
metadata: {{version: 1.0}}
"""


@pytest.fixture(scope="module")
def language_model():
    from lm_eval.models.huggingface import HFLM

    fastllama.register()
    try:
        yield HFLM(pretrained=str(demo_folder("target")), dtype="float32", device="cpu", batch_size=2)
    finally:
        fastllama.unregister()


def instance(kind: str, *arguments):
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_its_model_is_ours_and_generates_on_the_fast_path(language_model):
    assert type(language_model.model) is fastllama.LlamaForCausalLM
    until = {"until": ["\n\n"], "max_gen_toks": 12}
    text = language_model.generate_until([instance("generate_until", "import os\nimport ", until)], disable_tqdm=True)
    assert len(text) == 1 and language_model.model.path.startswith("preallocated on first use")


def test_log_likelihoods_are_those_of_forward(language_model):
    import torch

    found = language_model.loglikelihood([instance("loglikelihood", "def f(x", "):")], disable_tqdm=True)
    context, whole = (
        language_model.tokenizer(text, return_tensors="pt").input_ids for text in ("def f(x", "def f(x):")
    )
    with torch.no_grad():
        logits = language_model.model(whole).logits[0].log_softmax(-1)
    places = range(context.shape[1], whole.shape[1])
    assert found[0][0] == pytest.approx(sum(logits[place - 1, whole[0, place]].item() for place in places), abs=1e-3)


def test_the_command_of_readme_runs(tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r'python -c "(import fastllama; fastllama\.register\(\);.*?)"', readme)[1]
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "import os\nimport ", "answer": "sys"}) + "\n")
    tasks = {"tiny_likelihood": ("loglikelihood", "acc"), "tiny_generation": ("generate_until", "exact_match")}
    for name, (kind, metric) in tasks.items():
        content = _TASK.format(name=name, kind=kind, metric=metric, data=data)
        (tmp_path / f"{name}.yaml").write_text(content)
    words = f"run --model hf --model_args pretrained={shlex.quote(str(demo_folder('target')))},dtype=float32"
    words += f" --tasks {','.join(tasks)} --include_path {shlex.quote(str(tmp_path))} --device cpu"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code, *shlex.split(words)], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(name in done.stdout for name in tasks)
