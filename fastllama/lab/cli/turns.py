"""Turns: lines of a person as tokens, with the tokenizer's chat template where it has one."""

_MARK = "\u2063answer\u2063"  # stands for an answer whose tokens are in the cache already; not seen in texts


class PlainTurns:
    """A line is text, with its line end, that the model goes on from."""

    def __init__(self, tokenizer):
        self.tokenizer, self._is_first = tokenizer, True

    def ids(self, line: str) -> list[int]:
        """The tokens that this turn adds."""
        first, self._is_first = self._is_first, False
        return self.tokenizer(line, add_special_tokens=first, verbose=False).input_ids

    def answered(self, text: str) -> None:
        """The turn's answer."""

    def refused(self) -> None:
        """The turn was not taken."""


class TemplateTurns:
    """A line is what the user says; the template closes the answer before it and opens the next.

    An answer stays in the cache as the model wrote it: what a turn adds is all that the template puts behind it.
    """

    def __init__(self, tokenizer, system_prompt: str | None):
        self.tokenizer = tokenizer
        self.messages = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]

    def ids(self, line: str) -> list[int]:
        """The tokens that this turn adds. `ValueError` where the template does not keep what was said."""
        answered = bool(self.messages) and self.messages[-1]["role"] == "assistant"
        before = [*self.messages[:-1], {"role": "assistant", "content": _MARK}] if answered else self.messages
        messages = [*before, {"role": "user", "content": line.rstrip("\n")}]
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as fault:  # templates are programs, and raise what they like
            raise ValueError(f"the chat template takes no such turn ({fault}): use --no-chat-template") from fault
        if answered:
            if _MARK not in text:
                raise ValueError("the chat template does not keep earlier answers: use --no-chat-template")
            text = text.rpartition(_MARK)[2]
        self.messages.append({"role": "user", "content": line.rstrip("\n")})
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def answered(self, text: str) -> None:
        """The turn's answer."""
        self.messages.append({"role": "assistant", "content": text})

    def refused(self) -> None:
        """The turn was not taken."""
        self.messages.pop()


def of(tokenizer, use_template: bool, system_prompt: str | None) -> PlainTurns | TemplateTurns:
    """Turns for this tokenizer. `ValueError` for a system prompt without a template to hold it."""
    if use_template and getattr(tokenizer, "chat_template", None) is not None:
        return TemplateTurns(tokenizer, system_prompt)
    if system_prompt is not None:
        raise ValueError("--system-prompt needs a chat template, and there is none: put it into --prompt")
    return PlainTurns(tokenizer)
