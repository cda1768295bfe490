"""Compiled decoder layers: `torch.compile` fuses what lies between the matrix products, the base model's own part too.

All layers of a stack are of one kind, so one of them is compiled and serves the others. Positions on the curve enter as
tensors: nothing is compiled again for other points. The first layer is compiled once more where its input needs no
gradient, and so is every layer when lengths first change (from then on they are symbols).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from loracurve.system.errors import one_line

__all__ = ["as_written", "compile_layers", "run_as_they_are"]


logger = logging.getLogger("loracurve")

# Training and evaluation, ways to run and kinds of masks each have code of their own; the default of 8 is too few.
VARIANTS = 64

# Layer, arguments and keyword arguments of a call -> its keyword arguments.
Prepare = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], dict[str, Any]]


class _Fallback:
    """Calls compiled layers, and the layers themselves from the first failure to compile on."""

    def __init__(self, layer: nn.Module, compiled: Any, prepare: Prepare, shared: dict[str, bool]) -> None:
        self.layer, self.compiled, self.prepare, self.shared = layer, compiled, prepare, shared

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.shared["failed"]:
            try:
                return self.compiled(*args, **self.prepare(self.layer, args, kwargs))
            except torch._dynamo.exc.TorchDynamoException as error:
                self.shared["failed"] = True
                logger.warning("running without compiled layers: %s", one_line(error, 300))
        plain: Any = self.layer._call_impl
        return plain(*args, **kwargs)


def compile_layers(layers: Iterable[nn.Module], prepare: Prepare, **options: Any) -> None:
    """Compile the layers of a stack at their next call.

    Where that fails they run as they are, after one warning. A failure can only come from compiling, before anything
    ran. Layers that are compiled stay so.

    Args:
        layers: modules of one kind.
        prepare: changes the keyword arguments of a layer before they decide which code it needs.
        options: of `torch.compile`.
    """
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, VARIANTS)
    shared = {"failed": False}
    for layer in layers:
        if isinstance(layer._compiled_call_impl, _Fallback):  # one after the other, fits share what is compiled
            continue
        call: Any = layer._call_impl
        layer._compiled_call_impl = _Fallback(layer, torch.compile(call, **options), prepare, shared)


@contextmanager
def as_written(model: nn.Module) -> Iterator[None]:
    """Inside the block compiled layers of a model run as they are, so that nothing is compiled for what runs there."""
    kept = [(m, m._compiled_call_impl) for m in model.modules() if m._compiled_call_impl is not None]
    run_as_they_are(module for module, _ in kept)
    try:
        yield
    finally:
        for module, compiled in kept:
            module._compiled_call_impl = compiled


def run_as_they_are(layers: Iterable[nn.Module]) -> None:
    """Undo `compile_layers`."""
    for layer in layers:
        layer._compiled_call_impl = None
