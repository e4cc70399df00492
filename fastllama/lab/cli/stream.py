"""Text out: tokens become text as they come, and a closed pipe ends it."""

import sys

_CONTEXT = 6  # prompt tokens that the first new one is decoded behind: some tokenizers drop a first space
_BROKEN = "\ufffd"  # a character of which tokens are still to come


class Detokenizer:
    """The text of new tokens, piece by piece: a piece ends where a character does, and no text is taken back."""

    def __init__(self, tokenizer, prompt: list[int]):
        self.tokenizer = tokenizer
        self._ids, self._shown = list(prompt[-_CONTEXT:]), ""
        self._start = 0
        self._shown = self._decode()
        if self._shown.endswith(_BROKEN):
            self._ids, self._shown = [], ""

    def _decode(self) -> str:
        return self.tokenizer.decode(self._ids[self._start :], skip_special_tokens=True)

    def add(self, token: int) -> str:
        """What is known of the text now, and was not before."""
        self._ids.append(token)
        whole = self._decode()
        if whole.endswith(_BROKEN) or len(whole) <= len(self._shown):
            return ""
        piece = whole[len(self._shown) :]
        if len(self._ids) - self._start > 2 * _CONTEXT:
            self._start = len(self._ids) - _CONTEXT
            whole = self._decode()
        self._shown = whole
        return piece

    def end(self) -> str:
        """What is left: the beginning of a character, where the text ended within one."""
        return self._decode()[len(self._shown) :]


class Collector:
    """A streamer for `generate`: hands each new token on, and tells a clock of the first.

    `on_token(token)` may raise; generation ends with what it raises.
    """

    def __init__(self, on_token):
        self.on_token, self._is_prompt = on_token, True

    def put(self, ids) -> None:
        """Ids of any shape; the first call brings the prompt."""
        if self._is_prompt:
            self._is_prompt = False
            return
        for token in ids.reshape(-1).tolist():
            self.on_token(token)

    def end(self) -> None:
        """Nothing is kept back."""


def write(text: str) -> None:
    """Onto standard output, at once. `BrokenPipeError` where nobody reads it."""
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()


def say(text: str) -> None:
    """A line on standard error."""
    print(text, file=sys.stderr, flush=True)
