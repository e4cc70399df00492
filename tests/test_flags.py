"""What was set by hand is in the record: torch's flags, the settings of the compiler, environment variables."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastllama.lab.measuring import flags
from fastllama.lab.measuring.environment import environment
from fastllama.lab.points.fields import check
from fastllama.lab.records import schema2


def test_a_flag_that_is_changed_is_told_with_its_default():
    before = flags.flags()
    assert "float32_matmul_precision" not in before and "deterministic_algorithms" not in before
    try:
        torch.set_float32_matmul_precision("high")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = True
        changed = flags.flags()
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False
    assert changed["float32_matmul_precision"] == {"value": "high", "default": "highest"}
    assert changed["deterministic_algorithms"] == {"value": True, "default": False}
    assert changed["cudnn.benchmark"] == {"value": True, "default": False}
    assert flags.flags() == before


def test_flush_denormal_is_seen():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        assert flags.flags()["flush_denormal"] == {"value": True, "default": False}
    finally:
        torch.set_flush_denormal(False)
    assert "flush_denormal" not in flags.flags()


def test_the_compilers_settings_are_told():
    import torch._dynamo.config as config

    default = config.recompile_limit
    with config.patch(recompile_limit=default + 5):
        assert flags.flags()["dynamo.recompile_limit"] == {"value": default + 5, "default": default}
    assert "dynamo.recompile_limit" not in flags.flags()


def test_what_has_no_plain_value_is_told_without_an_address():
    class Pass:
        pass

    assert flags._plain(Pass()).endswith("Pass") and flags._plain(len) == "len"
    assert flags._plain([Pass()]) == "(object)" and flags._plain({"a": 1}) == "{'a': 1}"
    assert flags._plain("/opt/cache") == "(path)" and flags._plain(7) == 7


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("OMP_NUM_THREADS", "4", "4"),
        ("KMP_AFFINITY", "granularity=fine,compact", "granularity=fine,compact"),
        ("LD_PRELOAD", "/usr/lib/libjemalloc.so.2", "(path)"),
        ("LD_PRELOAD", "libjemalloc.so.2", "libjemalloc.so.2"),
        ("TORCH_HOME", "~", "(path)"),
        ("TORCHINDUCTOR_CACHE_DIR", "C:\\cache", "(path)"),
        ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True", "expandable_segments:True"),
        ("CUDA_VISIBLE_DEVICES", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6,1", "(GPU),1"),
        ("NVIDIA_API_KEY", "abc", "(secret)"),
        ("MALLOC_CONF", "background_thread:true", "background_thread:true"),
        ("MKL_HOST", "node-17.example", "(host)"),
        ("ATEN_CPU_CAPABILITY", "avx2", "avx2"),
    ],
)
def test_variables_are_told_without_paths_hosts_and_secrets(monkeypatch, name, value, told):
    monkeypatch.setattr(platform, "node", lambda: "node-17")
    assert flags.variables({name: value, "HOME": "/root", "PATH": "/bin", "USER": "me"}) == {name: told}


def test_the_environment_is_whole():
    facts = environment(torch.device("cpu"))
    check(facts, schema2.ENVIRONMENT, closed=True)
    assert facts["interop_threads"] == torch.get_num_interop_threads() and facts["gpu"] is None
    assert json.loads(json.dumps(facts)) == facts


def test_a_new_process_tells_what_it_was_started_with(tmp_path):
    code = (
        "import json, torch; from fastllama.lab.measuring.environment import environment; "
        "torch.set_num_interop_threads(3); print(json.dumps(environment(torch.device('cpu'))))"
    )
    given = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "KMP_BLOCKTIME": "0",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "here"),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent.parent, env=given, capture_output=True, text=True
    )
    facts = json.loads(done.stdout)
    assert facts["threads"] == 1 and facts["interop_threads"] == 3
    assert facts["variables"]["KMP_BLOCKTIME"] == "0" and facts["variables"]["TORCHINDUCTOR_CACHE_DIR"] == "(path)"
    assert str(tmp_path) not in done.stdout
