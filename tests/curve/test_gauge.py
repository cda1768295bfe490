"""Gauge alignment: models stay what they are, lines between them move; only the default forgets the incoming gauge."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest
import torch
from helpers import matrix
from helpers.made import made_task, vocabulary
from helpers.tiny import lora_config, random_points, tiny
from torch import Tensor

from loracurve.curve.config import Alignment
from loracurve.curve.gauge import align, balanced, delta_w_gram, procrustes
from loracurve.curve.lora_space import ControlPoints
from loracurve.curve.spec import CurveSpec
from loracurve.model.curve_model import CurveModel
from loracurve.system.errors import UserError
from loracurve.training.config import LoopConfig
from loracurve.training.fit import fit_anchors

ALIGNMENTS = get_args(Alignment)
RANK, N_IN, N_OUT = 4, 12, 9


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(seed: int, size: int = RANK) -> Tensor:
    return torch.linalg.qr(drawn(seed, size, size))[0]


def conditioned(seed: int, condition: float, size: int = RANK) -> Tensor:
    """An invertible matrix with a given condition number, norm split unevenly over its directions."""
    scale = torch.logspace(0, 1, size, base=condition, dtype=torch.float64) / condition**0.5
    return rotation(seed, size) @ torch.diag(scale) @ rotation(seed + 1, size)


def made_points(anchors: int = 3, dtype: torch.dtype = torch.float64) -> ControlPoints:
    """Two maps of different shapes, all factors drawn."""
    return {
        "q.lora_A.weight": drawn(1, anchors, RANK, N_IN).to(dtype),
        "q.lora_B.weight": drawn(2, anchors, N_OUT, RANK).to(dtype),
        "v.lora_A.weight": drawn(3, anchors, RANK, N_OUT).to(dtype),
        "v.lora_B.weight": drawn(4, anchors, N_IN, RANK).to(dtype),
    }


def regauged(points: ControlPoints, matrices: list[Tensor]) -> ControlPoints:
    """(A, B) -> (R A, B R^-1) with another R for each anchor, the same for each map of an anchor."""
    out = {}
    for name, tensor in points.items():
        pairs = zip(tensor, matrices, strict=True)
        if name.endswith("lora_A.weight"):
            out[name] = torch.stack([(r @ t.double()).to(t.dtype) for t, r in pairs])
        elif name.endswith("lora_B.weight"):
            out[name] = torch.stack([(t.double() @ torch.linalg.inv(r)).to(t.dtype) for t, r in pairs])
        else:
            out[name] = tensor.clone()
    return out


def products(points: ControlPoints) -> dict[str, Tensor]:
    return {
        name: points[name.replace("lora_A", "lora_B")].double() @ a.double()
        for name, a in points.items()
        if name.endswith("lora_A.weight")
    }


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def distance(first: ControlPoints, second: ControlPoints) -> float:
    return float(sum((first[n].double() - second[n].double()).square().sum() for n in first) ** 0.5)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@matrix.architectures
def test_no_anchor_changes_its_products_predictions_or_head(architecture: str, alignment: Alignment) -> None:
    model = CurveModel(tiny(architecture), lora_config(architecture), CurveSpec.slots(3)).eval()
    points = random_points(model)
    model.set_curve(model.spec, points)
    ids, t = torch.randint(3, 300, (4, 9), generator=torch.Generator().manual_seed(2)), torch.tensor([0.0, 0.5, 1.0])
    with torch.no_grad():
        before = model(t, input_ids=ids).logits
        model.anchor(alignment=alignment)
        after = model(t, input_ids=ids).logits
    assert relative(after, before) < 1e-5
    assert model.spec.alignment == alignment, "the alignment is recorded with the curve"
    aligned = align(points, alignment)
    for name, product in products(points).items():
        for m in range(3):
            assert relative(products(aligned)[name][m], product[m]) < 1e-5, name
    heads = [name for name in points if "lora_" not in name]
    assert bool(heads) == (architecture == "encoder")
    for name in heads:
        assert torch.equal(aligned[name], points[name]), "dense heads have no gauge"


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_alignment_returns_new_tensors(alignment: Alignment) -> None:
    points = made_points()
    kept = {n: p.clone() for n, p in points.items()}
    aligned = align(points, alignment)
    for name, tensor in aligned.items():
        tensor.zero_()
        assert torch.equal(points[name], kept[name])


@pytest.mark.parametrize("condition", [1.0, 30.0, 1e3])
def test_only_the_default_forgets_the_incoming_gauge(condition: float) -> None:
    points = made_points()
    moved = regauged(points, [conditioned(10 * m + 5, condition) for m in range(3)])
    for name, product in products(points).items():
        assert relative(products(moved)[name], product) < 1e-9, "the same models in another gauge"
    first, second = align(points, "balanced+procrustes"), align(moved, "balanced+procrustes")
    for name in points:
        assert relative(second[name], first[name]) < 1e-8, name
    # Procrustes only rotates: the first anchor stays as it came, and how norm is split between A and B stays too.
    first, second = align(points, "procrustes"), align(moved, "procrustes")
    for name in points:
        assert relative(second[name], first[name]) > 0.1, name


def test_procrustes_alone_depends_on_how_norm_is_split_between_a_and_b() -> None:
    points = made_points()
    scaled = regauged(points, [torch.eye(RANK, dtype=torch.float64) * s for s in (1.0, 10.0, 1.0)])
    scaled_line = {n: 0.5 * (p[0] + p[1]) for n, p in align(scaled, "procrustes").items()}
    line = {n: 0.5 * (p[0] + p[1]) for n, p in align(points, "procrustes").items()}
    product, scaled_product = (x["q.lora_B.weight"] @ x["q.lora_A.weight"] for x in (line, scaled_line))
    assert relative(scaled_product, product) > 0.1
    both = [align(p, "balanced+procrustes") for p in (points, scaled)]
    assert all(relative(both[1][n], both[0][n]) < 1e-10 for n in points)


def test_balanced_factors_share_the_singular_values_of_their_product() -> None:
    a, b = conditioned(3, 100.0) @ drawn(1, RANK, N_IN), drawn(2, N_OUT, RANK)
    new_a, new_b = balanced(a, b)
    values = torch.linalg.svdvals(b @ a)[:RANK]
    torch.testing.assert_close(new_a @ new_a.mT, torch.diag(values), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(new_b.mT @ new_b, torch.diag(values), rtol=1e-9, atol=1e-9)
    # Of all gauges the balanced one has the least norm: |A|^2 + |B|^2 = 2 * nuclear norm of B A.
    assert float(new_a.square().sum() + new_b.square().sum()) == pytest.approx(2 * float(values.sum()), rel=1e-9)


@pytest.mark.parametrize(("n_in", "n_out"), [(3, 12), (12, 3), (3, 2), (1, 1)])
def test_ranks_above_the_size_of_the_map(n_in: int, n_out: int) -> None:
    points = {"m.lora_A.weight": drawn(1, 2, RANK, n_in), "m.lora_B.weight": drawn(2, 2, n_out, RANK)}
    for alignment in ALIGNMENTS:
        aligned = align(points, alignment)
        assert all(aligned[n].shape == p.shape for n, p in points.items())
        for name, product in products(points).items():
            assert relative(products(aligned)[name], product) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_zero_singular_values_keep_the_product_and_the_directions_of_a(rank: int, dtype: torch.dtype) -> None:
    a = drawn(1, RANK, N_IN).to(dtype)
    b = (drawn(2, N_OUT, rank) @ drawn(3, rank, RANK)).to(dtype)  # rank 0: B = 0, the LoRA initialisation
    new_a, new_b = balanced(a, b)
    exact = 1e-5 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(new_b @ new_a, b @ a, rtol=exact, atol=exact)
    # With A = B = 0 in a direction its gradient would be 0 for ever.
    values = torch.linalg.svdvals(new_a.double())
    assert values[-1] > 1e-2 * values[0], "A keeps its full row rank"
    basis = torch.linalg.qr(a.double().mT)[0]
    assert relative(new_a.double() @ basis @ basis.mT, new_a) < 1e-5, "in A's own directions"
    points = {"m.lora_A.weight": torch.stack([a, drawn(5, RANK, N_IN).to(dtype)])}
    points["m.lora_B.weight"] = torch.stack([b, torch.zeros_like(b)])
    for alignment in ALIGNMENTS:
        aligned = align(points, alignment)
        torch.testing.assert_close(
            products(aligned)["m.lora_A.weight"], products(points)["m.lora_A.weight"], rtol=exact, atol=10 * exact
        )
        for m in range(2):
            assert torch.linalg.matrix_rank(aligned["m.lora_A.weight"][m].double()) == RANK


@pytest.mark.parametrize("seed", range(3))
def test_procrustes_recovers_a_planted_rotation(seed: int) -> None:
    a, b, r = drawn(seed, RANK, N_IN), drawn(seed + 1, N_OUT, RANK), rotation(seed + 2)
    found_a, found_b = procrustes(r @ a, b @ r.mT, a, b)
    torch.testing.assert_close(found_a, a, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found_b, b, rtol=1e-10, atol=1e-10)


def test_procrustes_is_the_nearest_of_all_rotations() -> None:
    a, b, a0, b0 = drawn(1, RANK, N_IN), drawn(2, N_OUT, RANK), drawn(3, RANK, N_IN), drawn(4, N_OUT, RANK)

    def cost(a: Tensor, b: Tensor) -> float:
        return float((a - a0).square().sum() + (b - b0).square().sum())

    best = cost(*procrustes(a, b, a0, b0))
    near = [torch.linalg.matrix_exp(1e-2 * (x - x.mT)) for x in (drawn(s, RANK, RANK) for s in range(20))]
    found_a, found_b = procrustes(a, b, a0, b0)
    assert all(cost(q @ found_a, found_b @ q.mT) > best for q in near), "a local minimum"
    assert all(cost(r @ a, b @ r.mT) >= best for r in (rotation(s) for s in range(200))), "and a global one"


@pytest.mark.parametrize("alignment", ["procrustes", "balanced+procrustes"])
def test_a_line_between_rotated_copies_of_an_adapter_is_that_adapter(alignment: Alignment) -> None:
    model = CurveModel(tiny("llama"), lora_config("llama"), CurveSpec.slots(1)).eval()
    single = random_points(model)
    copies = regauged(
        {n: p.repeat(3, *[1] * (p.dim() - 1)) for n, p in single.items()}, [rotation(s) for s in range(3)]
    )
    ids, t = torch.randint(3, 300, (4, 9), generator=torch.Generator().manual_seed(2)), torch.linspace(0, 1, 9)
    logits = {}
    for name in ("none", alignment):
        model.set_curve(CurveSpec.slots(3), copies)
        model.anchor(degree=1, alignment=name)  # type: ignore[arg-type]
        with torch.no_grad():
            logits[name] = model(t.double(), input_ids=ids).logits.view(9, *ids.shape, -1)
    for m in (0, 4, 8):
        assert relative(logits["none"][m], logits["none"][0]) < 1e-5
    for i in range(9):
        assert relative(logits[alignment][i], logits[alignment][0]) < 1e-5
    assert relative(logits["none"][2], logits["none"][0]) > 0.1, "without alignment the middle is another model"
    for first, second in pairwise([{n: p[m] for n, p in align(copies, alignment).items()} for m in range(3)]):
        assert distance(first, second) < 1e-4


@pytest.mark.parametrize("scalings", [None, {"q.lora_A.weight": 2.0, "v.lora_A.weight": 0.5}])
def test_delta_w_gram_is_that_of_the_explicit_updates_in_every_gauge(scalings: dict[str, float] | None) -> None:
    points = made_points()
    updates = torch.cat(
        [(scalings or {}).get(name, 1.0) * product.flatten(1) for name, product in products(points).items()], dim=1
    )
    expected = updates @ updates.mT
    torch.testing.assert_close(delta_w_gram(points, scalings), expected, rtol=1e-10, atol=1e-10)
    moved = regauged(points, [conditioned(m, 100.0) for m in (1, 3, 5)])
    torch.testing.assert_close(delta_w_gram(moved, scalings), expected, rtol=1e-8, atol=1e-8)
    with_head = points | {"classifier.weight": drawn(9, 3, 2, N_IN)}
    torch.testing.assert_close(delta_w_gram(with_head, scalings), expected, rtol=1e-10, atol=1e-10)


def test_what_cannot_be_aligned_is_refused() -> None:
    with pytest.raises(UserError, match="unknown alignment 'svd'"):
        align(made_points(), "svd")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no LoRA factors"):
        delta_w_gram({"classifier.weight": drawn(9, 3, 2, N_IN)})


def test_the_barrier_between_trained_adapters_that_differ_by_rotations_is_one_of_gauge(tmp_path: Path) -> None:
    task = made_task(tmp_path, "qwen2")
    model = CurveModel(tiny("qwen2", vocabulary=vocabulary(task)), lora_config("qwen2"), CurveSpec.slots(2))
    fit_anchors(model, task, LoopConfig(steps=60, batch_size=8, learning_rate=1e-2), progress=False)
    trained = model.control_points()
    # Anchor 0 and its rotated copy, then anchor 1 and its copy: each second step of the path only changes the gauge.
    path = {n: p[[0, 0, 1, 1]] for n, p in trained.items()}
    path = regauged(path, [torch.eye(4, dtype=torch.float64), rotation(1), rotation(2), rotation(3)])
    from loracurve.inference.prediction import point_nll, predict_split

    # On the training rows, which the adapters know: on others a bad adapter may be worse than none.
    train, t = task.encode("train"), torch.linspace(0, 1, 7, dtype=torch.float64)
    nll = {}
    for alignment in ("none", "balanced+procrustes"):
        model.set_curve(CurveSpec.slots(4), path)
        model.anchor(degree=1, alignment=alignment)
        nll[alignment] = point_nll(predict_split(model, train, t), train.labels).mean(1)
    raw, aligned = nll["none"], nll["balanced+procrustes"]
    torch.testing.assert_close(aligned[::2], raw[::2], rtol=1e-4, atol=1e-5)
    for middle in (1, 5):
        assert float(aligned[middle]) == pytest.approx(float(aligned[middle - 1]), abs=1e-4), "no barrier at all"
        assert raw[middle] > aligned[middle] + 0.02, "a barrier that only the gauge makes"
