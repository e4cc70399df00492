"""World: the processes of one run, as `accelerate launch` or `torchrun` started them.

They talk in two groups: one for tensors, in which a message that does not come within a minute ends the run, and one
for words, in which a process may wait for hours for another that loads or generates. A process that ends closes its
connections, which the others notice at once in both.
"""

import contextlib
import io
import os
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from transformers.utils import logging

_MESSAGE = timedelta(seconds=50)  # between processes that take the same steps
_WORK = timedelta(days=7)  # of one process alone
_LOST = re.compile(r"gloo|Connection (closed|reset)|Timed out|Broken pipe|Socket|NCCL", re.IGNORECASE)


class Lost(RuntimeError):
    """Another process of the run has ended, or does not answer."""


@dataclass(frozen=True)
class World:
    """`size` processes, of which this one is number `rank`. `tensor_parallel`: they hold one model together."""

    size: int = 1
    rank: int = 0
    tensor_parallel: bool = False
    words: "dist.ProcessGroup | None" = None

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def of_first(self, value):
        """The first process's value, in every process."""
        if self.size == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, group_src=0, group=self.words)
        return held[0]

    def of_all(self, value) -> list:
        """Every process's value, by number."""
        if self.size == 1:
            return [value]
        held = [None] * self.size
        dist.all_gather_object(held, value, group=self.words)
        return held


ALONE = World()
_words = None  # this process's group for words, once it has joined a run


def meet() -> None:
    """Waits, for hours if it must be, until every process of the run is here; alone, nothing."""
    if _words is not None:
        dist.barrier(group=_words)


def of_peers(value) -> list:
    """The value of every process that holds the model which is being measured, by number; alone, its own."""
    if not dist.is_available() or not dist.is_initialized():
        return [value]
    held = [None] * dist.get_world_size()
    dist.all_gather_object(held, value, group=_words)
    return held


def asked_size() -> int:
    """How many processes the launcher says there are."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def _launched_alone() -> bool:
    """Whether accelerate was asked for several processes, and left starting them to others."""
    return os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_PORT" in os.environ


def _join(tensor_parallel: bool) -> World:
    from accelerate import PartialState

    global _words

    on_cpu = not torch.accelerator.is_available()
    # Processes that share nothing but a list of prompts need no accelerator to talk.
    state = PartialState(cpu=on_cpu or not tensor_parallel, timeout=_MESSAGE)
    if not on_cpu and not tensor_parallel:
        torch.accelerator.set_device_index(state.local_process_index)
    _words = dist.new_group(backend="gloo", timeout=_WORK)
    return World(state.num_processes, state.process_index, tensor_parallel, _words)


def _stop(*_):
    raise Lost("the launcher ended it")


def is_lost(fault: BaseException) -> bool:
    """Whether a failure is that of another process of the run."""
    if _words is None and not isinstance(fault, Lost):
        return False
    if isinstance(fault, (Lost, dist.DistError)):
        return True
    return isinstance(fault, RuntimeError) and _LOST.search(str(fault)) is not None


@contextlib.contextmanager
def joined(tensor_parallel: bool, splits: bool) -> Iterator[World]:
    """The processes of this run; this one alone where no launcher says otherwise, and then nothing is changed.

    `splits`: the work is divided between them. Only the first prints. A process that ends, or does not answer within a
    minute, ends all: in one sentence, with exit code 2. Raises `ValueError` for what several processes, or one, cannot
    do.
    """
    size = asked_size()
    if size == 1:
        if tensor_parallel:
            raise ValueError(
                "--tensor-parallel spreads a model over processes, and this is one: start it with "
                "torchrun --nproc-per-node N run_llama.py --tensor-parallel"
            )
        if splits and _launched_alone():
            print(
                "accelerate launch --cpu starts one process, whatever --num_processes says, unless mpirun starts them: "
                "torchrun --nproc-per-node N run_llama.py, or accelerate launch --multi_gpu, starts N on a CPU too",
                file=sys.stderr,
            )
        yield ALONE
        return
    if not tensor_parallel and not splits:
        raise ValueError(
            f"{size} processes were started: give them --prompts and --out to split, or --tensor-parallel to hold one "
            "model together"
        )
    before = signal.signal(signal.SIGTERM, _stop)
    here = World(size, int(os.environ["RANK"]), tensor_parallel)
    try:
        here = _join(tensor_parallel)
        with _silent(not here.first):
            yield here
        here.of_all(None)  # nobody leaves while another is at work
    except (Exception, KeyboardInterrupt) as fault:
        if is_lost(fault):
            _leave(here, splits)
        if not here.first and isinstance(fault, ValueError):  # what was asked is wrong: the first process says so
            os._exit(2)
        raise
    signal.signal(signal.SIGTERM, before)
    dist.destroy_process_group()


@contextlib.contextmanager
def _silent(wanted: bool) -> Iterator[None]:
    """Within it nothing is printed, if so `wanted`."""
    if not wanted:
        yield
        return
    logging.set_verbosity_error()
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def _leave(here: World, splits: bool) -> None:
    """Ends this process in one sentence; groups with a process that is gone could hold it up for ever."""
    kept = "; results that were written are kept, and the same command goes on from them" if splits else ""
    print(
        f"error: another of the {here.size} processes of this run has ended or does not answer: process {here.rank} "
        f"ends too{kept}",
        file=sys.__stderr__,
        flush=True,
    )
    os._exit(2)
