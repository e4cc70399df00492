"""The parts of a forward pass: what each reads, by its shapes, and which product is which.

Legend: L layers, E hidden size, I intermediate size, N query heads, K kv heads, D head dim, V vocabulary
"""

from dataclasses import dataclass

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from fastllama.lab.measuring.checkpoint import position_bytes
from fastllama.lab.measuring.contestant import Contestant
from fastllama.model.small_linear import held_format
from fastllama.model.small_loading import small_bytes
from fastllama.model.weights import Fused

PRODUCTS = ("qkv", "o", "gate_up", "down", "head")
_PART_OF = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv"),
    "o_proj": "o",
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up"),
    "down_proj": "down",
    "lm_head": "head",
}
# In the order of a table.
PARTS = {
    "embedding": "embedding",
    "norm": "norms",
    "qkv": "query, key and value products",
    "rotary": "rotary embedding",
    "cache write": "cache write",
    "attention": "attention",
    "o": "output product of attention",
    "gate_up": "gate and up products",
    "activation": "activation",
    "down": "down product",
    "head": "output head",
    "sampling": "choosing the token",
    "native step": "the whole step, one C++ call",
    "compiled": "compiled code between the products",
    "captured": "kernels of a captured graph",
    "other": "other operators (residual sums, masks, positions)",
    "between": "between the operators (Python; a device waits)",
}


@dataclass(frozen=True)
class Shape:
    """What the bytes of a pass follow from. `lengths`: real prompt tokens of each row."""

    config: LlamaConfig
    itemsize: int
    lengths: tuple[int, ...]
    new_tokens: int
    separate: dict[str, int]  # how many products each part of a layer is made of
    weights: str | None = None  # the few bits in which the matrices are held
    formats: tuple[str | None, str | None] = (None, None)  # of keys and values; None is the model's dtype

    @property
    def sequence(self) -> list[str]:
        """The part of each product of one pass, in the order in which they run."""
        layer = [part for part in PRODUCTS[:-1] for _ in range(self.separate[part])]
        return layer * self.config.num_hidden_layers + ["head"]

    @property
    def weight_bytes(self) -> dict[str, int]:
        """Bytes of the weights that one pass reads, by part: all of them, but for the rows of the embedding."""
        if self.weights is None:
            return {part: count * self.itemsize for part, count in self._numbers.items()}
        with torch.device("meta"):
            model = LlamaForCausalLM(self.config)
        parts = dict.fromkeys(self._numbers, 0)
        parts["norm"] = self._numbers["norm"] * self.itemsize
        names = {module: name.rpartition(".")[2] for name, module in model.named_modules()}
        for matrix, nbytes in small_bytes(model, self.weights):
            bias = 0 if matrix.bias is None else matrix.bias.numel() * self.itemsize
            parts[_PART_OF[names[matrix]]] += nbytes + bias
        return parts

    @property
    def _numbers(self) -> dict[str, int]:
        config = self.config
        layers, hidden, inner = config.num_hidden_layers, config.hidden_size, config.intermediate_size
        dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
        query, both = config.num_attention_heads * dim, 2 * config.num_key_value_heads * dim
        attention_bias, mlp_bias = int(config.attention_bias), int(config.mlp_bias)
        return {
            "qkv": layers * (query + both) * (hidden + attention_bias),
            "o": layers * hidden * (query + attention_bias),
            "gate_up": layers * 2 * inner * (hidden + mlp_bias),
            "down": layers * hidden * (inner + mlp_bias),
            "head": config.vocab_size * hidden,
            "norm": (2 * layers + 1) * hidden,
        }

    def calls(self, part: str) -> int:
        """How often one pass runs a part that has weights."""
        if part == "norm":
            return 2 * self.config.num_hidden_layers + 1
        return 1 if part == "head" else self.separate[part] * self.config.num_hidden_layers

    def step_bytes(self) -> dict[str, int]:
        """Bytes that a step in mid-generation must move, by part."""
        rows, position = len(self.lengths), position_bytes(self.config, self.itemsize, *self.formats)
        return {
            **self.weight_bytes,
            "embedding": rows * self.config.hidden_size * self.itemsize,
            "cache write": rows * position,
            "attention": position * (sum(self.lengths) + rows * self.new_tokens // 2),
        }

    def prefill_bytes(self, calls: dict[str, int]) -> dict[str, int]:
        """Bytes that a prefill moves, by part: a weight is read again by each of the `calls` on it."""
        weights = {part: count // self.calls(part) * calls[part] for part, count in self.weight_bytes.items()}
        cache = position_bytes(self.config, self.itemsize, *self.formats) * sum(self.lengths)
        embedding = sum(self.lengths) * self.config.hidden_size * self.itemsize
        return {**weights, "embedding": embedding, "cache write": cache, "attention": cache}

    def prefill_flops(self) -> int:
        """Floating-point operations of a prefill's products; the head runs for the last token of each row."""
        numbers = {part: self._numbers[part] for part in PRODUCTS}
        head = numbers.pop("head") * len(self.lengths)
        return 2 * (sum(numbers.values()) * sum(self.lengths) + head)


def shape_of(contestant: Contestant, lengths: list[int], new_tokens: int) -> Shape:
    """The shape of the contestant's passes on a prompt."""
    separate = {"qkv": 3, "o": 1, "gate_up": 2, "down": 1}
    formats = (None, None)
    if contestant.name == "ours":
        engine = contestant.model._engine
        block, formats = engine.weights.blocks[0], (engine.config.cache_k, engine.config.cache_v)
        separate = {
            part: 1 if isinstance(getattr(block, part), Fused) else count for part, count in separate.items()
        } | {"o": 1, "down": 1}
    config, itemsize = contestant.model.config, contestant.model.dtype.itemsize
    return Shape(config, itemsize, tuple(lengths), new_tokens, separate, held_format(contestant.model), formats)
