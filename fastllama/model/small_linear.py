"""Modules whose weights are held in few bits: they stand where transformers' Llama has Linear and Embedding.

Legend: N rows (out features, or the vocabulary), K columns.

`weight` holds the quants and `weight_scale` their scales, laid out as kernels/small_product.py says. They bear the
float weight's name so that transformers without us refuses such a checkpoint, by their shapes, and invents nothing.
"""

import torch
from torch import nn

from fastllama.kernels.small_product import Expanded, Small, dequantise, dequantise_rows, native_obstacle, shapes
from fastllama.model.released_small import SMALL_TENSORS, ReleasedSmall


class _Held(nn.Module):
    """A weight [N, K] in a format, as two buffers that no cast changes."""

    def __init__(self, rows: int, columns: int, format: str):
        super().__init__()
        self.rows, self.columns, self.format = rows, columns, format
        for name, (shape, dtype) in zip(SMALL_TENSORS, shapes(format, rows, columns), strict=True):
            self.register_buffer(name, torch.empty(shape, dtype=dtype))

    def hold(self, quants: torch.Tensor, scales: torch.Tensor) -> None:
        """Takes what `quantise` made."""
        for name, tensor in zip(SMALL_TENSORS, (quants, scales), strict=True):
            # Else transformers would initialise it.
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]
            setattr(self, name, tensor)

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [N, K] that is meant."""
        return dequantise(self.weight, self.weight_scale, self.format, self.rows, self.columns, dtype)

    def extra_repr(self) -> str:
        return f"{self.columns}, {self.rows}, {self.format}"

    def _apply(self, fn, recurse=True):
        # As bytes, they move and are shared like any tensor; a cast leaves them alone.
        dtypes = {name: self._buffers[name].dtype for name in SMALL_TENSORS}
        for name in dtypes:
            self._buffers[name] = self._buffers[name].view(torch.uint8)
        try:
            return super()._apply(fn, recurse)
        finally:
            for name, dtype in dtypes.items():
                self._buffers[name] = self._buffers[name].view(dtype)


class SmallLinear(_Held):
    """nn.Linear with a small weight: x [..., K] -> [..., N] in x's dtype. Not trained; gradients reach x."""

    def __init__(self, in_features: int, out_features: int, bias: bool, format: str):
        super().__init__(out_features, in_features, format)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _product(self, self.bias, x)(x)


class SmallEmbedding(_Held):
    """nn.Embedding whose one matrix is the output's too: int64 [...] -> [..., K] in the dtype of the other weights."""

    def __init__(self, num_embeddings: int, embedding_dim: int, format: str):
        super().__init__(num_embeddings, embedding_dim, format)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.register_buffer("like", torch.empty(0), persistent=False)  # follows casts, for its dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return dequantise_rows(self.weight, self.weight_scale, self.format, self.columns, ids, self.like.dtype)


class SmallHead(nn.Module):
    """The output matrix of tied embeddings: a `SmallEmbedding`'s, which it neither owns nor copies."""

    bias = None

    def __init__(self, embedding: SmallEmbedding):
        super().__init__()
        self.__dict__["embedding"] = embedding  # not as a child: its tensors have one name
        self.in_features, self.out_features = embedding.columns, embedding.rows

    @property
    def weight(self) -> torch.Tensor:
        return self.embedding.weight

    @property
    def weight_scale(self) -> torch.Tensor:
        return self.embedding.weight_scale

    @property
    def format(self) -> str:
        return self.embedding.format

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _product(self, None, x)(x)


def _product(module: nn.Module, bias: torch.Tensor | None, x: torch.Tensor) -> Small | Expanded:
    # The C++ product has no gradient.
    trained = torch.is_grad_enabled() and x.requires_grad
    native = not trained and native_obstacle(module.format, x.device) is None
    kind = Small if native else Expanded
    return kind(module.weight, module.weight_scale, bias, module.format, module.out_features, module.in_features)


def is_small(module: nn.Module) -> bool:
    """Whether the module multiplies by a weight that is held in few bits."""
    return type(module) in (SmallLinear, SmallHead)


def held_format(model: nn.Module) -> str | None:
    """The format in which the model's layers hold their weights; None for floats."""
    down = model.model.layers[0].mlp.down_proj
    return down.format if type(down) is SmallLinear else None


def small_tensors(model: nn.Module) -> list[torch.Tensor]:
    """Every tensor that holds small weights, each once: the buffers, or what holds them while they are packed."""
    found: dict[int, torch.Tensor] = {}
    for module in model.modules():
        if isinstance(module, _Held):
            buffers = module.__dict__["_buffers"]
            packed = isinstance(buffers, ReleasedSmall)
            found |= {id(x): x for x in (buffers.instead if packed else map(buffers.get, SMALL_TENSORS))}
    return list(found.values())
