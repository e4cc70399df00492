"""A checkpoint: found, checked to be a Llama that fits in memory, and loaded."""

import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM as VanillaLlama

from fastllama import demo
from fastllama.cache.budget import available_bytes
from fastllama.demo.shapes import SHAPES
from fastllama.kernels.blocks import FORMATS
from fastllama.lab.fault import explained, sentence
from fastllama.lab.measuring.environment import has_bf16_products
from fastllama.lab.points.point import Point
from fastllama.model import footprint
from fastllama.model.small_loading import METHOD

# Above this many parameters a CPU that multiplies bf16 is better off with half the bytes.
_HALF_ABOVE = 500_000_000
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Checkpoint:
    """Where a model lies, and its configuration."""

    name: str  # as asked for
    place: str  # a folder, or a hub name
    config: LlamaConfig

    @property
    def parameter_count(self) -> int:
        """Parameters, each tied one counted once."""
        return sum(parameter.numel() for parameter in self._outline().parameters())

    def weight_bytes(self, dtype: torch.dtype, weights: str | None) -> int:
        """Bytes of the weights, each tied one counted once: in `weights`, a name of `WEIGHTS`, or as floats."""
        return footprint.weight_bytes(self.config, weights, dtype).total

    def _outline(self) -> VanillaLlama:
        with torch.device("meta"):
            return VanillaLlama(self.config)


def find(name: str, dtype: torch.dtype) -> Checkpoint:
    """Resolve a name and read its configuration.

    Raises `FileNotFoundError` for a path that is not there, `OSError` for a hub name that cannot be reached,
    `ValueError` for a model that is not a Llama.
    """
    return _read(name, demo.resolve(name, dtype))


def outline(name: str, dtype: torch.dtype) -> Checkpoint:
    """As `find`, but nothing is built: a model that would be built for it is known by its configuration alone."""
    config = demo.configuration(name, dtype)
    return Checkpoint(name, name, config) if config is not None else _read(name, demo.resolve(name, dtype))


def _read(name: str, place: str) -> Checkpoint:
    if not Path(place).expanduser().is_dir():
        if _HUB_NAME.fullmatch(place) is None or Path(place).exists():
            raise FileNotFoundError(f"there is no model folder {name}")
    else:
        place = str(Path(place).expanduser())
    try:
        config = AutoConfig.from_pretrained(place)
    except ValueError as fault:
        raise ValueError(f"{name} is not a Llama checkpoint: {sentence(fault)}") from fault
    except OSError as fault:
        raise OSError(f"cannot load {name}: {sentence(fault)}") from fault
    if config.model_type != "llama":
        raise ValueError(f"{name} is a {config.model_type} checkpoint, and only Llama runs here")
    quantised = getattr(config, "quantization_config", None) or {}
    if quantised.get("quant_method") == METHOD:
        held = quantised.get("weights")
        raise ValueError(
            f"{name} holds its weights as {held}, which transformers' own model cannot load to be compared with: give "
            f"the float checkpoint and --weights {held}"
        )
    return Checkpoint(name, place, config)


def auto_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(name: str) -> str:
    """The device's name, or `ValueError` if torch does not know it or cannot use it here."""
    try:
        torch.empty(1, device=torch.device(name)).fill_(0)
    except (RuntimeError, AssertionError, NotImplementedError) as fault:
        raise ValueError(f"device {name!r} cannot be used: {sentence(fault)}") from fault
    if torch.device(name).type == "meta":
        raise ValueError("device 'meta' holds no numbers: choose cpu or an accelerator")
    return name


def auto_dtype(name: str, device: str) -> str:
    """A dtype that is sensible for this model on this device."""
    if torch.device(device).type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if torch.device(device).type != "cpu":
        return "fp16"
    if not has_bf16_products():
        return "fp32"
    body = SHAPES.get(name.partition(":")[2])
    # Building a model only to count it would cost minutes.
    count = body.parameters if body is not None else find(name, torch.bfloat16).parameter_count
    return "bf16" if count > _HALF_ABOVE else "fp32"


def require_room(checkpoint: Checkpoint, point: Point) -> None:
    """Raises `MemoryError` before any work if the weights and one cache cannot fit."""
    device, itemsize = torch.device(point.device), point.torch_dtype.itemsize
    weights = checkpoint.weight_bytes(point.torch_dtype, None)
    if device.type != "cpu":  # of its own, while all share the memory of a CPU
        weights //= point.world_size
    if point.weights is not None:  # transformers' own model has floats of its own beside them
        weights += checkpoint.weight_bytes(point.torch_dtype, point.weights)
    cache = position_bytes(checkpoint.config, itemsize) * point.workload.batch_size * point.positions
    draft = point.assistance.draft_model(point.model)
    there = point.assistance.draft_device
    if draft is not None and (there is None or torch.device(there).type == device.type):
        beside = outline(draft, point.torch_dtype)
        weights += beside.weight_bytes(point.torch_dtype, point.assistance.draft_weights)
        cache += position_bytes(beside.config, itemsize) * point.workload.batch_size * point.positions
    free = available_bytes(device)
    if weights + cache > free:
        raise MemoryError(
            f"{point.model_name} with batch {point.workload.batch_size} and a cache of {point.positions} takes "
            f"{weights / 1e9:.1f} + {cache / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on {device.type}"
        )


def position_bytes(config: LlamaConfig, itemsize: int, cache_k: str | None = None, cache_v: str | None = None) -> int:
    """Bytes of one row's keys and values at one position, all layers; a format that is None is the model's dtype."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sides = (
        head_dim * itemsize if name is None else FORMATS[name].row_bytes(head_dim, itemsize)
        for name in (cache_k, cache_v)
    )
    return config.num_hidden_layers * config.num_key_value_heads * sum(sides)


def load(checkpoint: Checkpoint, cls, dtype: torch.dtype, device: torch.device, **arguments):
    """(model in eval mode, seconds) of cls.from_pretrained, which is given the `arguments` too.

    Raises `ValueError` for corrupt or missing weights, `MemoryError` when they do not fit.
    """
    if "distributed_config" not in arguments and device.type != "cpu":
        arguments |= {"device_map": {"": device}}
    start = time.perf_counter()
    try:
        with explained(checkpoint.name):
            model, notes = cls.from_pretrained(checkpoint.place, dtype=dtype, output_loading_info=True, **arguments)
    except OSError as fault:
        raise OSError(f"cannot load {checkpoint.name}: {sentence(fault)}") from fault
    seconds = time.perf_counter() - start
    # transformers invents what a checkpoint lacks and goes on; a measurement of that would be of nothing.
    lacking = sorted(notes["missing_keys"]) + [str(entry) for entry in notes["mismatched_keys"]]
    if lacking:
        raise ValueError(f"the checkpoint {checkpoint.name} lacks {len(lacking)} tensors, the first is {lacking[0]}")
    return model.eval(), seconds


def tokenizer(checkpoint: Checkpoint) -> transformers.PreTrainedTokenizerBase:
    """The model's own tokenizer. `ValueError` where the checkpoint has none."""
    try:
        return AutoTokenizer.from_pretrained(checkpoint.place)
    except (OSError, ValueError, KeyError) as fault:
        raise ValueError(f"{checkpoint.name} has no tokenizer that transformers reads: {sentence(fault)}") from fault
