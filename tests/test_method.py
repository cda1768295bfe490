"""Every option of training, and all of them together: they train, resume to the bit and leave anchors alone."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from made import made_task, shared_points, vocabulary
from made_runs import base_folder, config_file, data_folder
from test_training import QUIET, build
from tiny import lora_config, random_points, tiny

from loracurve.cli import main
from loracurve.curve import bezier
from loracurve.curve.config import Sampling
from loracurve.curve.spec import CurveSpec
from loracurve.inference.information import jensen_shannon, negative_log_likelihood
from loracurve.inference.prediction import predict_split
from loracurve.model.curve_model import CurveModel
from loracurve.model.routes import Layout
from loracurve.system.errors import UserError
from loracurve.tasks.batching import collate
from loracurve.training.anchors import AnchorsObjective
from loracurve.training.config import CorruptionConfig, FitConfig, LoopConfig, ObjectiveConfig, PerturbationConfig
from loracurve.training.corruption import ordinary_tokens, unlabelled
from loracurve.training.curves import CurveObjective
from loracurve.training.fit import fit, fit_anchors
from loracurve.training.likelihood_bootstrap import BootstrapConfig, BootstrapWeights
from loracurve.training.loop import batch_numbers


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"perturbation": PerturbationConfig("flat_lora"), "share_points": False}, "share_points: expected true"),
        ({"perturbation": PerturbationConfig("lora_space"), "compile": True}, "compile: expected false"),
        ({"perturbation": PerturbationConfig("sam")}, "points: expected 1 with perturbation.kind sam"),
        (
            {"perturbation": PerturbationConfig("sam"), "points": 1, "objective": ObjectiveConfig("bonus", 0.5)},
            "objective.jsd: expected none with perturbation.kind sam",
        ),
        ({"perturbation": PerturbationConfig("flat_lora", schedule="cyclic"), "steps": 60}, "lower cycles to 10"),
        ({"sampling": "half-period", "points": 3}, "even number"),
        ({"layerwise": True, "share_points": False}, "share_points: expected shared points"),
        ({"layerwise": True, "bootstrap": BootstrapConfig("everywhere")}, "bootstrap.kind: .*turn layerwise off"),
        ({"corruption": CorruptionConfig("tokens")}, "corruption.kind: expected none with objective.jsd 'none'"),
        (
            {
                "corruption": CorruptionConfig("text", file="more.txt"),
                "objective": ObjectiveConfig("bonus", 1.0),
                "share_points": False,
            },
            "share_points: expected true with corruption.kind text",
        ),
    ],
)
def test_options_that_do_not_go_together_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        shared_points(**values)
    assert "\n" not in str(error.value)


def test_sampling_names_are_those_of_the_module() -> None:
    assert [shared_points(sampling=way).sampling for way in get_args(Sampling)] == list(get_args(Sampling))


@pytest.mark.parametrize(
    ("spec", "values", "message"),
    [
        (CurveSpec(2, 2), {"objective": ObjectiveConfig("hinge", 5.0)}, "objective.tau: expected a target"),
        (CurveSpec(2, 2), {"bootstrap": BootstrapConfig("tied")}, "bootstrap.kind: expected everywhere"),
        (CurveSpec(2, 2, closed=True), {"bootstrap": BootstrapConfig("everywhere")}, "bootstrap.kind: expected tied"),
    ],
)
def test_options_that_a_curve_cannot_have_are_named(spec: CurveSpec, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        shared_points(**values).check_curve(spec)
    shared_points(**values).check_curve(CurveSpec.anchored(3))


@pytest.mark.parametrize(("anchors", "points"), [(3, 3), (3, 1), (2, 2), (11, 11)])
def test_a_curve_is_not_validated_at_its_anchors_alone(anchors: int, points: int) -> None:
    with pytest.raises(UserError, match="evaluation_points: expected some between the anchors"):
        shared_points(evaluation_points=points).check_curve(CurveSpec.anchored(anchors))
    shared_points().check_curve(CurveSpec.anchored(anchors))
    shared_points(evaluation_points=points).check_curve(CurveSpec(anchors - 1))


# ---- all together

CURVES = ["free", "anchored"]
JSD = ["none", "bonus", "hinge"]
NOISE = ["none", "flat_lora", "lora_space"]
# Rows of (curve, segments, jsd, noise, architecture).
CASES = [
    ("anchored", 1, "none", "lora_space", "qwen2"),
    ("anchored", 2, "hinge", "flat_lora", "qwen2"),
    ("free", 1, "bonus", "none", "qwen2"),
    ("anchored", 2, "hinge", "none", "llama"),
    ("anchored", 2, "bonus", "lora_space", "llama"),
    ("free", 1, "none", "flat_lora", "llama"),
    ("anchored", 2, "none", "none", "encoder"),
    ("free", 2, "bonus", "flat_lora", "encoder"),
    ("free", 1, "hinge", "lora_space", "encoder"),
]


def test_the_cases_cover_all_pairs() -> None:
    levels = [CURVES, [1, 2], JSD, NOISE, ["qwen2", "llama", "encoder"]]
    for a, b in combinations(range(5), 2):
        assert {(c[a], c[b]) for c in CASES} == set(product(levels[a], levels[b]))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One tiny model and task for each architecture; a case only exchanges the curve."""
    made = {}
    for architecture in ("qwen2", "llama", "encoder"):
        folder = tmp_path_factory.mktemp(architecture)
        model, _, task = build(architecture, folder, CurveSpec(1, 2), r=2)
        made[architecture] = model, task
    return made


