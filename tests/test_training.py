"""Anchors and curves: equal to separate PEFT runs, resumable to the bit, anchors frozen, faults reported."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import peft
import pytest
import torch
from made import made_task, shared_points, vocabulary
from tiny import lora_config, random_points, tiny
from torch.nn.functional import cross_entropy

from loracurve.curve import bezier
from loracurve.curve.lora_space import PREFIX, adapter_at
from loracurve.curve.sampling import sample_points
from loracurve.curve.spec import CurveSpec
from loracurve.model.curve_model import CurveModel
from loracurve.model.injection import initial_control_points
from loracurve.system.errors import UserError
from loracurve.tasks.task import Task
from loracurve.training.anchors import slot_seeds
from loracurve.training.checkpoint import LoopState, load_checkpoint, save_checkpoint
from loracurve.training.config import LoopConfig, ObjectiveConfig
from loracurve.training.fit import fit, fit_anchors
from loracurve.training.loop import batch_numbers, learning_rate_factor

QUIET = {"progress": False}
ARCHITECTURES = {"qwen2": "letter", "llama": "text", "encoder": "head"}


def build(architecture: str, tmp_path: Path, spec: CurveSpec, dtype: torch.dtype = torch.float32, **options: object):
    task = made_task(tmp_path, architecture, ARCHITECTURES[architecture])
    base = tiny(architecture, dtype, vocabulary(task), labels=2)
    if architecture == "encoder":
        base.config.hidden_dropout_prob = base.config.attention_probs_dropout_prob = 0.0
        for m in base.modules():
            if isinstance(m, torch.nn.Dropout):
                m.p = 0.0
    untouched = copy.deepcopy(base)
    return CurveModel(base, lora_config(architecture, **options), spec), untouched, task


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
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
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
            # Llama's and Qwen's RMSNorm computes in float32 whatever the dtype; the encoder is float64 throughout.
            rtol, atol = (1e-9, 1e-11) if architecture == "encoder" else (1e-5, 1e-6)
            torch.testing.assert_close(found[name][m], tensor, rtol=rtol, atol=atol)


def test_a_checkpoint_comes_back_onto_the_device_of_the_factors(tmp_path: Path) -> None:
    """Moments and counts of steps too: a kernel that reads another device's memory ends the process."""
    factors = [torch.ones(2, 3, requires_grad=True)]
    optimizer = torch.optim.AdamW(factors, fused=True)
    factors[0].grad = torch.ones(2, 3)
    optimizer.step()
    state = LoopState(1, [torch.zeros(2, 3)], [0.5], [1], [0], [{"step": 1, "nll": 0.5}])
    save_checkpoint(tmp_path, factors, optimizer, state)
    elsewhere = [torch.ones(2, 3, device="meta", requires_grad=True)]
    other = torch.optim.AdamW(elsewhere, fused=True)
    found = LoopState(0, [torch.zeros(2, 3, device="meta")], [math.inf], [0], [0], [])
    load_checkpoint(tmp_path, elsewhere, other, found)
    assert found.step == 1 and found.best_nll == [0.5]
    assert {k: v.device.type for k, v in other.state[elsewhere[0]].items()} == dict.fromkeys(
        ("step", "exp_avg", "exp_avg_sq"), "meta"
    )


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("kind", ["free", "anchored"])
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_curves_train_resume_to_the_bit_and_keep_anchors(
    architecture: str, kind: str, segments: int, share: bool, tmp_path: Path
) -> None:
    spec = CurveSpec(segments, 2) if kind == "free" else CurveSpec.anchored(segments + 1, 2)
    model, _, task = build(architecture, tmp_path, spec)
    if kind == "anchored":
        model.set_curve(spec, random_points(model, scale=0.05))
    start = model.control_points()
    config = shared_points(
        steps=6, batch_size=4, points=2, share_points=share, learning_rate=3e-3, evaluate_every=2, checkpoint_every=3,
        weight_decay=0.01, objective=ObjectiveConfig("mixture", 0.5),
    )  # fmt: skip
    result = fit(model, task, config, tmp_path / "whole", **QUIET)
    whole = model.control_points()
    assert result.steps == 6 and result.validation_nll[0] < float("inf")
    frozen = ~spec.mask
    for name in start:
        assert torch.equal(whole[name][frozen], start[name][frozen]), "anchors are bit-equal"
        assert not torch.equal(whole[name][spec.mask], start[name][spec.mask])
    model.set_curve(spec, start)
    fit(model, task, config, tmp_path / "cut", stop_after=3, **QUIET)
    model.set_curve(spec, random_points(model, seed=9))  # what is in memory must not matter
    again = fit(model, task, config, tmp_path / "cut", **QUIET)
    for name, tensor in model.control_points().items():
        assert torch.equal(tensor, whole[name])
    assert [h["loss"] for h in again.history] == [h["loss"] for h in result.history]


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


