"""Several processes that hold one model: `run(task, count, folder)` starts them, and gives what each returned.

The processes are forked from one that has imported everything, once: `python -m tests.processes` is that one.
"""

import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path

from tests import forked

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def environment(**more) -> dict:
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1", **more}


def run(module: str, folder: Path, counts: tuple[int, ...]) -> dict[int, list[dict]]:
    """What `module.work(folder)` returned in each of `count` processes that know each other, for every count."""
    command = [sys.executable, "-m", "tests.processes", module, str(folder), *map(str, counts)]
    pipe = subprocess.PIPE
    with forked.Popen(command, env=environment(), stdout=pipe, stderr=pipe, text=True) as process:
        out, err = process.communicate(timeout=900)
    assert process.returncode == 0, out + err
    import torch

    return {
        count: [torch.load(folder / f"{count}-{rank}.pt", weights_only=False) for rank in range(count)]
        for count in counts
    }


def _child(module, folder: Path, rank: int, count: int, port: str) -> None:
    import torch

    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in where.items()})
    torch.save(module.work(folder), Path(folder) / f"{count}-{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _main(name: str, folder: str, *counts: str) -> int:
    import importlib

    import torch

    torch.set_num_threads(1)
    module = importlib.import_module(name)
    failed = 0
    for count in map(int, counts):
        port, children = free_port(), []
        for rank in range(count):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    _child(module, Path(folder), rank, count, port)
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            children.append(child)
        failed |= max([os.waitpid(child, 0)[1] for child in children])
    return int(failed != 0)


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
