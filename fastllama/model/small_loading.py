"""Weights of few bits through transformers' own loading: quantised tensor by tensor, and saved and loaded as they are.

The quantiser is known to transformers while one of our models is being loaded, and not before or after.
"""

import contextlib
import math
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from fastllama.kernels.small_product import check, quantise, shapes
from fastllama.kernels.small_weights import WEIGHTS, canonical, head_format
from fastllama.model.small_linear import SmallEmbedding, SmallHead, SmallLinear

METHOD = "fastllama"
_FLOAT8_CAPABILITY = (8, 9)
# What the from_pretrained call in progress, in this thread, asks for.
_asked: ContextVar[str | None] = ContextVar("asked", default=None)
_lock = threading.Lock()
_calls = 0


class _Refused(BaseException):
    """Not an Exception: transformers would go on to the next tensor, and raise at the end in words of its own."""


class SmallWeightsConfig(QuantizationConfigMixin):
    """What a checkpoint's config.json says of its small weights. Raises `ValueError` for an unknown format."""

    def __init__(self, weights: str, quant_method: str = METHOD):
        if weights not in WEIGHTS:
            raise ValueError(f"weights={weights!r} is not allowed; allowed: {', '.join(WEIGHTS)}")
        self.quant_method: Any = quant_method  # ours is none of transformers' own
        self.weights = canonical(weights)


class SmallWeightsQuantizer(HfQuantizer):
    """transformers' hooks into loading and saving. `pre_quantized` says that the checkpoint is small already."""

    requires_calibration = False

    def __init__(self, quantization_config: SmallWeightsConfig, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self.format = quantization_config.weights
        asked = _asked.get()
        if self.pre_quantized and asked not in (None, self.format):
            raise ValueError(
                f"weights={asked!r} cannot be honoured: the checkpoint holds {self.format}, and its floats are gone"
            )

    def validate_environment(self, *args, device_map=None, **kwargs):
        """Raises `ValueError` for float8 on a device that has none, and for a model on disk."""
        devices = [] if device_map is None else list(device_map.values()) if isinstance(device_map, dict) else [None]
        if "disk" in devices:
            raise ValueError(f"weights={self.format!r} cannot be honoured: device_map leaves a part on disk")
        if self.format == "float8":
            _require_float8(devices or ["cpu"])

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs) -> bool:
        name, _, tensor = param_name.rpartition(".")
        if self.pre_quantized or tensor != "weight":
            return False
        module = model.get_submodule(name)
        return isinstance(module, (nn.Linear, SmallLinear)) or (_is_tied(model) and name == _embedding_name(model))

    def param_element_size(self, model: nn.Module, param_name: str, param: torch.Tensor) -> float:
        if not self.param_needs_quantization(model, param_name):
            return param.element_size()
        kind = WEIGHTS[self.format]
        return kind.bits / 8 + (2 / kind.group if kind.group else 0)

    def get_quantize_ops(self) -> "Quantise":
        return Quantise(self.format)

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs):
        for name, module in _matrices(model):
            check(self._format_of(model, module), module.in_features, name)
        if self.pre_quantized:
            for name, module in _matrices(model):
                if not (_is_tied(model) and module is model.get_output_embeddings()):
                    model.set_submodule(name, _small_linear(module, self._format_of(model, module)))
            if _is_tied(model):
                tie(model, head_format(self.format))
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs):
        for name, module in model.named_modules():
            if isinstance(module, (SmallLinear, SmallEmbedding)) and not module.weight_scale.float().isfinite().all():
                raise ValueError(f"{name}.weight_scale holds NaN or infinities")
        return model

    def _format_of(self, model: nn.Module, module: nn.Module) -> str:
        return head_format(self.format) if module is model.get_output_embeddings() else self.format

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


class Quantise(ConversionOps):
    """Puts a small module in the place of the float one whose weight has just been read."""

    def __init__(self, format: str):
        self.format = format

    def convert(  # type: ignore[override]  # the rest comes by name, into kwargs
        self, input_dict: dict, *, model=None, full_layer_name=None, missing_keys=None, **kwargs
    ) -> dict:
        """Returns nothing to load: the module holds it."""
        weight = next(iter(input_dict.values()))
        weight = weight[0] if isinstance(weight, list) else weight
        name = full_layer_name.removesuffix(".weight")
        module = model.get_submodule(name)
        expected = (_rows(module), _columns(module))
        if tuple(weight.shape) != expected:
            raise _Refused(f"{full_layer_name} is {tuple(weight.shape)} in the checkpoint and not {expected}")
        is_head = module is model.get_output_embeddings()
        tied = _is_tied(model) and (is_head or name == _embedding_name(model))
        format = head_format(self.format) if is_head or tied else self.format
        try:
            quants, scales = quantise(weight, format)
        except ValueError as fault:
            raise _Refused(f"{full_layer_name} cannot be held as {format}: {fault}") from fault
        if tied:
            _hold_tied(model, quants, scales, format, full_layer_name)
            missing_keys -= {"lm_head.weight", f"{_embedding_name(model)}.weight"}
        else:
            small = _small_linear(module, format)
            small.hold(quants, scales)
            model.set_submodule(name, small)
            missing_keys.discard(full_layer_name)
        return {}