def test_rows_with_their_own_points_have_the_gradient_of_single_points(tmp_path: Path) -> None:
    model, _, task = build("llama", tmp_path, CurveSpec(2, 2), torch.float64)
    model.set_curve(model.spec, random_points(model))
    from loracurve.tasks.batching import collate

    batch = collate(task.encode("train"), range(6), row_tokens=1)
    assert len(batch.input_ids) == 6
    t = sample_points((1, 6), "stratified", torch.Generator().manual_seed(0))

    def gradients(run) -> list[torch.Tensor]:
        for p in model.factors:
            p.grad = None
        run().backward()
        return [p.grad.clone() for p in model.factors]

    def all_at_once() -> torch.Tensor:
        return cross_entropy(model.scores(batch, model.coefficients(t))[0], batch.labels)

    def one_by_one() -> torch.Tensor:
        losses = []
        for i in range(6):
            single = collate(task.encode("train"), [i])
            scores = model.scores(single, model.coefficients(t[0, i : i + 1]))[0]
            losses.append(cross_entropy(scores, single.labels))
        return torch.stack(losses).mean()

    together = gradients(all_at_once)
    assert model.route.windows == 2, "rows are grouped by segment"
    for a, b in zip(together, gradients(one_by_one), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, dropout: float) -> None:
    found = []
    for checkpointing in (False, True):
        model, _, task = build("qwen2", tmp_path / str(checkpointing), CurveSpec(1, 2), lora_dropout=dropout)
        fit(model, task, shared_points(steps=3, batch_size=4, gradient_checkpointing=checkpointing), **QUIET)
        found.append(model.control_points())
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])
    embeddings = model.model.get_input_embeddings()
    assert not embeddings(torch.tensor([0])).requires_grad, "transformers' hook is gone again"


def test_weight_decay_is_the_gradient_of_the_mean_squared_norm_along_the_curve() -> None:
    gram = bezier.coefficient_gram(2, 2)
    points = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    t = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    (0.5 * (bezier.coefficients(t, 2, 2) @ points).pow(2).sum(1).mean()).backward()
    torch.testing.assert_close(gram @ points.detach(), points.grad, rtol=1e-5, atol=1e-6)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    model, _, task = build("qwen2", tmp_path, CurveSpec(1, 2))
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"at step \d+.*last good state") as error:
        fit(model, task, shared_points(steps=50, batch_size=4, learning_rate=1e30, max_grad_norm=0), run, **QUIET)
    assert "\n" not in str(error.value)
    from loracurve.system.files import read_json, read_tensors

    kept = read_tensors(run / read_json(run / "checkpoint.json")["tensors"])
    assert all(torch.isfinite(v).all() for k, v in kept.items() if k.endswith("best"))


def test_a_step_after_which_nothing_can_be_predicted_is_told_in_one_line(tmp_path: Path) -> None:
    model, _, task = build("qwen2", tmp_path, CurveSpec(1, 2))
    with pytest.raises(UserError, match=r"not finite after step 1.*lower learning_rate"):
        fit(model, task, shared_points(steps=1, batch_size=4, learning_rate=1e30, max_grad_norm=0), **QUIET)


def test_a_gradient_that_is_not_finite_moves_nothing(tmp_path: Path) -> None:
    model, _, task = build("qwen2", tmp_path, CurveSpec(1, 2))
    before = [p.detach().clone() for p in model.factors]
    spoilt = model.factors[0].register_hook(lambda grad: grad * math.nan)
    with pytest.raises(UserError, match="at step 1"):
        fit(model, task, shared_points(steps=2, batch_size=4), **QUIET)
    spoilt.remove()
    assert all(torch.equal(p, b) for p, b in zip(model.factors, before, strict=True))


def test_every_example_is_seen_in_each_epoch() -> None:
    numbers = [i for step in range(21) for i in batch_numbers(3, step, 14, 4)]
    for epoch in range(6):
        assert sorted(numbers[epoch * 14 : (epoch + 1) * 14]) == list(range(14))
    assert numbers[:14] != numbers[14:28]


def test_schedules_warm_up_and_end_low() -> None:
    for schedule in ("linear", "cosine", "one-cycle"):
        config = LoopConfig(steps=100, warmup=0.1, schedule=schedule)  # type: ignore[arg-type]
        factors = [learning_rate_factor(config, s) for s in range(100)]
        peak = factors.index(max(factors))
        assert max(factors) == pytest.approx(1.0, abs=1e-2) and 9 <= peak <= 10
        assert factors[-1] < 0.02 and factors[0] < 0.11
        assert factors[:peak] == sorted(factors[:peak]) and factors[peak:] == sorted(factors[peak:], reverse=True)


def test_nothing_trainable_is_refused(tmp_path: Path) -> None:
    model, _, task = build("qwen2", tmp_path, CurveSpec.slots(2))
    model.anchor(degree=1)
    with pytest.raises(UserError, match="no control point is trainable"):
        fit(model, task, **QUIET)


def test_single_adapters_of_a_slot_model_are_its_control_points(tmp_path: Path) -> None:
    model, _, _ = build("qwen2", tmp_path, CurveSpec.slots(3))
    model.set_curve(model.spec, random_points(model))
    points = model.control_points()
    name = next(iter(points))
    assert name.startswith(PREFIX)
    assert torch.equal(adapter_at(points, torch.tensor([0.0, 1.0, 0.0]))[name], points[name][1])
