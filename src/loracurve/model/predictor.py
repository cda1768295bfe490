"""Predictions of a model that carries a curve: several points in a pass, or one folded into the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import peft
import torch
from torch import Tensor, nn

from loracurve.model.cuda_graphs import Captured, map_tensors
from loracurve.model.routes import Layout, Route
from loracurve.model.runner import CurveCarrier
from loracurve.tasks.batching import Batch

__all__ = ["CurvePredictor"]


MOST_LOGITS = 2**29
"""Of a pass at several points: texts are read out at many places for the whole vocabulary, 2 GiB of float32 here."""


class CurvePredictor(CurveCarrier):
    """Log-probabilities at points of the curve."""

    def __init__(self, base: nn.Module, config: peft.LoraConfig) -> None:
        super().__init__(base, config)
        self._merged_graphs: Captured | None = None

    def point_log_probs(self, batch: Batch, t: Tensor, tokens_per_pass: int | None = None) -> Tensor:
        """log p(y | x, theta(t_i)): [n, E, C] for t [n], or for coefficients [n, K] of points beside the curve; points
        are run together as far as `tokens_per_pass` and `MOST_LOGITS` allow.

        Without gradients, shapes that come back are captured in CUDA graphs. Default of `tokens_per_pass`: 16,384 on
        the CPU, 65,536 elsewhere.
        """
        t = t.to("cpu", torch.float64)
        c = t if t.dim() == 2 else self.coefficients(t)
        if self._graphs is None:
            self._graphs = Captured(self._request_log_probs, self.device, not self.sharded)
        run = self._request_log_probs if torch.is_grad_enabled() else self._graphs
        mode = (self.training, torch.is_inference_mode_enabled())
        outputs = []
        for part in c.split(self._points_in_pass(batch, tokens_per_pass)):
            request = _Request(batch, *self.arrange(batch, part), mode)
            outputs.append(run(request if run is self._graphs else map_tensors(request, lambda x: x.to(self.device))))
        return torch.cat(outputs)

    def _points_in_pass(self, batch: Batch, tokens_per_pass: int | None = None) -> int:
        budget = tokens_per_pass or (16_384 if self.device.type == "cpu" else 65_536)
        classes = self.vocabulary if batch.answer_ids is None else len(batch.answer_ids)
        logits = 0 if batch.positions is None else len(batch.positions) * classes
        return max(1, min(budget // max(batch.tokens, 1), MOST_LOGITS // max(logits, 1)))

    def passes(self, batch: Batch, points: int) -> int:
        """Forward passes that `point_log_probs` takes."""
        return -(-points // self._points_in_pass(batch))

    def idle(self) -> None:
        """A forward pass for nothing but its communication with other processes."""
        self._set_route(Route("base"))
        self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device))

    def _request_log_probs(self, request: _Request) -> Tensor:
        return self.scores(request.batch, request.coefficients, request.layout).log_softmax(-1)

    @contextmanager
    def merged(self, t: float) -> Iterator[None]:
        """Fold the point t into copies of the touched weights: a whole data set then costs what the base costs."""
        with self.merging() as fold:
            fold(t)
            yield

    @contextmanager
    def merging(self) -> Iterator[Callable[[Tensor | float], None]]:
        """For points one after the other: yields a function that folds t, or a point beside the curve with
        coefficients [K], into one copy of the touched weights."""

        def fold(where: Tensor | float) -> None:
            point = torch.as_tensor(where, dtype=torch.float64, device="cpu")
            c = point if point.dim() else self.coefficients(point)
            for layer in self.layers.values():
                layer.merge(c)
            self._set_route(Route("merged"))

        self._merged_graphs = Captured(self._request_log_probs, self.device)
        try:
            yield fold
        finally:
            for layer in self.layers.values():
                layer.unmerge()
            self._merged_graphs = None
            self._set_route(Route("base"))

    def merged_log_probs(self, batch: Batch) -> Tensor:
        """Inside `merging`, without gradients: log p(y | x) at the point folded in last, [1, E, C]."""
        assert self._merged_graphs is not None, "merged_log_probs belongs inside merging"
        mode = (self.training, torch.is_inference_mode_enabled())
        return self._merged_graphs(_Request(batch, None, Layout("merged"), mode))


@dataclass
class _Request:
    """What a prediction depends on beside the weights: the key of its graph."""

    batch: Batch
    coefficients: Tensor | None
    layout: Layout
    mode: tuple[bool, bool]
