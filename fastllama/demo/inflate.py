"""`inflated:NAME`: the demo's function, computed by a body of a real model's size.

The demo's weights lie in a corner of each larger matrix. The residual stream's surplus dimensions are always
exactly zero, so weights that only read them are free; they and everything else that changes no output hold
random values, so that the body costs what the real model costs. In fp32 the result equals the demo's.

Legend: D hidden size, N query heads, K kv heads, H head dim; `small` is the demo, `big` the body.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from fastllama.demo.checkpoint import write_checkpoint
from fastllama.demo.random_model import RandomBody, body_config
from fastllama.demo.shapes import Shape
from fastllama.demo.tokenizer import RESERVED_ID

MAX_POSITIONS = 4096


@dataclass(frozen=True)
class Placement:
    """Where the demo's attention lies in the body; every field is int64 row numbers of a projection."""

    query_rows: torch.Tensor  # [N_small * H_small] rows of q_proj, in the demo's order
    key_rows: torch.Tensor  # [copies * K_small * H_small] rows of k_proj and v_proj
    key_sources: torch.Tensor  # same size: the demo row that each of key_rows holds
    key_head_rows: torch.Tensor  # all rows of the kv heads in use
    read_columns: torch.Tensor  # columns of o_proj at which some head's output is not zero


def _rows(heads: list[int], head_dim: int, dims: torch.Tensor) -> torch.Tensor:
    """Rows of `dims` within each of `heads`, head by head."""
    return (torch.tensor(heads)[:, None] * head_dim + dims[None, :]).flatten()


