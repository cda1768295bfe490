"""Training one adapter by a method's own optimiser or parametrisation: what SWAG, IVON and BLoB share.

The loop is that of anchors and curves (`training.loop`), without checkpoints: a learner's state is not of one form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from loracurve.baselines.method import Setting
from loracurve.curve.anchored import slot_times
from loracurve.curve.lora_space import PREFIX, ControlPoints
from loracurve.curve.spec import CurveSpec
from loracurve.inference.information import negative_log_likelihood
from loracurve.inference.prediction import point_nll, predict_split
from loracurve.model.attention import without_cudnn_attention
from loracurve.model.cuda_graphs import Captured
from loracurve.model.curve_model import CurveModel
from loracurve.model.injection import initial_control_points
from loracurve.model.routes import Layout
from loracurve.system.errors import UserError
from loracurve.tasks.batching import Batch
from loracurve.training.anchors import slot_seeds
from loracurve.training.config import LoopConfig
from loracurve.training.loop import FitResult, batch_numbers, take_steps
from loracurve.training.micro_batches import training_batch
from loracurve.training.validation_plan import validation_interval

__all__ = ["AdamW", "Learner", "NllAt", "OneAdapter", "fresh_adapter", "train"]


NllAt = Callable[[Sequence[Tensor]], tuple[float, list[Tensor]]]
"""mean NLL of a step's batch in nats and its gradients, at an adapter"""


class OneAdapter:
    """A model that holds one adapter, seen as a list of tensors: its factors [1, ...] in `CurveModel.factors`' order.

    Args:
        model: its curve is replaced.
        start: the adapter [1, ...] by PEFT name.
        capture: run in CUDA graphs where the device has them.
    """

    def __init__(self, model: CurveModel, start: ControlPoints, capture: bool = True) -> None:
        model.set_curve(CurveSpec.slots(1), start)
        self.model = model
        self.here = model.coefficients(slot_times(1)).to(model.device)
        self.captured = Captured(self._nll_and_gradients, model.device, capture)
        self.names = [f"{PREFIX}{name}.{suffix}" for name, layer in model.layers.items() for suffix in layer.factors()]

    def values(self) -> list[Tensor]:
        """Copies of the factors."""
        return [p.detach().clone() for p in self.model.factors]

    @torch.no_grad()
    def put(self, values: Sequence[Tensor]) -> None:
        """Write an adapter into the model."""
        for p, value in zip(self.model.factors, values, strict=True):
            p.copy_(value)

    def nll_at(self, values: Sequence[Tensor], batches: list[Batch]) -> tuple[float, list[Tensor]]:
        """Mean NLL in nats over the examples of micro-batches, and its gradients, at an adapter."""
        self.put(values)
        found = self.captured(batches)
        gradients = found[1:].split([p.numel() for p in self.model.factors])
        return float(found[0]), [g.view_as(p) for g, p in zip(gradients, self.model.factors, strict=True)]

    def _nll_and_gradients(self, batches: list[Batch]) -> Tensor:
        """The NLL and all gradients in one tensor, which is what a captured function returns."""
        factors = self.model.factors
        for p in factors:
            p.grad = None
        total = torch.zeros((), dtype=factors[0].dtype, device=self.model.device)
        examples = sum(len(b.labels) for b in batches)
        for batch in batches:
            with without_cudnn_attention():
                log_probs = self.model.runner.scores(batch, self.here, Layout("points")).log_softmax(-1)
                loss = negative_log_likelihood(log_probs, batch.labels).sum() / examples
                loss.backward()
            total += loss.detach()
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in factors]
        return torch.cat([total[None], *(g.flatten() for g in found)])

    def stack(self, adapters: Sequence[Sequence[Tensor]]) -> ControlPoints:
        """S adapters as control points [S, ...] by PEFT name."""
        joined = [torch.cat(parts).detach() for parts in zip(*adapters, strict=True)]
        return {
            name: (value.mT if name.endswith("lora_B.weight") else value).contiguous()
            for name, value in zip(self.names, joined, strict=True)
        }


class Learner(Protocol):
    """What is trained."""

    def step(self, nll_at: NllAt, step: int, factor: float) -> float:
        """Take step number `step` at `factor` times the peak learning rate; returns the batch's NLL."""

    def adapter(self) -> Sequence[Tensor]:
        """The adapter that is validated."""

    def state(self) -> Sequence[Tensor]:
        """All that was learnt, to be copied and, for the best state, written back in place."""


class AdamW:
    """AdamW with the clipping and the moments of a fine-tune, on parameters of a method's own."""

    def __init__(self, parameters: Sequence[Tensor], config: LoopConfig, weight_decay: float) -> None:
        self.parameters, self.config = list(parameters), config
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, betas=config.betas, eps=config.eps, weight_decay=weight_decay
        )

    def step(self, factor: float) -> None:
        """Step along the gradients in place at `factor` times the peak learning rate, and drop them."""
        if self.config.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        self.optimizer.param_groups[0]["lr"] = self.config.learning_rate * factor
        self.optimizer.step()
        self.optimizer.zero_grad()


def fresh_adapter(setting: Setting) -> ControlPoints:
    """The draw [1, ...] that anchor 0 of this seed starts from."""
    model = setting.model
    return initial_control_points(model.layers, slot_seeds(setting.training.seed, 1), model.config.init_lora_weights)


def train(
    setting: Setting, one: OneAdapter, learner: Learner, config: LoopConfig, label: str, anchor: int = 0
) -> FitResult:
    """Train on the batches of an anchor, and leave `learner` at its best state (or the last, by `config.keep`).

    Returns:
        Number of steps taken and of the best one, its validation NLL in nats.

    Raises:
        UserError: the loss is not finite.
    """
    config = replace(config, seed=slot_seeds(config.seed, anchor + 1)[anchor])
    return take_steps(one.model, _Adapter(setting, one, learner, config, label), config, label, setting.progress)


class _Adapter:
    """A learner as the shared loop trains it."""

    groups = 1
    figures: tuple[str, ...] = ("nll",)

    def __init__(self, setting: Setting, one: OneAdapter, learner: Learner, config: LoopConfig, label: str) -> None:
        self.one, self.learner, self.config, self.label = one, learner, config, label
        self.every = validation_interval(config)
        self.train, self.validation = setting.task.encode("train"), setting.task.encode("validation")

    def tensors(self) -> Sequence[Tensor]:
        return self.learner.state()

    def step(self, number: int, factor: float) -> Tensor:
        c = self.config
        rows = torch.tensor(batch_numbers(c.seed, number, len(self.train), c.batch_size)).chunk(c.accumulation)
        batches = [training_batch(self.one.model, self.train, part.tolist(), c) for part in rows]
        nll = self.learner.step(lambda values: self.one.nll_at(values, batches), number, factor)
        if not math.isfinite(nll):  # the learner has moved already
            raise UserError(f"{self.label}: the loss is not finite at step {number + 1}; lower the learning rate")
        return torch.tensor([nll])

    def validate(self) -> list[float]:
        self.one.put(self.learner.adapter())
        predictive = predict_split(self.one.model, self.validation, slot_times(1))
        return [float(point_nll(predictive, self.validation.labels).mean())]
