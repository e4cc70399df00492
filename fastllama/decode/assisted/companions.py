"""Companions: what a model keeps about those that assist it, from call to call."""

import weakref

from torch import nn

from fastllama.decode.assisted.schedule import Adaptive, Constant, Heuristic
from fastllama.decode.assisted.support import Asked
from fastllama.decode.engine import Engine
from fastllama.model.config import FastConfig

# A transformers model is not ours to rearrange: its weights stay where they are.
_FOREIGN = FastConfig(products="stock", fuse="no")


class Companions:
    """Engines for drafts that are transformers' own models, and what the adaptive schedule has learnt of each draft.

    It belongs to one model and is neither copied nor pickled with it.
    """

    def __init__(self):
        self._engines: weakref.WeakKeyDictionary[nn.Module, Engine] = weakref.WeakKeyDictionary()
        self._compared: tuple[list[weakref.ref], bool] = ([], False)  # the last two tokenizers; whether they agree
        self._learnt: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, Adaptive]] = weakref.WeakKeyDictionary()

    def __deepcopy__(self, memo) -> "Companions":
        return Companions()

    def __reduce__(self):
        return Companions, ()

    def free(self) -> None:
        """Gives back the engines of transformers' own models."""
        self._engines.clear()

    def engine(self, draft: nn.Module) -> Engine:
        """The engine of a draft: its own where it is ours."""
        own = getattr(draft, "_engine", None)
        if isinstance(own, Engine):
            return own
        if draft not in self._engines:
            self._engines[draft] = Engine(_FOREIGN)
        return self._engines[draft]

    def same_tokenizer(self, one, other) -> bool:
        """Whether the draft's tokenizer `other` gives every id the meaning that `one` gives it. None is no other.

        transformers asks for both where the vocabularies' sizes differ, which padding alone can make them do.
        """
        if other is None or one is other:
            return True
        known, alike = self._compared
        if [reference() for reference in known] != [one, other]:
            alike = one.get_vocab() == other.get_vocab()
            self._compared = [weakref.ref(one), weakref.ref(other)], alike
        return alike

    def schedule(
        self, asked: Asked, model: nn.Module, draft: nn.Module | None, rows: int, engines: list[Engine], draws: bool
    ):
        """How many tokens to propose in each round of a call."""
        if asked.schedule == "constant":
            return Constant(asked.tokens)
        if asked.schedule != "adaptive":
            return Heuristic(asked.tokens)
        # Costs and chances are those of a draft, a way to run, a number of rows, and of drawing or not.
        companion, setting = (
            model if draft is None else draft,
            (asked.tokens, asked.branches, asked.p_split, asked.window, rows, draws, *(e.config for e in engines)),
        )
        held, learnt = self._learnt.get(companion, (None, None))
        if held != setting:
            learnt = Adaptive(asked.tokens)
            self._learnt[companion] = setting, learnt
        return learnt
