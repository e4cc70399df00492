"""LayeredStep: a decode step that runs the same compiled layer for every layer."""

import weakref

import torch

from fastllama.cache.float_cache import FloatCache, mask_for
from fastllama.cache.small_cache import SmallCache
from fastllama.model.forward import Storage, layer_of
from fastllama.model.layer_package import Own, Run, Shared, load, name_of, obstacle, tensors_of
from fastllama.model.weights import Weights


def _own(weights: Weights, keys: Storage, values: Storage) -> list[Own]:
    return [
        Own(block, weights.heads, layer_of(keys, layer), layer_of(values, layer))
        for layer, block in enumerate(weights.blocks)
    ]


def layer_obstacle(weights: Weights, cache: FloatCache | SmallCache) -> str | None:
    """Why a step with such weights and cache cannot be run layer by layer; None where it can."""
    reasons = (obstacle(own) for own in _own(weights, cache.keys, cache.values))
    return next((reason for reason in reasons if reason is not None), None)


def run_layer(run: Run, own: list[weakref.ref], given: list[torch.Tensor], hidden_B1E: torch.Tensor) -> torch.Tensor:
    """One layer of a step; its own function, so that a trace can mark it."""
    (hidden_B1E,) = run([*(tensor() for tensor in own), *given, hidden_B1E])
    return hidden_B1E


class LayeredStep:
    """Calls like `model.forward.step`, for one token a row and without a tree, on a CPU.

    It belongs to the weights and the cache of its first call, and keeps neither alive.
    """

    def __init__(self):
        self._layers: list[tuple[Run, list[weakref.ref]]] = []

    def _bind(self, owns: list[Own], shared: Shared) -> None:
        runs: dict[str, Run] = {}
        layers = []
        for own in owns:
            name = name_of(own, shared)
            if name not in runs:
                runs[name] = load(name, own, shared)
            layers.append((runs[name], [weakref.ref(tensor) for tensor in tensors_of(own)]))
        self._layers = layers  # all or none: an interruption must leave no step of some layers

    def __call__(
        self, weights, keys, values, mask_B11S, valid_past_index, rows_B1, positions_S, ids_B1, index_B1, cos, sin
    ) -> torch.Tensor:
        hidden_B1E = weights.embed(ids_B1)
        shared = Shared(mask_B11S, rows_B1, positions_S, index_B1, cos.contiguous(), sin.contiguous(), hidden_B1E)
        if not self._layers:
            self._bind(_own(weights, keys, values), shared)
        if mask_B11S is not None:
            mask_for(mask_B11S, rows_B1, index_B1, positions_S)  # opens the newest positions
        *given, hidden_B1E = (tensor for tensor in shared if tensor is not None)
        for run, own in self._layers:
            hidden_B1E = run_layer(run, own, given, hidden_B1E)
        valid_past_index.add_(1)
        return weights.lm_head(weights.norm(hidden_B1E))
