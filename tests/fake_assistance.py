"""generate with made-up assistance: unassisted tokens, and a report of rounds that draft two and accept one."""

from types import SimpleNamespace

import fastllama


def pretend(monkeypatch, off: int = 0) -> None:
    """Until monkeypatch undoes it, ours takes the arguments of assistance and tells what it did."""
    real = fastllama.LlamaForCausalLM.generate

    def generate(self, *args, assistant_model=None, prompt_lookup_num_tokens=None, **kwargs):
        ids = real(self, *args, **kwargs)
        self.assisted = None
        if assistant_model is not None or prompt_lookup_num_tokens is not None:
            rows, rounds = len(ids), -(-(kwargs["max_new_tokens"] - 1) // 2)
            self.assisted = SimpleNamespace(
                mode="draft" if assistant_model is not None else "lookup",
                new_tokens=rows * kwargs["max_new_tokens"],
                draft_tokens=rows * rounds * 2,
                accepted_tokens=rows * rounds,
                target_forwards=1 + rounds,
                draft_forwards=2 * rounds,
                prefill_s=0.001,
                draft_s=0.002,
                target_s=0.003,
                switched_off=off,
            )
        return ids

    monkeypatch.setattr(fastllama.LlamaForCausalLM, "generate", generate)