def tie(model: nn.Module, format: str) -> SmallEmbedding:
    """Makes the embedding and the output one small matrix, empty yet; transformers ties nothing from then on."""
    plain = model.get_input_embeddings()
    with torch.device("meta"):
        embedding = SmallEmbedding(plain.num_embeddings, plain.embedding_dim, format)
        embedding.like = embedding.like.to(plain.weight.dtype)
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(SmallHead(embedding))
    model._tied_weights_keys, model.all_tied_weights_keys = None, {}
    return embedding


def _hold_tied(model: nn.Module, quants: torch.Tensor, scales: torch.Tensor, format: str, name: str) -> None:
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, SmallEmbedding):
        tie(model, format).hold(quants, scales)
    elif not (torch.equal(embedding.weight, quants) and torch.equal(embedding.weight_scale, scales)):
        raise _Refused(
            f"the checkpoint holds two different matrices where its config ties them, the second is {name}: "
            "set tie_word_embeddings=False"
        )


def _small_linear(module: nn.Linear, format: str) -> SmallLinear:
    """Without a weight yet, with the module's bias."""
    with torch.device("meta"):
        small = SmallLinear(module.in_features, module.out_features, module.bias is not None, format)
    if module.bias is not None:
        module.bias.requires_grad_(False)
        small.bias = module.bias
    return small


def _matrices(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _rows(module: nn.Module) -> int:
    return module.out_features if hasattr(module, "out_features") else module.num_embeddings


def _columns(module: nn.Module) -> int:
    return module.in_features if hasattr(module, "in_features") else module.embedding_dim


def _is_tied(model: nn.Module) -> bool:
    return bool(model.config.tie_word_embeddings)


def _embedding_name(model: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is model.get_input_embeddings())


def _require_float8(devices: list) -> None:
    for device in devices:
        kind = "a device of device_map" if device is None else torch.device(device).type
        if device is not None and kind != "cuda":
            raise ValueError(f"weights='float8' cannot be honoured: it is for GPUs, and the model goes to {kind}")
        if not torch.cuda.is_available():
            raise ValueError("weights='float8' cannot be honoured: it is for GPUs, and torch has none here")
        capability = torch.cuda.get_device_capability(device if device is not None else None)
        if capability < _FLOAT8_CAPABILITY:
            raise ValueError(
                f"weights='float8' cannot be honoured: the GPU has capability {capability[0]}.{capability[1]}, and "
                "8.9 is the first with float8"
            )


def small_bytes(model: nn.Module, weights: str) -> Iterator[tuple[nn.Linear, int]]:
    """Each matrix of a float Llama, and the bytes that it takes in `weights`, a name of `WEIGHTS`."""
    for _, module in _matrices(model):
        format = head_format(weights) if module is model.get_output_embeddings() else weights
        sizes = shapes(format, module.out_features, module.in_features)
        yield module, sum(math.prod(shape) * dtype.itemsize for shape, dtype in sizes)


def quantised_by(weights: str | None, arguments: dict) -> dict:
    """The arguments of from_pretrained, with our `quantization_config` where `weights` are asked for."""
    if weights is None:
        return arguments
    if arguments.get("quantization_config") is not None:
        raise ValueError(f"pass either quantization_config or weights={weights!r}, not both: each would quantise")
    return {**arguments, "quantization_config": SmallWeightsConfig(weights)}


@contextlib.contextmanager
def known_to_transformers(weights: str | None) -> Iterator[None]:
    """While it is open, transformers loads checkpoints of small weights; `weights` is what the caller asks for.

    Raises `ValueError` with the tensor's name for a weight that cannot be quantised.
    """
    global _calls
    token, counted = _asked.set(None if weights is None else canonical(weights)), False
    try:
        with _lock:
            _calls += 1
            counted = True
            AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = SmallWeightsConfig
            AUTO_QUANTIZER_MAPPING[METHOD] = SmallWeightsQuantizer
        yield
    except _Refused as refusal:
        raise ValueError(str(refusal)) from refusal.__cause__
    finally:
        _asked.reset(token)
        with _lock:
            _calls -= counted
            if not _calls:
                AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)
                AUTO_QUANTIZER_MAPPING.pop(METHOD, None)
