"""New processes that import nothing: forked from one that has imported everything, once for all tests of a worker.

For tests that ask what a program does. What a fresh interpreter does is asked of a fresh interpreter.
"""

import atexit
import functools
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import types
from pathlib import Path

from tests.interruptions import heed

ROOT = Path(__file__).resolve().parent.parent
_IMPORTED = (
    "transformers.generation.utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "fastllama.llama",
    "fastllama.lab.__main__",
    "fastllama.lab.cli.command",
    "fastllama.lab.memory.memory",
    "fastllama.lab.tracing.phases",
    "run_llama",
)
_NUMBER = 8  # bytes of each number that is sent


@functools.cache
def _server() -> str:
    """Where the process that is forked listens; it ends with this one."""
    place = tempfile.TemporaryDirectory()
    address = f"{place.name}/forked"
    command = [sys.executable, "-m", "tests.forked", address]
    server = _Plain(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    assert server.stdout.readline() == b"ready\n", "the process that is to be forked did not start"

    def end() -> None:
        server.stdin.close()
        server.wait()
        server.stdout.close()
        place.cleanup()

    atexit.register(end)
    return address


_Plain = subprocess.Popen  # the class itself, whatever a test puts in its place


class Popen(_Plain):
    """As subprocess's, and forked where the command is one of this interpreter: -c CODE, -m MODULE or a script."""

    _connection: socket.socket | None = None

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
        words = [os.fspath(word) for word in args]
        if words[0] != sys.executable or sys.platform != "linux":
            return super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)
        assert preexec_fn in (None, heed) and not pass_fds
        pipes = rest[3:9]  # of standard input, output and error: the end to read from, and the one to write to
        given = [standard if fd == -1 else fd for standard, fd in enumerate((pipes[0], pipes[3], pipes[5]))]
        job = {"words": words[1:], "cwd": os.fspath(cwd or os.getcwd()), "env": dict(env or os.environ)}
        job["session"] = rest[14]  # whether it begins one
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(_server())
        content = json.dumps(job).encode()
        socket.send_fds(self._connection, [len(content).to_bytes(_NUMBER, "big")], given)
        self._connection.sendall(content)
        self.pid = _received(self._connection)
        self._child_created = True
        self._close_pipe_fds(*pipes)

    def _try_wait(self, wait_flags):
        if self._connection is None:
            return super()._try_wait(wait_flags)
        if wait_flags & os.WNOHANG and not select.select([self._connection], [], [], 0)[0]:
            return 0, 0
        status = _received(self._connection)
        self._connection.close()
        return self.pid, status

    def _internal_poll(self, *given, **named):
        if self._connection is None:
            return super()._internal_poll(*given, **named)
        if self.returncode is None:
            pid, status = self._try_wait(os.WNOHANG)
            if pid:
                self._handle_exitstatus(status)
        return self.returncode


def _received(connection: socket.socket) -> int:
    found = connection.recv(_NUMBER, socket.MSG_WAITALL)
    assert len(found) == _NUMBER, "the process that is forked is gone"
    return int.from_bytes(found, "big")


# in the process that is forked


def _jobs(listening: socket.socket) -> dict:
    """Returns in each process that is asked for, with what it is to run."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
    while True:
        if sys.stdin in select.select([listening, sys.stdin], [], [])[0]:
            os._exit(0)
        connection = listening.accept()[0]
        if os.fork() == 0:
            listening.close()
            return _job(connection)
        connection.close()


def _job(connection: socket.socket) -> dict:
    """Returns in the process that is to run it; the one that was forked for that waits for its end, and tells."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, given, _, _ = socket.recv_fds(connection, _NUMBER, 3)
    left, content = int.from_bytes(size, "big"), b""
    while len(content) < left:
        part = connection.recv(left - len(content))
        if not part:
            os._exit(1)  # who asked is gone
        content += part
    pid = os.fork()
    if pid == 0:
        connection.close()
        for standard, fd in enumerate(given):
            os.dup2(fd, standard)
            os.close(fd)
        return json.loads(content)
    for fd in given:
        os.close(fd)
    connection.sendall(pid.to_bytes(_NUMBER, "big"))
    connection.sendall(os.waitpid(pid, 0)[1].to_bytes(_NUMBER, "big"))
    os._exit(0)


def _run(words: list[str], cwd: str, env: dict, session: bool) -> None:
    """As an interpreter that was started so, which heeds signals."""
    import torch

    signal.signal(signal.SIGINT, signal.default_int_handler)
    if session:
        os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(int(env.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))
    sys.path[0:1] = ["", *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), vars(sys.modules["__main__"]))
    else:
        sys.argv, sys.path[0] = words, os.path.dirname(words[0])
        runpy.run_path(words[0], run_name="__main__")


def _main(address: str) -> None:
    for name in _IMPORTED:
        importlib.import_module(name)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    print("ready", flush=True)
    _run(**_jobs(listening))


if __name__ == "__main__":
    _main(sys.argv[1])
