"""One optimiser step on stacked control points: forward, backward, clipping, AdamW and decay, captured as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loracurve.curve.lora_space import column
from loracurve.model.attention import without_cudnn_attention
from loracurve.model.cuda_graphs import Captured
from loracurve.system.distributed import sum_over_processes, world
from loracurve.training.micro_batches import MicroBatch, TrainingObjective
from loracurve.training.perturbation import Perturbation
from loracurve.training.sam import sam_backward

__all__ = ["StepConfig", "Stepper"]


@dataclass(frozen=True)
class StepConfig:
    """What a step needs of the loop's options."""

    learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    max_grad_norm: float


class Stepper:
    """Takes optimiser steps on stacked control points.

    A loss or gradient that is not finite leaves control points and moments as they are, from then on: the loop, which
    may look only now and then, finds the last good state.

    Several processes have a share of every micro-batch each: loss, figures and gradients are summed over them, in one
    tensor, before anything is done with them.

    Args:
        program: gives the loss.
        factors: the control points, leading dimension K each.
        mask: [K] which of them are trained.
        config: learning rate, decay, clipping.
        capture: capture steps in CUDA graphs where the device has them.
        perturbation: noise that the layers draw, or `sam`; its `start` comes before each step.
        dependences: for each factor [K, K] E with P = E P where control points depend on others, else None.
    """

    def __init__(
        self,
        program: TrainingObjective,
        factors: Sequence[Tensor],
        mask: Tensor,
        config: StepConfig,
        capture: bool = True,
        perturbation: Perturbation | None = None,
        dependences: Sequence[Tensor | None] | None = None,
    ) -> None:
        self.program, self.factors, self.config, self.perturbation = program, factors, config, perturbation
        device = factors[0].device
        self.mask, self.all_trained = mask.to(device), bool(mask.all())
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
            capturable=device.type == "cuda",
        )
        # The fused kernel skips the update where this is 1, without telling the host.
        self.optimizer.found_inf = self.bad  # type: ignore[attr-defined]
        ties = dependences or [None] * len(factors)
        self.ties = [None if e is None else e.to(p) for e, p in zip(ties, factors, strict=True)]
        gram = program.decay_gram().to(device)
        of_free = [gram if e is None else e.to(gram).mT @ gram @ e.to(gram) for e in self.ties]
        self.grams = [g * self.mask[:, None] for g in of_free]
        draws = (lambda: perturbation.generators) if perturbation is not None else list
        self.sums = self._room_for_sums() if world()[1] > 1 else None
        if self.sums is None:
            self.captured = Captured(self._step, device, capture, draws)
            return
        # Processes meet between two graphs and never inside one.
        capture = capture and not program.synchronises and (perturbation is None or perturbation.config.kind != "sam")
        self.captured = Captured(self._gradients_for_sums, device, capture, draws)
        values = self.sums[-1 - len(program.figures) :]
        self.updating = Captured(lambda _: self._update(values), device, capture)

    def __call__(self, parts: list[MicroBatch], factor: float) -> Tensor:
        """Step at `factor` times the peak learning rate; returns [loss, gradient norm, *figures] on the device."""
        self.rate.fill_(self.config.learning_rate * factor)
        if self.rate.device.type != "cuda":
            self.optimizer.param_groups[0]["lr"] = float(self.rate)
        if self.sums is None:
            return self.captured(parts)
        self.captured(parts)
        sum_over_processes(self.sums)
        return self.updating(())

    def _step(self, parts: list[MicroBatch]) -> Tensor:
        self.forget_gradients()
        result = self._update(self._gradients(parts))
        self.forget_gradients()
        return result

    def _room_for_sums(self) -> Tensor:
        """One tensor of all gradients, loss and figures; the gradients are views of it."""
        sizes = [p.numel() for p in self.factors]
        sums = self.factors[0].new_zeros(sum(sizes) + 1 + len(self.program.figures), requires_grad=False)
        for p, part in zip(self.factors, sums.split([*sizes, len(sums) - sum(sizes)]), strict=False):
            p.grad = part.as_strided(p.shape, p.stride(), part.storage_offset())
        return sums

    def _gradients_for_sums(self, parts: list[MicroBatch]) -> Tensor:
        assert self.sums is not None
        self.sums.zero_()
        values = self._gradients(parts)
        self.sums[-len(values) :] = values
        return values

    def _gradients(self, parts: list[MicroBatch]) -> Tensor:
        """Add the micro-batches' gradients up; returns [loss, *figures]."""
        total = torch.zeros((), device=self.rate.device)
        figures = torch.zeros(len(self.program.figures), device=self.rate.device)
        for part in parts:
            loss, values = self._backward(part)
            total = total + loss.detach().float()
            figures = figures + values.float()
        return torch.stack([total, *figures])

    def _update(self, values: Tensor) -> Tensor:
        """Step along the gradients; `values` [loss, *figures] are returned with the norm as the second."""
        with torch.no_grad():
            self.bad.copy_(torch.maximum(self.bad, (~torch.isfinite(values[0])).float()))
            for p, tie in zip(self.factors, self.ties, strict=True):
                if p.grad is None:  # not reached by the loss
                    p.grad = torch.zeros_like(p)
                if tie is not None:  # the gradient of what depends on a free point goes to that one
                    p.grad.copy_((tie.mT @ p.grad.flatten(1)).view_as(p))
                if not self.all_trained:
                    p.grad.mul_(column(self.mask, p))
            norm = self._clip()
            self.bad.copy_(torch.maximum(self.bad, (~torch.isfinite(norm)).float()))
            self.optimizer.step()
            if self.config.weight_decay:
                decay = self.rate * self.config.weight_decay * (1 - self.bad)
                for p, gram in zip(self.factors, self.grams, strict=True):
                    p.sub_(((decay * gram).to(p) @ p.flatten(1)).view_as(p))
            for p, tie in zip(self.factors, self.ties, strict=True):
                if tie is not None:
                    free = column(tie.diagonal() == 1, p).bool()
                    p.copy_(torch.where(free, p, (tie @ p.flatten(1)).view_as(p)))
        return torch.stack([values[0].float(), norm.float(), *values[1:].float()])

    def forget_gradients(self) -> None:
        """Let go of the gradients; the backward pass then hands its own tensors over instead of adding to zeros."""
        for p in self.factors:
            p.grad = None

    def _backward(self, part: MicroBatch) -> tuple[Tensor, Tensor]:
        """Add a micro-batch's gradient; returns its loss and figures."""
        noise = self.perturbation
        with without_cudnn_attention():
            if noise is not None and noise.config.kind == "sam":
                # One point for all rows: the layout `points` with one group.
                return sam_backward(lambda: self.program.loss(part), self.factors, part.coefficients[0], noise.rho)
            loss, values = self.program.loss(part)
            loss.backward()
        return loss, values

    def _clip(self) -> Tensor:
        """Clip the gradients of each group jointly; returns the largest norm before clipping."""
        grads: list[Tensor] = [p.grad for p in self.factors if p.grad is not None]
        limit = self.config.max_grad_norm
        if self.program.groups == 1:
            norm = torch.stack(torch._foreach_norm(grads)).norm()
            if limit > 0:
                # AdamW's fused kernel divides by this while it reads the gradients.
                self.optimizer.grad_scale = ((norm + 1e-6) / limit).clamp(min=1.0).float()  # type: ignore[attr-defined]
            return norm
        groups = self.program.groups
        norms = torch.stack([g.reshape(groups, -1).norm(dim=1) for g in grads]).norm(dim=0)
        if limit > 0:
            scale = (limit / (norms + 1e-6)).clamp(max=1.0).repeat_interleave(len(grads[0]) // groups)
            torch._foreach_mul_(grads, [column(scale, g) for g in grads])
        return norms.max()
