"""One adapter that learns probabilities."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers.settings import posterior_setting

from loracurve.curve.spec import CurveSpec
from loracurve.inference.prediction import predict_split
from loracurve.training.anchors import AnchorsObjective
from loracurve.training.config import LoopConfig
from loracurve.training.distillation import DistilledObjective, soft_cross_entropy
from loracurve.training.loop import run_loop


def test_soft_cross_entropy_by_hand() -> None:
    log_probs = torch.tensor([[0.5, 0.5, 0.0], [0.1, 0.2, 0.7]]).log()
    found = soft_cross_entropy(log_probs, torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.0, 1.0]]))
    torch.testing.assert_close(found, torch.tensor([0.6931472, 0.3566749]))  # log 2, -log .7


def test_learning_the_labels_themselves_is_fine_tuning(tmp_path: Path) -> None:
    """Targets of probability 1: loss and gradient are those of one anchor, whatever the layout of the batch."""
    setting = posterior_setting(tmp_path)
    model, task = setting.model, setting.task
    train, validation = task.encode("train"), task.encode("validation")
    config = LoopConfig(steps=4, batch_size=4, accumulation=2, learning_rate=1e-2)
    model.set_curve(CurveSpec.slots(1), setting.first(1))
    sure = torch.nn.functional.one_hot(train.labels, len(task.classes)).double()
    programs = (
        DistilledObjective(model, train, sure, validation, config),
        AnchorsObjective(model, train, validation, config, 1),
    )
    found = []
    for program in programs:
        for p in model.factors:
            p.grad = None
        losses = []
        for part in program.parts(1):
            loss, figures = program.loss(part)
            loss.backward()
            losses += [loss.detach(), figures[0]]
        found.append((torch.stack(losses), [p.grad.clone() for p in model.factors if p.grad is not None]))
    torch.testing.assert_close(found[0], found[1])


def test_it_comes_to_the_averaged_probabilities_without_any_label(tmp_path: Path) -> None:
    setting = posterior_setting(tmp_path)
    model, task = setting.model, setting.task
    train, validation = task.encode("train"), task.encode("validation")
    model.set_curve(CurveSpec.slots(2), setting.first(2))
    wanted = predict_split(model, train, torch.tensor([0.0, 1.0])).probs
    model.set_curve(CurveSpec.slots(1), setting.first(1))

    def divergence() -> float:
        log_probs = predict_split(model, train, torch.zeros(1)).log_probs
        return float((soft_cross_entropy(log_probs, wanted) - soft_cross_entropy(wanted.log(), wanted)).mean())

    before = divergence()
    config = LoopConfig(steps=60, batch_size=8, learning_rate=5e-3, keep="last")
    run_loop(model, DistilledObjective(model, train, wanted, validation, config), config, progress=False)
    assert divergence() < before / 5