@pytest.mark.parametrize(("kind", "segments", "jsd", "noise", "architecture"), CASES)
def test_options_train_together_resume_to_the_bit_and_keep_anchors(
    kind: str, segments: int, jsd: str, noise: str, architecture: str, models: dict[str, Any], tmp_path: Path
) -> None:
    """9 of the 108 combinations, in which every pair of options occurs: all of them would take minutes."""
    model, task = models[architecture]
    spec = CurveSpec(segments, 2) if kind == "free" else CurveSpec.anchored(segments + 1, 2)
    model.set_curve(spec, model.fresh_points(spec))
    start = random_points(model)
    model.set_curve(spec, start)
    forms = {"none": (0.0, 0.0), "bonus": (0.5, 0.0), "hinge": (5.0, 0.05 if kind == "free" else 0.0)}
    config = shared_points(
        steps=4,
        batch_size=4,
        learning_rate=3e-3,
        weight_decay=0.01,
        checkpoint_every=2,
        evaluate_every=2,
        evaluation_points=4,
        objective=ObjectiveConfig(jsd, *forms[jsd]),  # type: ignore[arg-type]
        perturbation=PerturbationConfig(noise, 0.1, "ramp"),  # type: ignore[arg-type]
    )
    before = {n: p.clone() for n, p in model.model.state_dict().items() if "base_layer" in n}
    result = fit(model, task, config, tmp_path / "whole", **QUIET)
    whole = model.control_points()
    assert result.steps == 4 and all(h["loss"] < float("inf") for h in result.history)
    assert (result.settled["tau"] > 0) if jsd == "hinge" else result.settled == {}
    for name, p in whole.items():
        assert torch.equal(p[~spec.mask], start[name][~spec.mask]), "anchors are bit-equal"
        assert not torch.equal(p[spec.mask], start[name][spec.mask])
    assert all(torch.equal(p, before[n]) for n, p in model.model.state_dict().items() if n in before)
    model.set_curve(spec, start)
    fit(model, task, config, tmp_path / "cut", stop_after=2, **QUIET)
    again = fit(model, task, config, tmp_path / "cut", **QUIET)
    assert all(torch.equal(p, whole[n]) for n, p in model.control_points().items())
    assert [h["loss"] for h in again.history] == [h["loss"] for h in result.history]


