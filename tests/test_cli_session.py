"""--interactive: the cache is kept between turns, and the text is that of the whole."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

import fastllama
from fastllama import demo
from fastllama.lab.cli import chat, turns
from fastllama.lab.cli.chooser import Chooser
from fastllama.lab.cli.interrupt import Interrupt
from fastllama.lab.cli.session import Session
from tests import tiny
from tests.cli import generate

GREEDY = fastllama.Sampling(temperature=0.0)
TURNS = [[1, 50, 60, 70], [80], list(range(100, 130)), [7, 8]]
NOT_STOPPED = lambda: False  # noqa: E731
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def models():
    return tiny.pair(max_position_embeddings=512)


class Counted:
    """A model whose passes are counted: how many tokens each brought."""

    def __init__(self, model):
        self.model, self.device, self.passes = model, model.device, []

    def prefill(self, ids):
        self.passes.append(("prefill", ids.shape[1]))
        return self.model.prefill(ids)

    def step(self, ids):
        self.passes.append(("step", ids.shape[1]))
        return self.model.step(ids)


def session_of(model, sampling=GREEDY, length=256, eos=(), **switches) -> Session:
    config = fastllama.FastConfig(**switches)
    model.preallocate(batch_size=1, cache_length=length, config=config)
    return Session(Counted(model), Chooser(sampling), eos, length, config)


def answered(session: Session, turn: list[int], limit: int | None = 9, stopped=NOT_STOPPED) -> tuple[list[int], str]:
    made = []
    return made, session.answer(turn, limit, made.append, stopped)


# the text of the whole


@pytest.mark.parametrize(
    "switches", [{}, {"compile": "native"}, {"cache_k": "f16"}, {"grp_attn_n": 2, "grp_attn_w": 8}]
)
def test_each_answer_is_what_generate_gives_on_all_that_was_said(models, switches):
    vanilla, ours = models
    session, said = session_of(ours, **switches), []
    answers = []
    for turn in TURNS:
        made, finish = answered(session, turn)
        assert finish == "length" and len(made) == 9
        answers.append(made)
    reference = ours if switches.keys() & {"cache_k", "grp_attn_n"} else vanilla
    if reference is ours:
        ours.preallocate(batch_size=1, cache_length=256, **switches)
    for turn, made in zip(TURNS, answers, strict=True):
        said += turn
        ids = torch.tensor([said])
        out = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)
        assert out[0, len(said) :].tolist() == made
        said += made
    assert session.ids == said


def test_only_what_is_new_is_computed(models):
    session = session_of(models[1])
    for turn in TURNS:
        answered(session, turn, limit=3)
    passes = session.model.passes
    # Behind the first turn: the answer's last token and the new ones, then an answer's first two.
    assert passes[:3] == [("prefill", 4), ("step", 1), ("step", 1)]
    assert passes[3:6] == [("step", 2), ("step", 1), ("step", 1)]
    assert [count for name, count in passes if name == "prefill"] == [4]
    assert sum(count for _, count in passes) == session.cached == len(session.ids) - 1


def test_drawn_answers_are_generates_seed_for_seed(models):
    ours = models[1]
    sampling = fastllama.Sampling.llama_cpp(repeat_penalty=1.2, mirostat=2)
    session = session_of(ours, sampling)
    torch.manual_seed(3)
    made = [answered(session, turn)[0] for turn in TURNS[:2]]
    torch.manual_seed(3)
    said = []
    for turn, answer in zip(TURNS, made, strict=False):
        said += turn
        ids = torch.tensor([said])
        out = ours.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, sampling=sampling)
        assert out[0, len(said) :].tolist() == answer
        said += answer


def test_an_end_of_text_is_not_kept(models):
    free = session_of(models[1])
    made, _ = answered(free, TURNS[0], limit=8)
    session = session_of(models[1], eos=(made[3],))
    kept = made[: made.index(made[3])]
    assert answered(session, TURNS[0], limit=8) == (kept, "stop")
    assert session.ids == TURNS[0] + kept and session.cached == len(session.ids)


def test_an_answer_ends_behind_a_stop_string(capsys):
    free = generate(capsys, "-i", "-n", 30, stdin="def f(x):\n").out
    stop = free.split("(")[0] + "("
    said = generate(capsys, "-i", "-n", 30, "-r", "(", "-r", "never there", stdin="def f(x):\nclass A:\n")
    assert said.code == 0 and said.out.startswith(stop) and len(said.out) < len(free) + 40
    assert stop.count("(") == 1 and said.out[: len(stop) + 8] != free[: len(stop) + 8]


# full


def test_a_full_cache_ends_an_answer_and_refuses_a_turn(models):
    session = session_of(models[1], length=16)
    made, finish = answered(session, TURNS[0], limit=50)
    assert finish == "full" and len(made) == 16 - 4 + 1
    before = list(session.ids)
    with pytest.raises(ValueError, match="the cache of 16 positions is full: 16 are in use and this turn needs 2"):
        answered(session, [5])
    assert session.ids == before


@pytest.mark.parametrize("keep", [0, 3, -1])
def test_a_session_goes_on_where_the_cache_shifts(models, keep):
    session = session_of(models[1], length=24, context_shift=True, keep=keep)
    for turn in TURNS * 3:
        made, finish = answered(session, turn, limit=20)
        assert finish == "length" and len(made) == 20
    assert len(session.ids) > 8 * 24


def test_an_answer_past_the_cache_is_generates(models):
    ours = models[1]
    session = session_of(ours, length=24, context_shift=True, keep=2)
    made, _ = answered(session, TURNS[0], limit=100)
    ids = torch.tensor([TURNS[0]])
    out = ours.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=100, do_sample=False)
    assert out[0, 4:].tolist() == made


# Ctrl-C


def test_ctrl_c_ends_an_answer_and_the_session_goes_on(models):
    session, whole = session_of(models[1]), []
    interrupt = Interrupt()

    def press(token):
        whole.append(token)
        if len(whole) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with interrupt.listening():
        assert session.answer(TURNS[0], 50, press, interrupt.stopped) == "interrupted"
    assert len(whole) == 3 and session.ids == TURNS[0] + whole
    made, finish = answered(session, TURNS[1])
    said = TURNS[0] + whole + TURNS[1]
    ids = torch.tensor([said])
    out = models[0].generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)
    assert finish == "length" and out[0, len(said) :].tolist() == made


def test_a_second_ctrl_c_is_raised_and_the_handler_is_put_back():
    before, interrupt = signal.getsignal(signal.SIGINT), Interrupt()
    with pytest.raises(KeyboardInterrupt), interrupt.listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.stopped()
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    with interrupt.listening():
        assert not interrupt.stopped()


def test_an_interrupted_turn_waits_for_the_next(models):
    session = session_of(models[1])
    answered(session, TURNS[0], limit=2)
    assert answered(session, TURNS[2], stopped=lambda: True) == ([], "interrupted")
    made, _ = answered(session, TURNS[3])
    said = session.ids[: -len(made)]
    assert said[-32:] == TURNS[2] + TURNS[3]
    ids = torch.tensor([said])
    out = models[0].generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)
    assert out[0, len(said) :].tolist() == made


# lines and templates


def test_lines_are_turns_until_quit(capsys, demo_tokenizer):
    lines = "def f(x):\n\n   \nclass A:\n/quit\nnot read\n"
    said = generate(capsys, "-i", "-n", 12, "--dtype", "fp32", stdin=lines)
    assert said.code == 0 and "25 tokens were said" not in said.err
    model = fastllama.LlamaForCausalLM.from_pretrained(demo.resolve("demo", torch.float32), dtype=torch.float32)
    ids, texts = [], []
    for number, line in enumerate(("def f(x):\n", "class A:\n")):
        ids += demo_tokenizer(line, add_special_tokens=number == 0).input_ids
        prompt = torch.tensor([ids])
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
        made = out[0, len(ids) :].tolist()
        ids += made
        texts.append(demo_tokenizer.decode([token for token in made if token != demo_tokenizer.eos_token_id]))
    assert said.out == "".join(text + "\n" for text in texts)
    assert f"{len(ids)} tokens were said, {len(ids) - 1} of them computed, each once" in said.err


def test_a_prompt_is_the_first_turn_and_the_end_of_file_ends(capsys):
    first = generate(capsys, "-i", "-n", 6, "-p", "def f(x):\n", stdin="")
    assert first.code == 0 and first.out.strip()
    assert generate(capsys, "-i", "-n", 6, stdin="def f(x):\n").out == first.out


def test_a_full_cache_is_one_sentence_and_the_session_goes_on_being_there(capsys):
    said = generate(capsys, "-i", "-n", -1, "-c", 24, "--ignore-eos", stdin="def f(x):\nclass A:\n")
    full = [line for line in said.err.splitlines() if "the cache of 24 positions is full" in line]
    assert said.code == 0 and len(full) == 2 and full[1].startswith("error: ")
    assert "Traceback" not in said.err


@pytest.fixture
def talker(tmp_path):
    """The demo with a chat template."""
    folder = Path(demo.resolve("demo", torch.float32))
    for name in os.listdir(folder):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def test_a_template_closes_the_answer_and_opens_the_next(talker, monkeypatch, capsys):
    seen = []
    answer = Session.answer

    def listen(self, turn, *how):
        seen.append((list(self.ids), turn))
        return answer(self, turn, *how)

    monkeypatch.setattr(Session, "answer", listen)
    said = generate(capsys, "-i", "-m", talker, "-n", 5, "-sys", "Be brief.", stdin="one\ntwo\n")
    assert said.code == 0, said.err
    tokenizer = fastllama.lab.cli.loading.checkpoint.AutoTokenizer.from_pretrained(talker)
    (none, first), (before, second) = seen
    assert none == []
    assert tokenizer.decode(first) == "<s><|system|>Be brief.</s><|user|>one</s><|assistant|>"
    assert before[: len(first)] == first
    assert tokenizer.decode(second) == "</s><|user|>two</s><|assistant|>"
    plain = generate(capsys, "-i", "-m", talker, "-n", 5, "--no-chat-template", stdin="one\n")
    assert plain.code == 0 and tokenizer.decode(seen[2][1]) == "<s>one\n"


def test_a_refused_turn_leaves_no_message(talker):
    from transformers import AutoTokenizer

    chat_turns = turns.of(AutoTokenizer.from_pretrained(talker), True, None)
    chat_turns.ids("one")
    chat_turns.refused()
    assert chat_turns.messages == []


def test_a_system_prompt_needs_a_template(capsys):
    said = generate(capsys, "-i", "-sys", "Be brief.", stdin="one\n")
    assert said.code == 2 and "--system-prompt needs a chat template" in said.err


def test_the_session_says_what_it_waits_for(capsys, monkeypatch):
    monkeypatch.setattr(chat, "_is_terminal", lambda: True)
    said = generate(capsys, "-i", "-n", 2, stdin="a\n")
    assert "/quit or the end of file ends it" in said.err and "> " in said.err
