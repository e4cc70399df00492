"""Several threads on one model: right texts or one clear error, never a mixture; and no call waits for itself."""

import copy
import io
import os
import subprocess
import sys
import threading

import pytest
import torch

from fastllama import Generated, LlamaForCausalLM
from fastllama.decode import turn
from tests import tiny

NEW = 6
THREADS, ROUNDS = 4, 12
INPUTS = [tiny.prompt("one", 4 + 3 * index, seed=index) for index in range(THREADS)]


@pytest.fixture(scope="module")
def models():
    vanilla, ours = tiny.pair()
    return vanilla, ours, tiny.pair(seed=3, num_hidden_layers=1)[1]


@pytest.fixture(scope="module")
def expected(models):
    return [models[0].generate(**inputs, max_new_tokens=NEW, do_sample=False) for inputs in INPUTS]


def together(work, count: int = THREADS) -> None:
    """`work(index)` in so many threads, which begin at once; raises what any of them raises."""
    barrier, faults = threading.Barrier(count), []

    def run(index: int) -> None:
        try:
            barrier.wait()
            work(index)
        except BaseException as fault:
            faults.append(fault)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    if faults:
        raise faults[0]


def greedy(model, index: int, **asked) -> torch.Tensor:
    return model.generate(**INPUTS[index], max_new_tokens=NEW, do_sample=False, **asked)


@pytest.mark.parametrize("switches", [None, {"products": "packed"}, {"compile": "native"}], ids=str)
def test_every_thread_gets_its_own_text(models, expected, switches):
    ours = models[1]
    if switches is not None:
        ours.preallocate(1, 32, **switches)

    def work(index: int) -> None:
        for _ in range(ROUNDS):
            assert torch.equal(greedy(ours, index), expected[index])

    together(work)
    assert ours.path.startswith("preallocated") and not ours._engine.turn.is_taken()
    ours.free()


def test_everything_at_once(models, expected):
    """generate in every way, many prompts, reservations, freeing, moves, and reads of packed weights."""
    _, ours, draft = models
    draft.generation_config.num_assistant_tokens = 3
    lists = [inputs["input_ids"][0].tolist() for inputs in INPUTS]
    values = {name: tensor.clone() for name, tensor in ours.state_dict().items()}

    def work(index: int) -> None:
        for round in range(ROUNDS):
            kind = (index + round) % 4
            if kind == 0:
                assert torch.equal(greedy(ours, index, assistant_model=draft), expected[index])
                ours.preallocate(3, 32, products="packed")
            elif kind == 1:
                found = ours.generate_many(lists, slots=2, max_new_tokens=NEW, do_sample=False)
                assert all(isinstance(each, Generated) for each in found)
                texts = [torch.tensor([[*ids, *each.ids]]) for ids, each in zip(lists, found, strict=True)]
                assert all(torch.equal(text, right) for text, right in zip(texts, expected, strict=True))
            elif kind == 2:
                assert torch.equal(greedy(draft, index), draft_texts[index])
                held = ours.state_dict()
                assert all(torch.equal(held[name], tensor) for name, tensor in values.items())
                ours.to(torch.float32)
            else:
                assert torch.equal(greedy(ours, index), expected[index])
                ours.free()

    draft_texts = [greedy(draft, index) for index in range(THREADS)]
    together(work)
    ours.free()


def test_two_models_that_draft_for_each_other_do_not_lock_each_other_out(models, expected):
    _, ours, other = models
    right = [expected[0], greedy(other, 0)]

    def work(index: int) -> None:
        pair = (ours, other) if index % 2 == 0 else (other, ours)
        for _ in range(ROUNDS):
            assert torch.equal(greedy(pair[0], 0, assistant_model=pair[1]), right[index % 2])

    together(work, 2)


@pytest.mark.parametrize("compile", ["no", "native"])
def test_own_loops_are_right_or_are_told(models, compile):
    """Each thread prefills and steps; nobody's step continues another's text."""
    _, ours, _ = models
    ours.preallocate(1, 32, compile=compile)
    tokens = torch.tensor([[7], [9], [11]])

    def loop(index: int) -> torch.Tensor:
        parts = [ours.prefill(**INPUTS[index])]
        return torch.cat(parts + [ours.step(token[None])[:, -1] for token in tokens])

    right = [loop(index) for index in range(THREADS)]
    told = []

    def work(index: int) -> None:
        for _ in range(ROUNDS):
            try:
                assert torch.equal(loop(index), right[index])
            except ValueError as fault:
                assert "another thread's call has used the cache since" in str(fault)
                told.append(index)

    together(work)
    # One after the other, for certain.
    ours.prefill(**INPUTS[0])
    together(lambda index: ours.generate(**INPUTS[1], max_new_tokens=2, do_sample=False), 1)
    with pytest.raises(ValueError, match="another thread's call has used the cache since"):
        ours.step(tokens[0][None])
    ours.free()