def test_sam_trains_and_resumes_to_the_bit(models: dict[str, Any], tmp_path: Path) -> None:
    model, task = models["llama"]
    spec = CurveSpec(2, 2)
    model.set_curve(spec, start := model.fresh_points(spec))
    found = []
    for rho in (0.2, 0.0):
        config = shared_points(
            steps=3, batch_size=4, points=1, perturbation=PerturbationConfig("sam", rho), checkpoint_every=1
        )
        model.set_curve(spec, start)
        fit(model, task, config, tmp_path / f"{rho}", **QUIET)
        found.append(model.control_points())
        model.set_curve(spec, start)
        fit(model, task, config, tmp_path / f"cut {rho}", stop_after=1, **QUIET)
        fit(model, task, config, tmp_path / f"cut {rho}", **QUIET)
        assert all(torch.equal(p, found[-1][n]) for n, p in model.control_points().items())
    model.set_curve(spec, start)
    fit(model, task, replace(config, perturbation=PerturbationConfig()), **QUIET)
    assert all(torch.equal(p, found[1][n]) for n, p in model.control_points().items()), "no ascent, no change"
    assert not any(torch.equal(p, found[1][n]) for n, p in found[0].items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("noise", ["none", "flat_lora", "lora_space", "sam"])
def test_captured_steps_are_those_that_are_not(noise: str, models: dict[str, Any]) -> None:
    model, task = models["qwen2"]
    spec = CurveSpec(2, 2, closed=True)
    model.set_curve(spec, start := model.fresh_points(spec))
    found = []
    for capture in (False, True):
        model.set_curve(spec, start)
        config = shared_points(
            steps=12, batch_size=4, points=1, capture=capture, keep="last", perturbation=PerturbationConfig(noise, 0.1)
        )
        result = fit(model, task, config, **QUIET)
        found.append([h["loss"] for h in result.history])
    assert found[0] == pytest.approx(found[1], rel=1e-3), "replayed graphs follow the seeds of their step"


# ---- points in several passes


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("qwen2", {"objective": ObjectiveConfig("bonus", 0.5)}),
        ("llama", {"objective": ObjectiveConfig("hinge", 5.0, tau=0.5), "corruption": CorruptionConfig("tokens", 0.5)}),
        ("qwen2", {"share_points": False}),
        ("encoder", {"layerwise": True, "objective": ObjectiveConfig("mixture", 0.5)}),
    ],
)
def test_points_in_several_passes_have_the_same_gradients_in_less_memory(
    architecture: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model, _, task = build(architecture, tmp_path, CurveSpec(2, 2), torch.float64, lora_dropout=0.0)
    model.set_curve(model.spec, random_points(model))
    model.train()
    train, validation = task.encode("train"), task.encode("validation")
    found, kept_in_one = [], 0
    for passes in (1, 2, 4):
        config = shared_points(points=4, point_passes=passes, batch_size=6, seed=3, **options)
        program = CurveObjective(model, train, validation, config, ordinary_tokens(task.tokenizer), tau=0.5)
        (part,) = program.parts(2)
        kept: list[int] = []

        def keep(x: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss, figures = program.loss(part)
        found.append((loss, *figures, *torch.autograd.grad(loss, model.factors)))
        kept_in_one = sum(kept) if passes == 1 else kept_in_one
        assert passes == 1 or sum(kept) < 0.1 * kept_in_one
    for other in found[1:]:
        for value, expected in zip(other, found[0], strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)


def test_passes_draw_the_same_dropout_again(tmp_path: Path) -> None:
    model, _, task = build("qwen2", tmp_path, CurveSpec(1, 2), torch.float64, lora_dropout=0.5)
    model.set_curve(model.spec, random_points(model))
    model.train()
    train, validation = task.encode("train"), task.encode("validation")
    program = CurveObjective(model, train, validation, shared_points(points=2, point_passes=2, batch_size=4))
    (part,) = program.parts(0)

    def value() -> torch.Tensor:
        torch.manual_seed(1)
        return program.loss(part)[0]

    found = torch.autograd.grad(value(), model.factors)
    with torch.no_grad():
        for p, direction in zip(model.factors, found, strict=True):
            p += 1e-3 * direction
        up = value()
        for p, direction in zip(model.factors, found, strict=True):
            p -= 2e-3 * direction
        down = value()
    slope = sum(float(g.square().sum()) for g in found)
    assert float(up - down) / 2e-3 == pytest.approx(slope, rel=1e-2), "the gradient is that of the masks of the loss"


def test_passes_that_cannot_be_had_are_refused() -> None:
    with pytest.raises(UserError, match="point_passes: expected 1 to 2"):
        shared_points(point_passes=3)
    with pytest.raises(UserError, match="point_passes: expected 1 with perturbation.kind flat_lora"):
        shared_points(point_passes=2, perturbation=PerturbationConfig("flat_lora", 0.1))


# ---- points of the examples


def test_each_text_of_a_packed_row_is_trained_at_its_own_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loracurve.tasks.packing.WORTH_PACKING", -1.0)  # pack texts of like length too
    task = made_task(tmp_path, "qwen2", "lm")
    model = CurveModel(tiny("qwen2", torch.float64, vocabulary(task)), lora_config("qwen2"), CurveSpec(2, 2))
    model.set_curve(model.spec, random_points(model))
    train = task.encode("train")
    config = FitConfig(steps=1, batch_size=5, points=2, row_tokens=10_000)
    program = CurveObjective(model, train, task.encode("validation"), config)
    (part,) = program.parts(3)
    assert part.layout == Layout("tokens", 2) and len(part.batch.input_ids) == 1
    numbers, t = batch_numbers(config.seed, 3, len(train), 5), program._points(5, 3, 0)
    assert t.shape == (2, 5) and len(t.unique()) == 10
    total = torch.zeros((), dtype=torch.float64)
    for e, i in enumerate(numbers):
        alone = collate(train, [i])
        for own in t[:, e]:
            log_probs = model.scores(alone, model.coefficients(own[None])).log_softmax(-1)
            total = total + negative_log_likelihood(log_probs, alone.labels).sum() / 2
    torch.testing.assert_close(program.loss(part)[0], total / len(part.batch.labels), rtol=1e-6, atol=1e-9)


# ---- weights of the examples


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("architecture", ["qwen2", "llama", "encoder"])
def test_bootstrap_weights_multiply_the_likelihood_at_their_points(
    architecture: str, share: bool, tmp_path: Path
) -> None:
    model, _, task = build(architecture, tmp_path, CurveSpec.anchored(3))
    model.set_curve(model.spec, random_points(model))
    config = shared_points(
        batch_size=6, accumulation=2, share_points=share, bootstrap=BootstrapConfig("tied", 0.4), seed=3
    )
    train = task.encode("train")
    program = CurveObjective(model, train, task.encode("validation"), config)
    plain = CurveObjective(model, train, task.encode("validation"), replace(config, bootstrap=BootstrapConfig()))
    weights = BootstrapWeights(3, 0.4, tied_at=(0.0, 0.5, 1.0))
    for i, (part, same) in enumerate(zip(program.parts(5), plain.parts(5), strict=True)):
        assert same.weights is None and part.weights is not None
        t = program._points(3, 5, i)
        at = t[:, None].expand_as(part.weights) if share else t
        for n, e in [(0, 0), (1, 0), (0, 2), (1, 2)]:
            expected = weights.weights(part.batch.index[e : e + 1], at[n, e : e + 1])
            torch.testing.assert_close(part.weights[n, e], expected[0, 0])
        log_probs = model.scores(part.batch, part.coefficients, part.layout).log_softmax(-1)
        nll = negative_log_likelihood(log_probs, part.batch.labels)
        torch.testing.assert_close(
            program.loss(part)[0], (part.weights * nll).mean().to(nll) * part.share, rtol=1e-5, atol=1e-7
        )


def test_anchors_are_trained_with_the_weights_at_their_t(tmp_path: Path) -> None:
    model, _, task = build("llama", tmp_path, CurveSpec.slots(3))
    model.set_curve(model.spec, random_points(model))
    weights = BootstrapWeights(7, 0.3)
    train = task.encode("train")
    program = AnchorsObjective(model, train, task.encode("validation"), LoopConfig(batch_size=4), 3, weights)
    (part,) = program.parts(2)
    expected = torch.zeros(())
    for m, t in enumerate((0.0, 0.5, 1.0)):
        numbers = part.batch.index[part.batch.slots == m].tolist()
        nll = negative_log_likelihood(
            model.scores(collate(train, numbers), model.coefficients(torch.tensor([t]))).log_softmax(-1),
            torch.tensor([train.examples[i].label for i in numbers]),
        )[0]
        expected = expected + (weights.weights(torch.tensor(numbers), torch.tensor([t]))[0] * nll).mean()
    torch.testing.assert_close(program.loss(part)[0], expected, rtol=1e-5, atol=1e-6)
    start = model.control_points()
    fit_anchors(model, task, LoopConfig(steps=2, batch_size=4), bootstrap=weights, **QUIET)
    assert not any(torch.equal(p, start[n]) for n, p in model.control_points().items())


@pytest.mark.parametrize("share", [True, False])
def test_tokens_of_one_text_share_their_weight(share: bool, tmp_path: Path) -> None:
    task = made_task(tmp_path, "llama", "lm")
    model = CurveModel(tiny("llama", vocabulary=vocabulary(task)), lora_config("llama"), CurveSpec(1, 2))
    train = task.encode("train")
    config = shared_points(batch_size=5, bootstrap=BootstrapConfig("everywhere"), share_points=share)
    (part,) = CurveObjective(model, train, task.encode("validation"), config).parts(0)
    assert part.weights is not None
    owner = [next(e for e in range(len(train)) if i < train.token_offsets[e + 1]) for i in part.batch.index.tolist()]
    columns = {e: part.weights[:, [o == e for o in owner]] for e in owner}
    assert len(columns) == 5 and len({float(c[0, 0]) for c in columns.values()}) == 5
    assert all(torch.allclose(c, c[:, :1]) and c.shape[1] > 1 for c in columns.values())


# ---- inputs of the diversity term


def other_config(kind: str, **values: Any) -> FitConfig:
    file = values.pop("file", None)
    corruption = CorruptionConfig(kind, 0.05, file)  # type: ignore[arg-type]
    return shared_points(batch_size=6, objective=ObjectiveConfig("bonus", 0.5), corruption=corruption, **values)


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "encoder"])
def test_the_diversity_term_is_taken_on_unlabelled_text(architecture: str, tmp_path: Path) -> None:
    model, _, task = build(architecture, tmp_path, CurveSpec(1, 2))
    model.set_curve(model.spec, random_points(model))
    rows = ["it was great", "a truly dull", "quite fine", "the film is the film"]
    file = tmp_path / ("more.txt" if architecture == "encoder" else "more.jsonl")
    if architecture == "encoder":
        file.write_text("\n".join(rows))
    else:
        lines = [f'{{"id": "{i}", "question": "{r}", "choices": ["negative", "positive"]}}' for i, r in enumerate(rows)]
        file.write_text("\n".join(lines))
    others = unlabelled(task, file)
    assert len(others) == 4 and all(e.label is None for e in others.examples)
    config = other_config("text", file=str(file))
    program = CurveObjective(model, task.encode("train"), task.encode("validation"), config, others=others)
    (part,) = program.parts(0)
    assert part.other is not None and sorted(set(part.other.index.tolist())) == [0, 1, 2, 3]
    scores = model.scores(part.batch, part.coefficients, part.layout).log_softmax(-1)
    nll = negative_log_likelihood(scores, part.batch.labels).mean()
    other = model.scores(part.other, part.coefficients, part.layout).log_softmax(-1)
    torch.testing.assert_close(program.loss(part)[0], nll - 0.5 * jensen_shannon(other).mean())
    fit(model, task, replace(config, steps=2), **QUIET)


