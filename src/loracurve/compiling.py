"""Compiled decoder layers: `torch.compile` fuses what lies between the matrix products, the base model's own part too.

All layers of a stack are of one kind, so one of them is compiled and serves the others. Positions on the curve enter as
tensors: nothing is compiled again for other points. The first layer is compiled once more where its input needs no
gradient, and so is every layer when lengths first change (from then on they are symbols).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

__all__ = ["compile_layers"]

logger = logging.getLogger("loracurve")

# Training and evaluation, ways to run and kinds of masks each have code of their own; the default of 8 is too few.
VARIANTS = 64


class _Fallback:
    """Calls compiled layers, and the layers themselves from the first failure to compile on."""

    def __init__(self, layer: nn.Module, compiled: Any, shared: dict[str, bool]) -> None:
        self.layer, self.compiled, self.shared = layer, compiled, shared

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.shared["failed"]:
            try:
                return self.compiled(*args, **kwargs)
            except torch._dynamo.exc.TorchDynamoException as error:
                self.shared["failed"] = True
                logger.warning("running without compiled layers: %s", " ".join(str(error).split())[:300])
        plain: Any = self.layer._call_impl
        return plain(*args, **kwargs)


def compile_layers(layers: Iterable[nn.Module], **options: Any) -> None:
    """Compile the layers of a stack at their next call.

    Where that fails they run as they are, after one warning. A failure can only come from compiling, before anything
    ran.

    Args:
        layers: modules of one kind.
        options: of `torch.compile`.
    """
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, VARIANTS)
    shared = {"failed": False}
    for layer in layers:
        call: Any = layer._call_impl
        layer._compiled_call_impl = _Fallback(layer, torch.compile(call, **options), shared)
