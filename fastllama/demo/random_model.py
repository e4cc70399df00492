"""`random:NAME`: a real-sized Llama with seeded random weights."""

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import LlamaConfig

from fastllama.demo.checkpoint import write_checkpoint
from fastllama.demo.shapes import Shape
from fastllama.demo.tokenizer import BOS_ID, EOS_ID, PAD_ID

_STD = 0.02
# Normals are drawn once and laid out again and again: drawing billions would take minutes. A prime period
# shares no factor with a row's length, so no two rows of a matrix start at the same place.
_PERIOD = 1_000_003


class RandomBody:
    """Seeded random tensors of one shape, in checkpoint names. Each call returns new memory."""

    def __init__(self, shape: Shape, dtype: torch.dtype, seed: int = 0):
        self.shape, self.dtype = shape, dtype
        generator = torch.Generator().manual_seed(seed)
        self._normals = (torch.randn(_PERIOD, generator=generator) * _STD).to(dtype)
        self._next = 0

    def tensor(self, *size: int) -> torch.Tensor:
        """A tensor of `size`: matrices are normal around 0, norm weights (one dimension) around 1."""
        flat = torch.empty(size, dtype=self.dtype).view(-1)
        written = 0
        while written < flat.numel():
            run = min(flat.numel() - written, _PERIOD - self._next)
            flat[written : written + run] = self._normals[self._next : self._next + run]
            written += run
            self._next = (self._next + run) % _PERIOD
        return flat.add_(1.0) if len(size) == 1 else flat.view(size)

    def embeddings(self) -> dict[str, torch.Tensor]:
        return {"model.embed_tokens.weight": self.tensor(self.shape.vocab_size, self.shape.hidden_size)}

    def layer(self, index: int) -> dict[str, torch.Tensor]:
        sizes = self.shape.layer_sizes.items()
        return {f"model.layers.{index}.{name}.weight": self.tensor(*size) for name, size in sizes}

    def head(self) -> dict[str, torch.Tensor]:
        """The final norm and, unless it is tied, the output matrix."""
        tensors = {"model.norm.weight": self.tensor(self.shape.hidden_size)}
        if not self.shape.tie_word_embeddings:
            tensors["lm_head.weight"] = self.tensor(self.shape.vocab_size, self.shape.hidden_size)
        return tensors

    @property
    def shard_count(self) -> int:
        return self.shape.num_hidden_layers + 2

    def shards(self) -> Iterator[dict[str, torch.Tensor]]:
        yield self.embeddings()
        for index in range(self.shape.num_hidden_layers):
            yield self.layer(index)
        yield self.head()


def body_config(shape: Shape, dtype: torch.dtype, **changes) -> LlamaConfig:
    """The config of a body: the shape's own sizes and rotary, the demo tokenizer's special ids."""
    fields = {
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size,
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "max_position_embeddings": shape.max_position_embeddings,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_parameters": dict(shape.rope_parameters),
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        "dtype": dtype,
        "architectures": ["LlamaForCausalLM"],
    }
    return LlamaConfig(**{**fields, **changes})


def build_random(tokenizer_folder: Path, shape: Shape, out: Path, dtype: torch.dtype, seed: int = 0) -> None:
    """Writes a checkpoint of `shape` with random weights to `out`, with the tokenizer of `tokenizer_folder`.

    Its logits are finite and its text is noise: it is for speed and memory only.
    """
    body = RandomBody(shape, dtype, seed)
    write_checkpoint(out, body_config(shape, dtype), body.shards(), body.shard_count, tokenizer_folder)