def test_a_file_of_other_inputs_is_looked_at_before_anchors_are_trained(tmp_path: Path, capsys: Any) -> None:
    base, data = base_folder(tmp_path / "base", "qwen2"), data_folder(tmp_path / "data", "letter")
    config = config_file(tmp_path / "c.yaml", base, data, "letter")
    options = [
        "points=2",
        "share_points=true",
        "objective.jsd=bonus",
        "objective.weight=0.5",
        "corruption.kind=text",
        "corruption.file=none.jsonl",
    ]
    arguments = ["fit", str(config), "--out", str(tmp_path / "out"), *(f"--curve_training.{o}" for o in options)]
    assert main(arguments) == 2
    assert "found no file none.jsonl" in capsys.readouterr().err and not (tmp_path / "out" / "anchors").exists()


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("architecture", "scoring"), [("qwen2", "letter"), ("llama", "text"), ("encoder", "head")])
def test_what_is_invisible_has_no_influence(architecture: str, scoring: str, packing: bool, tmp_path: Path) -> None:
    model, _, task = build(architecture, tmp_path, CurveSpec(1, 2))
    model.set_curve(model.spec, random_points(model))
    model.eval()
    batch = collate(task.encode("train"), range(6), packing=packing)
    corrupted = _corrupted(model, task, batch)
    hidden = (
        ~corrupted.visible
        if corrupted.attention_mask is None
        else (batch.attention_mask - corrupted.attention_mask).bool()
    )
    assert hidden.any()
    c = model.coefficients(torch.tensor([0.2, 0.9]))
    found = model.scores(corrupted, c)
    assert not torch.allclose(found, model.scores(batch, c), atol=1e-4), "but to be there mattered"
    ids = torch.where(hidden, torch.full_like(batch.input_ids, 7), batch.input_ids)
    torch.testing.assert_close(model.scores(replace(corrupted, input_ids=ids), c), found)