def place(demo: LlamaConfig, shape: Shape) -> Placement:
    """Chooses heads and rotary pairs. `demo` must fit, see `check_fits`."""
    small_dim, half = demo.head_dim, demo.head_dim // 2
    # Rotary pairs are (i, i + H/2) with frequency theta^(-2i/H): a stride of H_big/H_small keeps each frequency.
    pairs = torch.arange(half) * (shape.head_dim // small_dim)
    dims = torch.cat((pairs, pairs + shape.head_dim // 2))

    small_group = demo.num_attention_heads // demo.num_key_value_heads
    big_group = shape.num_attention_heads // shape.num_key_value_heads
    copies = math.ceil(small_group / big_group)
    query_heads, key_heads, key_sources = [], [], []
    for small_head in range(demo.num_attention_heads):
        small_key, member = divmod(small_head, small_group)
        big_key = small_key * copies + member // big_group
        query_heads.append(big_key * big_group + member % big_group)
        if big_key not in key_heads:
            key_heads.append(big_key)
            key_sources.append(small_key)
    readers = [head * big_group + member for head in key_heads for member in range(big_group)]
    return Placement(
        query_rows=_rows(query_heads, shape.head_dim, dims),
        key_rows=_rows(key_heads, shape.head_dim, dims),
        key_sources=_rows(key_sources, small_dim, torch.arange(small_dim)),
        key_head_rows=_rows(key_heads, shape.head_dim, torch.arange(shape.head_dim)),
        read_columns=_rows(readers, shape.head_dim, dims),
    )


def check_fits(demo: LlamaConfig, shape: Shape) -> None:
    """Raises `ValueError` naming the first size of `shape` that cannot hold the demo."""
    for field in ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size"):
        if getattr(shape, field) < getattr(demo, field):
            raise ValueError(f"{field} {getattr(shape, field)} cannot hold the demo's {getattr(demo, field)}")
    if shape.head_dim % demo.head_dim:
        raise ValueError(f"head_dim {shape.head_dim} is not a multiple of the demo's {demo.head_dim}")
    small_group = demo.num_attention_heads // demo.num_key_value_heads
    big_group = shape.num_attention_heads // shape.num_key_value_heads
    needed = demo.num_key_value_heads * math.ceil(small_group / big_group)
    if shape.num_key_value_heads < needed:
        raise ValueError(f"num_key_value_heads {shape.num_key_value_heads} cannot hold the demo, which needs {needed}")
    if shape.tie_word_embeddings and not demo.tie_word_embeddings:
        raise ValueError("a body with tied embeddings cannot hold a demo whose embeddings are not tied")


class InflatedBody(RandomBody):
    """A random body with the demo's weights written into it."""

    def __init__(self, demo_folder: Path, shape: Shape, dtype: torch.dtype, seed: int = 0):
        """Raises `FileNotFoundError` when the demo is not there, `ValueError` when it does not fit."""
        if not (demo_folder / "model.safetensors").is_file():
            raise FileNotFoundError(f"the demo's weights are not in {demo_folder}")
        super().__init__(shape, dtype, seed)
        self.demo_config = LlamaConfig.from_pretrained(demo_folder)
        check_fits(self.demo_config, shape)
        weights = load_file(demo_folder / "model.safetensors")
        self._demo = {name: tensor.float() for name, tensor in weights.items()}
        self._place = place(self.demo_config, shape)
        self._width = self.demo_config.hidden_size  # D_small
        # The mean square is taken over D_big numbers, of which only D_small are not zero.
        self._norm_scale = math.sqrt(self._width / shape.hidden_size)
        self._query_scale = math.sqrt(shape.head_dim / self.demo_config.head_dim)

    def config(self) -> LlamaConfig:
        demo = self.demo_config
        return body_config(
            self.shape,
            self.dtype,
            max_position_embeddings=MAX_POSITIONS,
            rms_norm_eps=demo.rms_norm_eps * self._width / self.shape.hidden_size,
            rope_parameters=dict(demo.rope_parameters),
            bos_token_id=demo.bos_token_id,
            eos_token_id=demo.eos_token_id,
            pad_token_id=demo.pad_token_id,
        )

    def _write_norm(self, tensors: dict, name: str) -> None:
        tensors[name][: self._width] = self._demo[name] * self._norm_scale

    def _write_vocabulary(self, table: torch.Tensor, demo_table: torch.Tensor) -> None:
        """Surplus tokens copy the reserved one, which is never predicted; a zero row's logit 0 could win."""
        known = demo_table.shape[0]
        table[:known, : self._width] = demo_table
        table[known:, : self._width] = demo_table[RESERVED_ID]

    def embeddings(self) -> dict[str, torch.Tensor]:
        size = (self.shape.vocab_size, self.shape.hidden_size)
        table = torch.zeros(size, dtype=self.dtype)
        self._write_vocabulary(table, self._demo["model.embed_tokens.weight"])
        return {"model.embed_tokens.weight": table}

    def layer(self, index: int) -> dict[str, torch.Tensor]:
        tensors = super().layer(index)
        prefix = f"model.layers.{index}."
        attention = [tensors[f"{prefix}self_attn.{name}_proj.weight"] for name in "qkvo"]
        mlp = [tensors[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up", "down")]
        if index >= self.demo_config.num_hidden_layers:
            attention[3].zero_()
            mlp[2].zero_()
            return tensors
        self._write_attention(f"{prefix}self_attn.", *attention)
        self._write_mlp(f"{prefix}mlp.", *mlp)
        self._write_norm(tensors, f"{prefix}input_layernorm.weight")
        self._write_norm(tensors, f"{prefix}post_attention_layernorm.weight")
        return tensors

    def _write_attention(self, prefix: str, query, key, value, output) -> None:
        where, width = self._place, self._width
        demo = {name: self._demo[f"{prefix}{name}_proj.weight"] for name in "qkvo"}
        query[where.query_rows, :width] = (demo["q"] * self._query_scale).to(self.dtype)
        # A surplus query dimension may be anything as long as the key's is zero.
        key[where.key_head_rows, :width] = 0
        key[where.key_rows, :width] = demo["k"][where.key_sources].to(self.dtype)
        # A surplus value is zero, so whatever reads it may be anything.
        value[:, :width] = 0
        value[where.key_rows, :width] = demo["v"][where.key_sources].to(self.dtype)
        output[:, where.read_columns] = 0
        output[:width, where.query_rows] = demo["o"].to(self.dtype)

    def _write_mlp(self, prefix: str, gate, up, down) -> None:
        width, inner = self._width, self.demo_config.intermediate_size
        gate[:inner, :width] = self._demo[f"{prefix}gate_proj.weight"]
        # Rows of `up` beyond the demo's give zero, whatever their gate: columns of `down` that read them are free.
        up[:, :width] = 0
        up[:inner, :width] = self._demo[f"{prefix}up_proj.weight"]
        down[:, :inner] = 0
        down[:width, :inner] = self._demo[f"{prefix}down_proj.weight"]

    def head(self) -> dict[str, torch.Tensor]:
        tensors = super().head()
        self._write_norm(tensors, "model.norm.weight")
        if not self.shape.tie_word_embeddings:
            tied = self._demo["model.embed_tokens.weight"]
            self._write_vocabulary(tensors["lm_head.weight"], self._demo.get("lm_head.weight", tied))
        return tensors


def build_inflated(demo_folder: Path, shape: Shape, out: Path, dtype: torch.dtype, seed: int = 0) -> None:
    """Writes a checkpoint of `shape` that computes the function of the one in `demo_folder` to `out`.

    Raises `FileNotFoundError` when the demo is not there and `ValueError` when it does not fit `shape`.
    """
    body = InflatedBody(demo_folder, shape, dtype, seed)
    write_checkpoint(out, body.config(), body.shards(), body.shard_count, demo_folder)
