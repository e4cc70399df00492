"""Which prompts of the lookup task the demo answers out of its input: python -m fastllama.lab.tasks.grounding

Prompt lookup is for answers that repeat their input, and so small a model seldom does. So every function of the
held-out files is tried in every kind of prompt that has a fitting size, and those whose answers repeat most are taken,
whatever the speed.
"""

import ast
from collections.abc import Iterator, Sequence

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

import fastllama
from fastllama.demo.names import demo_folder
from fastllama.demo.text import HELD_OUT_DIR
from fastllama.lab.measuring import vanilla
from fastllama.lab.points import workload
from fastllama.lab.tasks import prompts

_GRAM = 4  # tokens in a row that count as repeated
SIZES = range(150, 501)  # tokens of a prompt


def share(prompt: Sequence[int], answer: Sequence[int]) -> float:
    """The share of the answer's tokens that are in a run of four which the prompt has too."""
    grams = {tuple(prompt[place : place + _GRAM]) for place in range(len(prompt) - _GRAM + 1)}
    repeated: set[int] = set()
    for place in range(len(answer) - _GRAM + 1):
        if tuple(answer[place : place + _GRAM]) in grams:
            repeated.update(range(place, place + _GRAM))
    return len(repeated) / len(answer)


def candidates() -> Iterator[tuple[str, str, str]]:
    """(kind, module, function) of every function of the held-out files."""
    for path in sorted(HELD_OUT_DIR.glob("*.py.txt")):
        module = path.name.removesuffix(".py.txt")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for name in sorted({node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}):
            yield from ((kind, module, name) for kind in prompts.KINDS)


def ranked(model, tokenizer, tried) -> list[tuple[float, str, str, str]]:
    """(share, kind, module, function) of those `tried`, the most grounded first; `model` is greedy."""
    found, new = [], prompts.NEW_TOKENS["lookup"]
    for kind, module, name in tried:
        text = prompts.KINDS[kind](module, name)
        ids = torch.empty(1, 0) if text is None else tokenizer(text, return_tensors="pt", verbose=False).input_ids
        length = ids.shape[1]
        if length in SIZES:
            mask = torch.ones_like(ids)
            answer = model.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new)[0, length:]
            found.append((share(ids[0].tolist(), answer.tolist()), kind, module, name))
    return sorted(found, key=lambda one: (-one[0], *one[1:]))


def main() -> None:
    """Prints the ranking's beginning."""
    folder = demo_folder("target")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = fastllama.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    vanilla.plain_greedy(model, workload.pad_id(tokenizer))
    model.preallocate(1, SIZES.stop + prompts.NEW_TOKENS["lookup"], compile="native")
    table = Table("repeated", "kind", "module", "function")
    for found, *what in ranked(model, tokenizer, candidates())[:20]:
        table.add_row(f"{found:.0%}", *what)
    Console().print(table)


if __name__ == "__main__":
    main()