def _corrupted(model: CurveModel, task: Any, batch: Any) -> Any:
    from loracurve.system.randomness import generator
    from loracurve.training.corruption import corrupt

    copy, visible = corrupt(batch, "attention", 0.8, ordinary_tokens(task.tokenizer), generator(1))
    return copy if copy.attention_mask is not None else replace(copy, visible=visible)


@pytest.mark.parametrize("kind", ["tokens", "attention"])
def test_training_with_corrupted_inputs(kind: str, tmp_path: Path) -> None:
    model, _, task = build("qwen2", tmp_path, CurveSpec(1, 2))
    result = fit(model, task, other_config(kind, steps=2, accumulation=2, share_points=False), **QUIET)
    assert result.steps == 2
    program = CurveObjective(
        model, task.encode("train"), task.encode("validation"), other_config(kind), ordinary_tokens(task.tokenizer)
    )
    first, again, later = (program.parts(s)[0].other for s in (0, 0, 1))
    name = "input_ids" if kind == "tokens" else "visible"
    assert torch.equal(getattr(first, name), getattr(again, name))
    assert getattr(first, name).shape != getattr(later, name).shape or not torch.equal(
        getattr(first, name), getattr(later, name)
    )


def test_the_hinge_measures_its_target_by_the_anchors(tmp_path: Path) -> None:
    model, _, task = build("llama", tmp_path, CurveSpec.anchored(3))
    model.set_curve(model.spec, random_points(model))
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    expected = float(predict_split(model, task.encode("validation"), t).pairwise_jsd.mean())
    config = shared_points(steps=1, batch_size=4, objective=ObjectiveConfig("hinge", 5.0, tau_relative=1.5))
    assert fit(model, task, config, **QUIET).settled == pytest.approx({"tau": 1.5 * expected, "anchor_jsd": expected})
    config = replace(config, objective=ObjectiveConfig("hinge", 5.0, tau=0.02))
    assert fit(model, task, config, **QUIET).settled == {"tau": 0.02}


