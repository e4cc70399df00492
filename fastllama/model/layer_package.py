"""A layer of the decode step, compiled ahead of time and kept on disk: for every layer, cache length and process.

Legend: B batch, S cache positions, D head dim, E hidden size.
"""

import functools
import hashlib
import sys
import tempfile
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from torch.utils import _pytree as pytree
from transformers.utils import logging

from fastllama.cache.small_cache import Parts
from fastllama.kernels import compiler, native
from fastllama.kernels.whole_file import one_process, whole
from fastllama.model.forward import step_block
from fastllama.model.sources import does_as_its_class
from fastllama.model.weights import Block, Heads

logger = logging.get_logger("fastllama")

# Whatever the trace may follow. A change of any of it asks for new packages.
_SOURCES = [path for name in ("cache", "kernels", "model") for path in Path(__file__).parents[1].glob(f"{name}/*.py")]
# Sizes that differ from call to call, and the ones that are traced with. Torch shares a loop among threads by these.
_SIZES = {"read": 1024, "reserved": 2048}
_MOST = 2**31
_MANY = 3  # packages that are kept on a machine: more are to be expected

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))

Run = Callable[[list[torch.Tensor]], list[torch.Tensor]]
Sized = list[tuple[Any, dict[int, str]]]  # leaves, with the names of the dimensions whose size differs by call
loaded = 0  # packages, in this process


class Own(NamedTuple):
    """What a layer has of its own."""

    block: Block
    heads: Heads
    keys: torch.Tensor | Parts
    values: torch.Tensor | Parts


class Shared(NamedTuple):
    """What a step of one token a row gives every layer. `mask_B11S`: the cache's whole mask, None where it has none."""

    mask_B11S: torch.Tensor | None
    rows_B1: torch.Tensor
    positions_S: torch.Tensor
    index_B1: torch.Tensor
    cos_B1D: torch.Tensor
    sin_B1D: torch.Tensor
    hidden_B1E: torch.Tensor


def _layer(own: Own, shared: Shared) -> torch.Tensor:
    mask_B11S, rows_B1, positions_S, index_B1, *others = shared
    seen_B1 = None
    if mask_B11S is None:
        seen_B1 = index_B1 + 1
    else:
        mask_B11S = mask_B11S[..., : positions_S.shape[0]]
    return step_block(*own, rows_B1, positions_S, index_B1, mask_B11S, seen_B1, *others)


def tensors_of(own: Own) -> list[torch.Tensor]:
    """In the order in which a package takes them."""
    return [leaf for leaf in pytree.tree_leaves(own) if isinstance(leaf, torch.Tensor)]


def _own_sized(own: Own) -> Sized:
    fixed = pytree.tree_leaves((own.block, own.heads))
    cached = pytree.tree_leaves((own.keys, own.values))
    return [*((leaf, {}) for leaf in fixed), *((leaf, {2: "reserved"}) for leaf in cached)]


def _sized(own: Own, shared: Shared) -> Sized:
    names: dict[str, dict[int, str]] = {"mask_B11S": {3: "reserved"}, "positions_S": {0: "read"}}
    return [*_own_sized(own), *((leaf, names.get(name, {})) for name, leaf in shared._asdict().items())]


def _is_plain(module: nn.Module) -> bool:
    """Whether an activation is torch's or transformers' own, has no tensors, and computes what its class does."""
    return (
        _is_theirs(type(module))
        and does_as_its_class(module)
        and not any((module._parameters, module._buffers, module._modules))
    )


def _is_theirs(what: Any) -> bool:
    """Whether a class or function is one of torch's or transformers', whose name and version say what it does."""
    return (what.__module__ or "").startswith(("torch.", "transformers.")) and "<" not in what.__qualname__


def _named(what: Any) -> str:
    return f"{what.__module__}.{what.__qualname__}"


def _described(leaf: Any, sizes: dict[int, str]) -> str:
    if isinstance(leaf, torch.Tensor):
        if leaf.device.type != "cpu":
            raise ValueError("a tensor is not on the CPU")
        if sizes:
            if not leaf.is_contiguous():
                raise ValueError("the cache has a layout of its own")
            return f"{leaf.dtype} {[sizes.get(dim, size) for dim, size in enumerate(leaf.shape)]}"
        return f"{leaf.dtype} {list(leaf.shape)} {leaf.stride()}"
    if leaf is None or isinstance(leaf, (bool, int, float, str)):
        return repr(leaf)
    if isinstance(leaf, nn.Module) and _is_plain(leaf):
        own = {name: value for name, value in vars(leaf).items() if name not in _OF_EVERY_MODULE or name == "training"}
        return f"{_named(type(leaf))} { {name: _described(value, {}) for name, value in own.items()} }"
    functions = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)  # transformers' GELUs hold one
    if isinstance(leaf, functions) and _is_theirs(leaf):
        return _named(leaf)
    raise ValueError(f"a {type(leaf).__name__} takes part")