def test_a_text_may_be_handed_to_a_thread_that_has_none(models):
    _, ours, _ = models
    steps = [ours.prefill(**INPUTS[0]), ours.step(torch.tensor([[7]])), ours.step(torch.tensor([[9]]))]
    ours.prefill(**INPUTS[0])
    found = []
    together(lambda index: found.append(ours.step(torch.tensor([[7]]))), 1)
    found.append(ours.step(torch.tensor([[9]])))
    assert all(torch.equal(a, b) for a, b in zip(found, steps[1:], strict=True))


class Inside:
    """A streamer that does something with the model that it streams from."""

    def __init__(self, work):
        self.work, self.found, self.puts = work, [], 0

    def put(self, ids) -> None:
        self.puts += 1
        if self.puts > 1:  # the first brings the prompt, before anything is generated
            self.found.append(self.work())

    def end(self) -> None:
        """Nothing is kept back."""


REFUSED = {
    "prefill": lambda model: model.prefill(**INPUTS[1]),
    "step": lambda model: model.step(torch.tensor([[5]])),
    "generate_many": lambda model: model.generate_many([[3, 4, 5]], max_new_tokens=2),
    "preallocate": lambda model: model.preallocate(1, 32),
    "free": lambda model: model.free(),
    "moving or casting the model": lambda model: model.to(torch.float64),
    "load_state_dict": lambda model: model.load_state_dict(model.state_dict()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_call_within_a_call_is_refused_in_one_sentence(models, expected, name):
    ours = models[1]

    def work() -> str:
        with pytest.raises(ValueError) as fault:
            REFUSED[name](ours)
        return str(fault.value)

    streamer = Inside(work)
    assert torch.equal(greedy(ours, 0, streamer=streamer), expected[0])
    assert set(streamer.found) == {
        f"{name}{'()' * (name in ('prefill', 'step'))} cannot run: another call is using the cache"
    }


def test_generate_within_generate_is_right(models, expected):
    _, ours, draft = models
    streamer = Inside(lambda: greedy(ours, 1))
    assert torch.equal(greedy(ours, 0, streamer=streamer), expected[0])
    streamer.found += (inside := Inside(lambda: greedy(ours, 1))).found
    assert torch.equal(greedy(ours, 0, assistant_model=draft, streamer=inside), expected[0])
    assert all(torch.equal(text, expected[1]) for text in (*streamer.found, *inside.found)) and inside.found


def test_calls_within_calls_of_two_threads_end(models, expected):
    """Each streams from one model and asks the other: neither waits for the other."""
    _, ours, other = models
    right = {ours: expected[0], other: greedy(other, 0)}

    def work(index: int) -> None:
        one, two = (ours, other) if index == 0 else (other, ours)
        for _ in range(3):
            streamer = Inside(lambda: greedy(two, 0))
            assert torch.equal(greedy(one, 0, streamer=streamer), right[one])
            assert all(torch.equal(text, right[two]) for text in streamer.found)

    together(work, 2)


def test_one_that_waits_within_a_call_is_refused(models):
    """A step within a call of another model, while a third thread has the turn, is told instead of waiting."""
    _, ours, other = models
    has, may_go = threading.Event(), threading.Event()

    def hold() -> None:
        has.set()
        may_go.wait()

    thread = threading.Thread(target=lambda: turn.in_turn([other._engine.turn], hold), daemon=True)
    thread.start()
    has.wait()

    def work() -> None:
        with pytest.raises(
            ValueError, match="another thread is using the model, and a call within a call does not wait"
        ):
            other.prefill(**INPUTS[0])

    try:
        greedy(ours, 0, streamer=Inside(work))
    finally:
        may_go.set()
        thread.join()


def test_copies_have_turns_of_their_own(models, expected):
    ours = models[1]
    greedy(ours, 0)
    file = io.BytesIO()
    found = []

    def work() -> None:
        torch.save(ours, file)
        twin = copy.deepcopy(ours)
        found.append(greedy(twin, 1))
        assert twin.path.startswith("preallocated on first use")

    assert torch.equal(greedy(ours, 0, streamer=Inside(lambda: work() if not found else None)), expected[0])
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded, LlamaForCausalLM)
    assert torch.equal(found[0], expected[1]) and torch.equal(greedy(loaded, 1), expected[1])


FORK = """
import os, threading
import torch
torch.set_num_threads(1)
from tests import tiny
from tests.test_threads import INPUTS, Inside, greedy
ours = tiny.pair()[1]
right = greedy(ours, 0)
has, may_go = threading.Event(), threading.Event()

def pause():
    has.set()
    may_go.wait()

def child():
    pid = os.fork()
    if pid == 0:
        os._exit(0 if torch.equal(greedy(ours, 0), right) else 3)
    return os.waitpid(pid, 0)[1]

# Another thread is in the middle of a call, which in the child nobody ends.
thread = threading.Thread(target=lambda: greedy(ours, 1, streamer=Inside(pause)))
thread.start()
has.wait()
print("beside a call:", child())
may_go.set()
thread.join()
streamer = Inside(child)
greedy(ours, 1, streamer=streamer)
print("within a call:", set(streamer.found))
"""


def test_a_forked_process_waits_for_nobody():
    done = subprocess.run(
        [sys.executable, "-c", FORK],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "beside a call: 0\nwithin a call: {0}\n"