# ---- shapes of curves

SHAPES = [
    CurveSpec(3, 2, closed=True),
    CurveSpec(2, 2, smooth=True),
    CurveSpec(3, 1),
    CurveSpec(2, 2, factors="A"),
    CurveSpec(2, 2, factors="B", closed=True),
    CurveSpec.anchored(3, 2, smooth=True),
    CurveSpec.anchored(2, 1, pieces=2),
    CurveSpec.anchored(3, 3, closed=True, smooth=True),
]


@pytest.mark.parametrize("spec", SHAPES)
def test_shapes_stay_what_they_are_and_resume_to_the_bit(spec: CurveSpec, tmp_path: Path) -> None:
    model, _, task = build("llama", tmp_path, spec, target_modules=["q_proj", "down_proj"])
    start = spec.tie(random_points(model))
    model.set_curve(spec, start)
    config = shared_points(steps=4, batch_size=4, learning_rate=1e-2, weight_decay=0.1, checkpoint_every=2, keep="last")
    fit(model, task, config, tmp_path / "whole", **QUIET)
    whole = model.control_points()
    for name, p in whole.items():
        assert torch.equal(p[~spec.mask], start[name][~spec.mask]), "anchors are bit-equal"
        assert not torch.equal(p, start[name])
        if spec.is_shared(name):
            assert torch.equal(p, p[:1].expand_as(p))
        if spec.closed:
            assert torch.equal(p[0], p[-1])
        if spec.smooth:
            h = 1e-6
            joints = torch.arange(1 - spec.closed, spec.segments, dtype=torch.float64) / spec.segments
            sides = [
                bezier.derivative_coefficients((joints + s * h) % 1, spec.segments, spec.degree) @ p.double().flatten(1)
                for s in (-1, 1)
            ]
            torch.testing.assert_close(*sides, rtol=1e-3, atol=1e-4)
    model.set_curve(spec, start)
    fit(model, task, config, tmp_path / "cut", stop_after=2, **QUIET)
    fit(model, task, config, tmp_path / "cut", **QUIET)
    assert all(torch.equal(p, whole[n]) for n, p in model.control_points().items())
    model.save_pretrained(tmp_path / "saved")
    from loracurve.curve.files import load_curve

    _, found, points = load_curve(tmp_path / "saved")
    assert asdict(found) == asdict(spec) and all(torch.equal(p, whole[n]) for n, p in points.items())