@functools.cache
def _sources() -> str:
    content = b"".join(path.read_bytes() for path in sorted(_SOURCES))
    return f"{hashlib.sha256(content).hexdigest()} {native.library_name()} transformers {transformers.__version__}"


def obstacle(own: Own) -> str | None:
    """Why there can be no package of such a layer; None where there can."""
    if sys.platform != "linux":
        return "a layer is compiled ahead of time on Linux alone"
    try:
        for leaf, sizes in _own_sized(own):
            _described(leaf, sizes)
    except ValueError as reason:
        return str(reason)
    return None


def name_of(own: Own, shared: Shared) -> str:
    """What the package of such a layer is kept under. Raises `ValueError` where there is an `obstacle`."""
    world = [_sources(), str(torch.get_num_threads()), str(torch.get_default_dtype())]
    sized = _sized(own, shared)
    structure = str(pytree.tree_structure((own, shared)))
    words = "\n".join((*world, structure, *(_described(*each) for each in sized)))
    return hashlib.sha256(words.encode()).hexdigest()[:20]


def _example(tensor: torch.Tensor, sizes: dict[int, str]) -> torch.Tensor:
    """Of the same kind, and nothing in it: a weight's memory is never touched."""
    if not sizes:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    shape = [_SIZES[sizes[dim]] if dim in sizes else size for dim, size in enumerate(tensor.shape)]
    return torch.empty(shape, dtype=tensor.dtype)


class _Program(nn.Module):
    """`_layer` as a function of its tensors alone."""

    def __init__(self, own: Own, shared: Shared):
        super().__init__()
        leaves, self._structure = pytree.tree_flatten((own, shared))
        self._constants = [None if isinstance(leaf, torch.Tensor) else (leaf,) for leaf in leaves]

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        rest = iter(tensors)
        leaves = [next(rest) if constant is None else constant[0] for constant in self._constants]
        return _layer(*pytree.tree_unflatten(leaves, self._structure))


def _compile(own: Own, shared: Shared, path: Path, one_of_many: bool = False) -> None:
    dims = {name: torch.export.Dim(name, min=1 if name == "read" else 2, max=_MOST) for name in _SIZES}
    sized = [(leaf, sizes) for leaf, sizes in _sized(own, shared) if isinstance(leaf, torch.Tensor)]
    examples = tuple(_example(leaf, sizes) for leaf, sizes in sized)
    shapes = tuple({dim: dims[name] for dim, name in sizes.items()} or None for _, sizes in sized)
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # torch's own, about torch's own
        traced = torch.export.export(_Program(own, shared), examples, dynamic_shapes=(shapes,), strict=False)
        compiler.package(traced, path, "compile='static'", one_of_many)


def load(name: str, own: Own, shared: Shared) -> Run:
    """What runs the layer of that `name_of`, compiled now unless it is kept: takes a list of `tensors_of(own)` and
    of what `shared` has, and returns one of hidden [B, 1, E].
    """
    folder = native.cache_folder() / "layers" / native.machine() / name
    path = folder / "layer.pt2"
    try:
        with one_process(folder):
            if path.exists():
                try:
                    return _loaded(path)
                except RuntimeError:  # it is not whole: the disk's affair, and made anew
                    path.unlink()
            with whole(path) as unfinished:
                _compile(own, shared, unfinished, len(list(folder.parent.glob("*/layer.pt2"))) >= _MANY)
            return _loaded(path)
    except OSError as fault:  # nothing can be kept there
        logger.warning_once(f"fastllama: the compiled layer is not kept, so every process compiles it anew: {fault}")
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "layer.pt2"
            _compile(own, shared, path)
            return _loaded(path)


def _loaded(path: Path) -> Run:
    global loaded
    # A runner for each model, without locks: calls of one model wait for each other already, and two that shared one
    # would wait for each other and for Python's own lock in turns.
    run = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, -1).boxed_run
    loaded += 1
    return run
