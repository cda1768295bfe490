"""Anchors trained in one pass equal separate PEFT runs."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from helpers import matrix
from helpers.matrix import QUIET, build
from torch.nn.functional import cross_entropy

from loracurve.curve.spec import CurveSpec
from loracurve.model.injection import initial_control_points
from loracurve.tasks.task import Task
from loracurve.training.anchors import slot_seeds
from loracurve.training.config import LoopConfig
from loracurve.training.fit import fit_anchors
from loracurve.training.loop import batch_numbers, learning_rate_factor


def separate_fine_tune(
    base: torch.nn.Module,
    config: peft.LoraConfig,
    task: Task,
    loop: LoopConfig,
    seed: int,
    init: dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """One adapter trained by PEFT and torch alone, an example a row."""
    model = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(config), autocast_adapter_dtype=False)
    peft.set_peft_model_state_dict(model, init)
    model.train()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=loop.learning_rate, weight_decay=0.0)
    encoded = task.encode("train")
    for step in range(loop.steps):
        losses = []
        for i in batch_numbers(seed, step, len(encoded), loop.batch_size):
            e = encoded.examples[i]
            if encoded.scoring == "head":
                scores = model(torch.tensor([e.prompt]), token_type_ids=torch.tensor([e.token_types])).logits[0]
            elif encoded.scoring == "answer":
                scores = model(torch.tensor([e.prompt])).logits[0, -1, list(encoded.answer_ids)[: e.n_choices]]
            else:
                scores = []
                for choice in e.choices:
                    ids = torch.tensor([[*e.prompt, *choice]])
                    logits = model(ids).logits[0, len(e.prompt) - 1 : -1].log_softmax(-1)
                    scores.append(logits.gather(-1, torch.tensor(choice)[:, None]).sum())
                scores = torch.stack(scores)
            losses.append(cross_entropy(scores[None], torch.tensor([e.label])))
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(params, loop.max_grad_norm)
        rate = loop.learning_rate * learning_rate_factor(loop, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        with torch.no_grad():
            for p in params:
                p.mul_(1 - rate * loop.weight_decay)
    return peft.get_peft_model_state_dict(model)


@pytest.mark.parametrize("accumulation", [1, 2])
@matrix.architectures
def test_anchors_in_one_pass_equal_separate_peft_runs(architecture: str, accumulation: int, tmp_path: Path) -> None:
    model, base, task = build(architecture, tmp_path, CurveSpec.slots(3), torch.float64)
    loop = LoopConfig(
        steps=4, batch_size=4, accumulation=accumulation, weight_decay=0.1, learning_rate=1e-2, max_grad_norm=0.5,
        keep="last", seed=7,
    )  # fmt: skip
    fit_anchors(model, task, loop, **QUIET)
    found = model.control_points()
    start = initial_control_points(model.layers, slot_seeds(7, 3))
    for m, seed in enumerate(slot_seeds(7, 3)):
        init = {n: p[m].double() for n, p in start.items()}
        expected = separate_fine_tune(base, model.config, task, loop, seed, init)
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            # Llama's and Qwen's RMSNorm computes in float32 whatever the dtype; the encoder is float64 throughout, on a
            # GPU but for Adam's rate and step, which are float32 tensors where steps are captured.
            exact = (1e-6, 1e-8) if torch.cuda.is_available() else (1e-9, 1e-11)
            rtol, atol = exact if architecture == "encoder" else (1e-5, 1e-6)
            torch.testing.assert_close(found[name][m], tensor, rtol=rtol, atol=atol)


def test_anchors_resume_to_the_bit(tmp_path: Path) -> None:
    model, _, task = build("qwen2", tmp_path, CurveSpec.slots(2))
    loop = LoopConfig(steps=6, batch_size=4, checkpoint_every=2, learning_rate=1e-2)
    fit_anchors(model, task, loop, tmp_path / "whole", **QUIET)
    whole = model.control_points()
    fit_anchors(model, task, loop, tmp_path / "cut", stop_after=4, **QUIET)
    fit_anchors(model, task, loop, tmp_path / "cut", **QUIET)
    assert all(torch.equal(whole[n], p) for n, p in model.control_points().items())


def test_training_learns_and_the_best_state_is_kept(tmp_path: Path) -> None:
    model, _, task = build("qwen2", tmp_path, CurveSpec.slots(2))
    result = fit_anchors(model, task, LoopConfig(steps=60, batch_size=8, learning_rate=1e-2, evaluate_every=5), **QUIET)
    losses = [h["nll"] for h in result.history]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    seen = [h["validation_nll"] for h in result.history if "validation_nll" in h]
    assert result.validation_nll == [min(v[m] for v in seen) for m in range(2)]
    from loracurve.training.anchors import AnchorsObjective

    now = AnchorsObjective(model, task.encode("train"), task.encode("validation"), LoopConfig(), 2).validate()
    assert now == pytest.approx(result.validation_nll, abs=1e-6)
