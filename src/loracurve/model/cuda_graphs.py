"""CUDA graphs of whole functions.

At the sizes people fine-tune with, a GPU waits for Python. A captured function is launched at once; what changes from
call to call is copied into tensors of fixed place. Such a function looks at no value of a tensor.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from loracurve.system.distributed import world

__all__ = ["Captured", "capturing", "map_tensors"]


logger = logging.getLogger("loracurve")

# Eager calls before the first shape is captured: they fill optimiser states and the allocator, and count as real ones.
# Further shapes need one, which finds kernels and compiles.
WARM_UP = 2

# Shapes worth a graph; each holds its activations, in one pool shared by all.
MOST_GRAPHS = 24


def capturing() -> bool:
    """Whether what is launched now becomes part of a graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply `function` to every tensor in nested dataclasses, lists and tuples."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(v, function) for v in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: map_tensors(getattr(value, f.name), function) for f in fields(value)})
    return value


def _signature(value: Any) -> Any:
    """Shapes and plain values: what must agree for a graph to be used again."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, list | tuple):
        return tuple(_signature(v) for v in value)
    if is_dataclass(value) and not isinstance(value, type):
        return tuple((f.name, _signature(getattr(value, f.name))) for f in fields(value))
    return value


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(value, note)
    return found


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    output: Any


class Captured:
    """`function(inputs) -> tensors`, nested as inputs may be, moved to the device, and captured there once a shape of
    inputs comes back.

    On the CPU, with `enabled` false, or where capture fails (one warning says why), the function simply runs.

    Args:
        function: reads its inputs' tensors and whatever else keeps its place in memory.
        device: where it runs; inputs may come from the CPU.
        enabled: capture at all.
        generators: what the function draws from, found after it has run; graphs then follow their seeds.
    """

    def __init__(
        self,
        function: Callable[[Any], Any],
        device: torch.device,
        enabled: bool = True,
        generators: Callable[[], Sequence[torch.Generator]] = list,
    ) -> None:
        self.function, self.device, self.generators = function, device, generators
        self.enabled = enabled and device.type == "cuda"
        self.seen: dict[Any, int] = {}
        self.graphs: dict[Any, _Graph] = {}
        self.stream = torch.cuda.Stream(device) if self.enabled else None
        self.pool: Any = None

    def __call__(self, inputs: Any) -> Any:
        if not self.enabled:
            return self.function(map_tensors(inputs, lambda t: t.to(self.device)))
        key = _signature(inputs)
        if (found := self.graphs.get(key)) is not None:
            for place, value in zip(found.inputs, _tensors(inputs), strict=True):
                # From pinned memory a copy does not wait for the work before it: the next batch is laid out meanwhile.
                place.copy_(value if value.is_cuda else value.pin_memory(), non_blocking=True)
            found.graph.replay()
            return map_tensors(found.output, torch.clone)
        assert self.stream is not None
        self.stream.wait_stream(torch.cuda.current_stream())
        # Gradient accumulation remembers the stream of its first use: warm up on the one that is captured.
        with torch.cuda.stream(self.stream):
            moved = map_tensors(inputs, lambda t: t.to(self.device, copy=True))
            self.seen[key] = self.seen.get(key, 0) + 1
            if self.seen[key] > (1 if self.graphs else WARM_UP) and len(self.graphs) < MOST_GRAPHS:
                output = self._capture(key, moved)
            else:
                output = self.function(moved)
        torch.cuda.current_stream().wait_stream(self.stream)
        return output

    def _capture(self, key: Any, inputs: Any) -> Any:
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators():
            graph.register_generator_state(generator)
        # Threads that watch over other processes ask for events meanwhile.
        mode = "global" if world()[1] == 1 else "thread_local"
        try:
            with _no_garbage(), torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode=mode):
                output = self.function(inputs)
        except RuntimeError as error:
            logger.warning("running without CUDA graphs: %s", str(error).splitlines()[0])
            self.enabled = False
            torch.cuda.synchronize()
            self._release_generators()
            return self.function(inputs)
        self.pool = graph.pool()
        self.graphs[key] = _Graph(graph, _tensors(inputs), output)
        graph.replay()
        return map_tensors(output, torch.clone)

    def _release_generators(self) -> None:
        """A capture that failed leaves its generators waiting for its end, and they draw nothing before: an empty one
        that succeeds ends it."""
        empty = torch.cuda.CUDAGraph()
        for generator in self.generators():
            empty.register_generator_state(generator)
        with _no_garbage(), torch.cuda.graph(empty, stream=self.stream):
            pass


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Graphs that nobody holds any more may not be destroyed while another is captured."""
    gc.collect()
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
