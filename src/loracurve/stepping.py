"""One optimiser step: eager, or captured whole (forward, backward, optimiser) in a CUDA graph.

At the sizes people fine-tune with, a GPU waits for Python. A captured step is launched at once; what changes from step
to step (tokens, curve points, learning rate) is copied into tensors of fixed place. Nothing in a step looks at a value.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from loracurve.batching import Batch
from loracurve.layers import Layout

__all__ = ["Part", "Program", "StepConfig", "Stepper", "map_tensors"]

logger = logging.getLogger("loracurve")

# Eager steps before a shape is captured: they fill the optimiser's state and the allocator, and count as training.
WARM_UP = 2
# Shapes worth a graph; each holds the activations of a step, shared with the others by one pool.
MOST_GRAPHS = 16


@dataclass
class Part:
    """A micro-batch, made on the CPU, moved to the device by the stepper."""

    batch: Batch
    coefficients: Tensor
    layout: Layout
    share: Tensor
    """weight of this micro-batch, or [E] of each of its examples, in the step's loss"""


class Program(Protocol):
    """What is trained: the loop asks it for micro-batches, losses and validation figures."""

    groups: int
    """Independent things trained side by side (anchors), each clipped, validated and kept on its own; 1 for a curve."""
    figures: tuple[str, ...]
    """Names of what `loss` returns beside the loss."""

    def parts(self, step: int) -> list[Part]:
        """The micro-batches of a step, on the CPU."""

    def loss(self, part: Part) -> tuple[Tensor, Tensor]:
        """What a micro-batch adds to the loss, and its figures [F], detached; runs on the device, looks at no value."""

    def validate(self) -> list[float]:
        """Validation NLL of each group, in nats."""

    def decay_gram(self) -> Tensor:
        """[K, K] G with decay P <- P - lr * weight_decay * G P."""


@dataclass(frozen=True)
class StepConfig:
    """What a step needs of the loop's options."""

    learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    max_grad_norm: float


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply `function` to every tensor in nested dataclasses and lists."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, list):
        return [map_tensors(v, function) for v in value]
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: map_tensors(getattr(value, f.name), function) for f in fields(value)})
    return value


def _signature(value: Any) -> Any:
    """Shapes and plain values: what must agree for a captured step to be used again."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, list):
        return tuple(_signature(v) for v in value)
    if is_dataclass(value) and not isinstance(value, type):
        return tuple((f.name, _signature(getattr(value, f.name))) for f in fields(value))
    return value


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(value, lambda t: found.append(t) or t)  # type: ignore[func-returns-value]
    return found


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    output: Tensor


class Stepper:
    """Takes optimiser steps on stacked control points.

    A loss that is not finite leaves control points and moments as they are, from then on: the loop, which may look only
    now and then, finds the last good state.

    Args:
        program: gives the loss.
        factors: the control points, leading dimension K each.
        mask: [K] which of them are trained.
        config: learning rate, decay, clipping.
        capture: capture steps in CUDA graphs where the device has them.
    """

    def __init__(
        self, program: Program, factors: Sequence[Tensor], mask: Tensor, config: StepConfig, capture: bool = True
    ) -> None:
        self.program, self.factors, self.config = program, factors, config
        device = factors[0].device
        self.mask = mask.to(device)
        # The GPU's fused kernel reads the rate from memory, in float32; the CPU's takes a number.
        self.rate = torch.zeros((), device=device, dtype=torch.float32 if device.type == "cuda" else torch.float64)
        self.bad = torch.zeros((), device=device)
        self.optimizer = torch.optim.AdamW(
            list(factors),
            lr=self.rate if device.type == "cuda" else config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            weight_decay=0.0,
            fused=True,
        )
        # The fused kernel skips the update where this is 1, without telling the host.
        self.optimizer.found_inf = self.bad  # type: ignore[attr-defined]
        self.gram = program.decay_gram().to(device) * self.mask[:, None]
        self.capture = capture and device.type == "cuda"
        self.seen: dict[Any, int] = {}
        self.graphs: dict[Any, _Graph] = {}
        self.stream = torch.cuda.Stream(device) if self.capture else None
        self.pool: Any = None

    def __call__(self, parts: list[Part], factor: float) -> Tensor:
        """Step at `factor` times the peak learning rate; returns [loss, gradient norm, *figures] on the device."""
        self.rate.fill_(self.config.learning_rate * factor)
        device = self.factors[0].device
        if device.type != "cuda":
            self.optimizer.param_groups[0]["lr"] = float(self.rate)
        if not self.capture:
            return self._step(map_tensors(parts, lambda t: t.to(device)))
        key = _signature(parts)
        if (found := self.graphs.get(key)) is not None:
            for place, value in zip(found.inputs, _tensors(parts), strict=True):
                place.copy_(value, non_blocking=True)
            found.graph.replay()
            return found.output.clone()
        assert self.stream is not None
        self.stream.wait_stream(torch.cuda.current_stream())
        # Gradient accumulation remembers the stream of its first use: warm up on the one that is captured.
        with torch.cuda.stream(self.stream):
            moved = map_tensors(parts, lambda t: t.to(device, copy=True))
            self.seen[key] = self.seen.get(key, 0) + 1
            if self.seen[key] > WARM_UP and len(self.graphs) < MOST_GRAPHS:
                output = self._captured(key, moved)
            else:
                output = self._step(moved)
        torch.cuda.current_stream().wait_stream(self.stream)
        return output

    def _captured(self, key: Any, parts: list[Part]) -> Tensor:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                output = self._step(parts)
        except RuntimeError as error:
            logger.warning("steps run without capture: %s", str(error).splitlines()[0])
            self.capture = False
            torch.cuda.synchronize()
            return self._step(parts)
        self.pool = graph.pool()
        self.graphs[key] = _Graph(graph, _tensors(parts), output)
        graph.replay()
        return output.clone()

    def _step(self, parts: list[Part]) -> Tensor:
        for p in self.factors:
            # Kept in place: a captured step accumulates into these very tensors.
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
        total = torch.zeros((), device=self.rate.device)
        figures = torch.zeros(len(self.program.figures), device=self.rate.device)
        for part in parts:
            loss, values = self.program.loss(part)
            loss.backward()
            total = total + loss.detach().float()
            figures = figures + values.float()
        with torch.no_grad():
            self.bad.copy_(torch.maximum(self.bad, (~torch.isfinite(total)).float()))
            for p in self.factors:
                p.grad.mul_(_column(self.mask, p))  # type: ignore[union-attr]
            norm = self._clip()
            self.optimizer.step()
            if self.config.weight_decay:
                scale = self.rate * self.config.weight_decay * (1 - self.bad)
                for p in self.factors:
                    p.sub_(scale.to(p) * (self.gram.to(p) @ p.flatten(1)).view_as(p))
        return torch.stack([total, norm.float(), *figures])

    def _clip(self) -> Tensor:
        """Clip gradients jointly for a curve, by slot for anchors; returns the largest norm before clipping."""
        grads: list[Tensor] = [p.grad for p in self.factors if p.grad is not None]
        if self.program.groups == 1:
            norms = torch.stack(torch._foreach_norm(grads)).norm()[None]
        else:
            norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads]).norm(dim=0)
        if self.config.max_grad_norm > 0:
            scale = (self.config.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
            for g in grads:
                g.mul_(_column(scale, g))
        return norms.max()


def _column(values: Tensor, like: Tensor) -> Tensor:
    """[K] or [1] -> [K, 1, ...] in the dtype of `like`."""
    return values.to(like.dtype).view(-1, *[1] * (like.dim() - 1))
