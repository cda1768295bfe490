"""Running the rows of a batch at several points of the curve in one pass."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from loracurve.model.heads import CurveDense, OutputHead
from loracurve.model.layers import CurveLayer
from loracurve.model.routes import Route

__all__ = ["Replication"]


class Replication:
    """Multiplies rows where they first meet a curve layer.

    Where only upper layers are adapted, the frozen lower ones run once for each row and are shared by all points: hooks
    multiply the hidden states, masks and position embeddings at the boundary. Otherwise the inputs are multiplied.
    Sequence classifiers pool by the input ids, so theirs are always multiplied at the start.

    Args:
        model: with curve layers in it.
        layers: the curve layers by name.
        route: where the replicas and rows of the running pass are read.
        share: whether lower layers may be shared.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, CurveLayer], route: Route, share: bool) -> None:
        self.route = route
        self.shared = 0
        """number of lower layers that run once"""
        self.stack: str | None = None
        """name of the layer stack, where one holds all curve layers but the head"""
        head = getattr(model, "get_output_embeddings", lambda: None)()
        inner = head.inner if isinstance(head, OutputHead) else None
        names = [n for n, layer in layers.items() if layer is not inner and not isinstance(layer, CurveDense)]
        if (found := _stack_of(names)) is not None:
            self.stack, first = found
            self.shared = first if share else 0
            children = dict(model.get_submodule(self.stack).named_children())
            for index, layer in children.items():
                if self.shared and int(index) >= self.shared:
                    layer.register_forward_pre_hook(self._multiply_rows, with_kwargs=True)

    def inputs(self, values: dict[str, Any]) -> dict[str, Any]:
        """The model's inputs, multiplied unless a hook will do it."""
        n = self.route.replicas
        if n == 1 or self.shared:
            return values
        return {k: _repeat(v, n) if isinstance(v, Tensor) else v for k, v in values.items()}

    def _multiply_rows(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        n, rows = self.route.replicas, self.route.rows
        if n == 1:
            return None

        def multiply(value: Any) -> Any:
            if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == rows:
                return _repeat(value, n)
            return tuple(multiply(v) for v in value) if isinstance(value, tuple) else value

        return tuple(multiply(a) for a in args), {k: multiply(v) for k, v in kwargs.items()}


def _stack_of(names: Iterable[str]) -> tuple[str, int] | None:
    """The layer stack that holds all named modules, and the first of its layers that does; None if there is none."""
    places = [re.match(r"(.*?)\.(\d+)\.", name) for name in names]
    stacks = {m[1] if m else None for m in places}
    stack = stacks.pop() if len(stacks) == 1 else None
    return None if stack is None else (stack, min(int(m[2]) for m in places if m))


def _repeat(value: Tensor, n: int) -> Tensor:
    return value.repeat(n, *[1] * (value.dim() - 1))
