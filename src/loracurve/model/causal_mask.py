"""Causal rows without a mask, so that attention runs its causal kernel.

transformers leaves the mask of plain causal rows out by itself, but some versions not while a CUDA graph is captured:
attention then falls back to slower kernels. Calls before the capture show what transformers would do.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from loracurve.model.cuda_graphs import capturing
from loracurve.model.routes import Route

__all__ = ["PlainCausal"]


class PlainCausal:
    """While a graph is captured, takes the mask from the layers that got none for such rows before.

    Args:
        model: a language model.
        stack: name of its layers, the stack that holds the curve; None: nothing is done.
        route: where it is read whether the rows are plain causal ones.
    """

    def __init__(self, model: nn.Module, stack: str | None, route: Route) -> None:
        self.route = route
        self.had_none: dict[tuple[nn.Module, int], bool] = {}
        """by layer and row length: whether plain rows came without a mask"""
        for layer in model.get_submodule(stack).children() if stack is not None else ():
            layer.register_forward_pre_hook(self._hook, with_kwargs=True)

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of a layer's call, without the mask if it is known to say no more than causal."""
        if not self.route.plain or not args or "attention_mask" not in kwargs:
            return kwargs
        key = layer, args[0].shape[1]
        if not capturing():
            self.had_none[key] = kwargs["attention_mask"] is None
        elif self.had_none.get(key, False):
            return kwargs | {"attention_mask": None}
        return kwargs

    def _hook(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, self(layer, args, kwargs)
