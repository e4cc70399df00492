"""Shapes of real Llama models, as data.

Legend: D hidden size, N query heads, K kv heads, H head dim, I intermediate size, V vocabulary, L layers.
"""

from dataclasses import dataclass, field


def _default_rope() -> dict:
    return {"rope_type": "default", "rope_theta": 10000.0}


def _llama3_rope(factor: float) -> dict:
    return {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


@dataclass(frozen=True)
class Shape:
    """One Llama body: what its config.json says about sizes, positions and the norm."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_parameters: dict = field(default_factory=_default_rope)

    @property
    def layer_sizes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name within a layer -> its size, in checkpoint order."""
        D, inner = self.hidden_size, self.intermediate_size
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return {
            "input_layernorm": (D,),
            "self_attn.q_proj": (queries, D),
            "self_attn.k_proj": (keys, D),
            "self_attn.v_proj": (keys, D),
            "self_attn.o_proj": (D, queries),
            "post_attention_layernorm": (D,),
            "mlp.gate_proj": (inner, D),
            "mlp.up_proj": (inner, D),
            "mlp.down_proj": (D, inner),
        }

    @property
    def parameters(self) -> int:
        """How many numbers a checkpoint of this shape stores."""
        layer = sum(size[0] * (size[1] if len(size) == 2 else 1) for size in self.layer_sizes.values())
        tables = 1 if self.tie_word_embeddings else 2
        return self.num_hidden_layers * layer + tables * self.vocab_size * self.hidden_size + self.hidden_size


SHAPES = {
    #                     D     L   N   K    H      I       V  tied
    # One fortieth of tinyllama-1.1b, for a draft beside it.
    "llama-27m": Shape(384, 10, 12, 4, 32, 960, 32000, True, max_position_embeddings=2048),
    "llama-160m": Shape(768, 12, 12, 12, 64, 3072, 32000, False, max_position_embeddings=2048, rms_norm_eps=1e-6),
    "tinyllama-1.1b": Shape(2048, 22, 32, 4, 64, 5632, 32000, False, max_position_embeddings=2048),
    "llama-2-7b": Shape(4096, 32, 32, 32, 128, 11008, 32000, False),
    "llama-3.2-1b": Shape(
        2048, 16, 32, 8, 64, 8192, 128256, True, max_position_embeddings=131072, rope_parameters=_llama3_rope(32.0)
    ),
    "llama-3.1-8b": Shape(
        4096, 32, 32, 8, 128, 14336, 128256, False, max_position_embeddings=131072, rope_parameters=_llama3_rope(8.0)
    ),
}
