"""CapturedStep: a compiled step replayed as CUDA graphs, one per bucket."""

from collections.abc import Callable
from typing import Any

import torch

_WARM_UP_CALLS = 3  # compile, settle the allocator, settle cuBLAS workspaces


class CapturedStep:
    """Calls like `model.forward.step`; captures a graph the first time it sees a bucket and replays it after that.

    Keys, values, mask and write positions are the caller's static tensors. Ids, indices, cosines and sines change
    their address from call to call, so they are copied into buffers that the graphs read. Logits are copied out.
    """

    def __init__(self, compiled: Callable):
        self.compiled = compiled
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self.logits: dict[tuple[int, int], torch.Tensor] = {}
        self.inputs: dict[int, tuple[torch.Tensor, ...]] = {}
        self.pool: Any = None
        self.stream: torch.cuda.Stream | None = None

    def reset(self) -> None:
        """Forgets the graphs, which hold the addresses of the weights they were captured with."""
        self.graphs.clear()
        self.logits.clear()
        self.pool = None

    def __call__(
        self, weights, keys, values, mask, valid_past_index, rows, positions, ids, index, cos, sin
    ) -> torch.Tensor:
        with torch.cuda.device(ids.device):
            return self._replay(weights, keys, values, mask, valid_past_index, rows, positions, ids, index, cos, sin)

    def _replay(
        self, weights, keys, values, mask, valid_past_index, rows, positions, ids, index, cos, sin
    ) -> torch.Tensor:
        tokens = ids.shape[1]
        if tokens not in self.inputs:
            self.inputs[tokens] = tuple(x.clone() for x in (ids, index, cos, sin))
        static = self.inputs[tokens]
        for buffer, value in zip(static, (ids, index, cos, sin), strict=True):
            buffer.copy_(value)
        key = (positions.shape[0], tokens)
        if key not in self.graphs:
            self._capture(key, (weights, keys, values, mask, valid_past_index, rows, positions, *static))
        self.graphs[key].replay()
        return self.logits[key].clone()

    def _capture(self, key: tuple[int, int], arguments: tuple) -> None:
        valid_past_index = arguments[4]
        before = valid_past_index.clone()
        # One stream for everything: cuBLAS keeps a workspace for each stream it has seen.
        self.stream = self.stream or torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(_WARM_UP_CALLS):
                self.compiled(*arguments)
                valid_past_index.copy_(before)
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            self.logits[key] = self.compiled(*arguments)
        self.pool = graph.pool() if self.pool is None else self.pool
        self.graphs[key] = graph


def captured(compiled: Callable, products: list) -> Callable[[torch.Tensor], None]:
    """`compiled(products, x)` as a CUDA graph that is captured at the first call and replayed after that, for an x that
    stays where it is. What it computes is not read."""
    graph = None

    def run(x: torch.Tensor) -> None:
        nonlocal graph
        with torch.cuda.device(x.device):
            if graph is None:
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    for _ in range(_WARM_UP_CALLS):
                        compiled(products, x)
                torch.cuda.current_stream().wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=stream):
                    compiled(products, x)
            graph.replay()

    return run