@pytest.mark.parametrize("spec", SHAPES)
def test_a_step_is_adam_on_the_free_points(spec: CurveSpec, tmp_path: Path) -> None:
    model, _, task = build("llama", tmp_path, spec, torch.float64, target_modules=["q_proj", "down_proj"])
    start = {n: p.double() for n, p in spec.tie(random_points(model)).items()}
    model.set_curve(spec, start)
    config = shared_points(
        steps=1, batch_size=4, learning_rate=1e-2, warmup=0, weight_decay=0.5, keep="last", max_grad_norm=0.05
    )
    program = CurveObjective(model, task.encode("train"), task.encode("validation"), config)
    (part,) = program.parts(0)
    # By hand: free points are the leaves, control points are made from them, the penalty is that along the curve.
    ties = {n: spec.dependence(spec.is_shared(n)) for n in start}
    eye = torch.eye(spec.size, dtype=torch.float64)
    made = {n: eye if e is None else e for n, e in ties.items()}
    moving = {n: (e.diagonal() == 1) & spec.mask for n, e in made.items()}
    for p in model.factors:
        p.grad = None
    program.loss(part)[0].backward()
    raw = dict(zip(start, (p.grad for p in model.factors), strict=True))
    grads = {}
    for n, g in raw.items():
        g = g.mT if n.endswith("lora_B.weight") else g
        grads[n] = torch.tensordot(made[n].mT, g, dims=1) * moving[n].view(-1, 1, 1)
    norm = torch.cat([g.flatten() for g in grads.values()]).norm()
    gram = bezier.coefficient_gram(spec.segments, spec.degree)
    expected = {}
    for n, g in grads.items():
        g = g * min(1.0, 0.05 / (norm + 1e-6))
        p = start[n] - 1e-2 * g / (g.abs() + 1e-8)
        leaf = p.clone().requires_grad_()
        along = torch.tensordot(made[n], leaf, dims=1).flatten(1)
        (0.5 * (along * (gram @ along)).sum()).backward()
        p = p - 1e-2 * 0.5 * leaf.grad * moving[n].view(-1, 1, 1)
        expected[n] = torch.tensordot(made[n], p, dims=1)
    fit(model, task, config, **QUIET)
    for n, p in model.control_points().items():
        torch.testing.assert_close(p, expected[n], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "encoder"])
def test_layers_have_points_of_their_own(architecture: str, tmp_path: Path) -> None:
    options = {} if architecture == "encoder" else {"target_modules": ["q_proj", "down_proj", "lm_head"]}
    model, _, task = build(architecture, tmp_path, CurveSpec(2, 2), torch.float64, **options)
    model.set_curve(model.spec, random_points(model))
    config = shared_points(steps=2, batch_size=4, layerwise=True)
    program = CurveObjective(model, task.encode("train"), task.encode("validation"), config)
    (part,) = program.parts(1)
    assert part.coefficients.shape == (len(model.layers), 2, 5)
    assert len({tuple(c) for c in part.coefficients[:, 0].tolist()}) == len(model.layers)
    found = model.scores(part.batch, part.coefficients, part.layout)
    common = model.scores(part.batch, model.coefficients(torch.tensor([0.2, 0.7])))
    points = model.control_points()
    for i in range(2):  # by hand: one adapter, each map at its own point, as a curve of equal control points
        adapter = {}
        for (name, layer), c in zip(model.layers.items(), part.coefficients[:, i], strict=True):
            for suffix in layer.factors():
                p = points[f"base_model.model.{name}.{suffix}"]
                adapter[f"base_model.model.{name}.{suffix}"] = torch.tensordot(c, p, dims=1).expand_as(p)
        model.set_curve(model.spec, adapter)
        single = model.scores(part.batch, model.coefficients(torch.tensor([0.5])))[0]
        torch.testing.assert_close(found[i], single, rtol=1e-5, atol=1e-6)
        model.set_curve(model.spec, points)
    again = model.scores(part.batch, model.coefficients(torch.tensor([0.2, 0.7])))
    assert torch.equal(again, common), "one t for the whole model afterwards"
    fit(model, task, config, **QUIET)


def test_shapes_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match="factors: expected both"):
        CurveSpec(1, 2, (False, True, False), factors="A")
    with pytest.raises(UserError, match="joints that can be chosen freely"):
        CurveSpec.anchored(4, 2, closed=True, smooth=True)
    with pytest.raises(UserError, match="smooth: expected degree 2"):
        CurveSpec(2, 1, smooth=True)
