"""Folding one adapter or one point of a curve into copies of the weights it touches: the way *merged*."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from loracurve.curve.lora_space import PREFIX
from loracurve.model.cuda_graphs import Captured
from loracurve.model.routes import Layout, Route
from loracurve.model.runner import Request, Runner
from loracurve.model.states import States
from loracurve.tasks.batching import Batch

__all__ = ["Merger"]


class Merger:
    """Folds what a runner runs; a whole data set then costs what the base costs. The curve stays as it is."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self._graphs: Captured | None = None

    @contextmanager
    def points(self) -> Iterator[Callable[[Tensor | float], None]]:
        """For points one after the other: yields a function that folds t, or a point off the curve with coefficients
        [K], into one copy of the touched weights.

        Raises:
            UserError: quantised base weights.
        """
        runner = self.runner

        def fold(where: Tensor | float) -> None:
            point = torch.as_tensor(where, dtype=torch.float64, device="cpu")
            c = point if point.dim() else runner.coefficients(point)
            for layer in runner.layers.values():
                layer.merge(c)
            runner.set_route(Route("merged"))

        self._graphs = Captured(runner.respond, runner.device)
        try:
            yield fold
        finally:
            self._graphs = None
            self._unfold()

    def log_probs(self, batch: Batch) -> Tensor:
        """Inside `points`, without gradients: log p(y | x) at the point folded in last, [1, E, C]."""
        log_probs: Tensor = self._respond(batch, False)[0]
        return log_probs

    def states(self, batch: Batch) -> tuple[Tensor, States]:
        """`log_probs` and the last hidden states that they come from."""
        _ = self.runner.last_map  # found before anything is captured
        log_probs, states = self._respond(batch, True)
        assert states is not None
        return log_probs, states

    def _respond(self, batch: Batch, states: bool) -> tuple[Tensor, States | None]:
        assert self._graphs is not None, "predictions belong inside points"
        mode = (self.runner.model.training, torch.is_inference_mode_enabled())
        found: tuple[Tensor, States | None] = self._graphs(Request(batch, None, Layout("merged"), mode, states))
        return found

    @contextmanager
    def adapter(self, adapter: Mapping[str, Tensor]) -> Iterator[None]:
        """Fold one adapter of any rank.

        Args:
            adapter: by PEFT name, A ``[q, n_in]``, B ``[n_out, q]``, dense heads; all maps of the model. Tensors that
                require gradients get them, where gradients are enabled.

        Raises:
            UserError: a quantised base weight, into which nothing can be folded.
        """
        for name, layer in self.runner.layers.items():
            layer.fold({suffix: adapter[f"{PREFIX}{name}.{suffix}"] for suffix in layer.shapes()})
        self.runner.set_route(Route("merged"))
        try:
            yield
        finally:
            self._unfold()

    def weights(self) -> dict[str, Tensor]:
        """Inside `adapter`: make the merged weights leaves that require gradients.

        Returns:
            The weights by the parameter name of A, dense tensors by their own, in the base layer's layout.
        """
        return {
            f"{PREFIX}{name}.{suffix}": leaf
            for name, layer in self.runner.layers.items()
            for suffix, leaf in layer.merged_leaves().items()
        }

    def _unfold(self) -> None:
        for layer in self.runner.layers.values():
            layer.unmerge()
        self.runner.set_route(Route("base"))
