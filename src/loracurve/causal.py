"""Causal rows without a mask, so that attention runs its causal kernel.

transformers leaves the mask of plain causal rows out by itself, except while a CUDA graph is captured or a layer is
compiled: there it makes one, and attention falls back to slower kernels. Whether rows are plain is known here.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from loracurve.layers import Route

__all__ = ["PlainCausal"]


class PlainCausal:
    """Takes the mask away from decoder layers while rows are plain causal ones (`Route.plain`).

    Args:
        model: a causal language model.
        stack: name of its decoder layers, the stack that holds the curve; None: nothing is done.
        route: where it is read whether the rows are plain.
    """

    def __init__(self, model: nn.Module, stack: str | None, route: Route) -> None:
        self.route, self.config = route, getattr(model, "config", None)
        sliding = getattr(self.config, "sliding_window", None) is not None and getattr(
            self.config, "use_sliding_window", True
        )
        kinds = getattr(self.config, "layer_types", None) or ["full_attention"]
        self.possible = stack is not None and not sliding and set(kinds) == {"full_attention"}
        if stack is not None and self.possible:
            for layer in model.get_submodule(stack).children():
                layer.register_forward_pre_hook(lambda _, args, kwargs: (args, self(kwargs)), with_kwargs=True)

    def __call__(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a decoder layer, without the mask where it says no more than causal."""
        implementation = getattr(self.config, "_attn_implementation", None)
        if not (self.possible and self.route.plain and implementation == "sdpa" and "attention_mask" in kwargs):
            return kwargs
        return kwargs | {"attention_mask": None}
