"""Predictions of cells on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from loracurve.bench.store import STEPS, WIDE, _packed, _unpacked, read_predictions, write_cell_predictions
from loracurve.inference.information import entropy
from loracurve.inference.predictive import Predictive
from loracurve.tasks.encoding import Encoded, Example


def test_predictions_come_back_but_for_a_small_step_of_log_odds(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    rows = {"validation": 500, "test": 1500, "train": 500, "ood:x": 1000}
    sets = {
        n: Predictive.from_log_probs((4 * torch.randn(10, e, 3, generator=draw)).log_softmax(-1))
        for n, e in rows.items()
    }
    assert sets["test"].point_log_probs is not None
    sets["test"].point_log_probs[:, 5, 2] = -torch.inf  # a question of two choices
    sets["test"].point_log_probs[:, 5] = sets["test"].point_log_probs[:, 5].log_softmax(-1)
    encoded = {
        n: Encoded(
            [Example(f"{n}-{i}", (0,) * (i % 7), (), i % 2, 2) for i in range(e)],
            "answer",
            (0, 1),
            ("a", "b"),
            "sum",
            0,
        )
        for n, e in rows.items()
    }
    write_cell_predictions(tmp_path / "p.parquet", sets, encoded)
    found = read_predictions(tmp_path / "p.parquet")
    for name, predictive in sets.items():
        mine, other = found.sets[name].point_log_probs, predictive.point_log_probs
        assert mine is not None and other is not None
        torch.testing.assert_close(mine, other, atol=1.01 / STEPS, rtol=0)
        assert torch.equal(mine.argmax(-1), (other - other[..., :1]).mul(STEPS).round().argmax(-1))
        assert found.ids[name] == [e.id for e in encoded[name].examples]
        assert found.tokens[name].tolist() == [len(e.prompt) for e in encoded[name].examples]
    assert set(found.labels) == {"validation", "test", "train"} and found.labels["test"][:3].tolist() == [0, 1, 0]
    assert (tmp_path / "p.parquet").stat().st_size < 160_000
    write_cell_predictions(tmp_path / "again.parquet", found.sets, encoded)
    for name, predictive in read_predictions(tmp_path / "again.parquet").sets.items():
        assert torch.equal(predictive.point_log_probs, found.sets[name].point_log_probs)  # type: ignore[arg-type]


def test_packed_log_odds_come_back_however_far_they_jump(tmp_path: Path) -> None:
    jumps = torch.tensor([[250.0, -250.0, 250.0, 0.0, 1 / STEPS, -1 / STEPS], [1e4, -1e4, 0.0, 3.5, -3.5, 0.25]])
    found = torch.from_numpy(_unpacked(_packed(jumps[..., None].numpy())))[..., 0]
    limit = (2**15 - 1) / STEPS
    assert torch.equal(found, jumps.clamp(-limit, limit))
    missing = torch.full((2, 3, 2), -torch.inf)
    missing[1, :, 0] = torch.tensor([-255.9, 1.0, -1.0])
    again = torch.from_numpy(_unpacked(_packed(missing.numpy())))
    assert torch.equal(again.isneginf(), missing.isneginf())
    torch.testing.assert_close(again[1, :, 0], missing[1, :, 0], atol=0.5 / STEPS, rtol=0)


def test_parts_of_uncertainty_and_distances_come_back(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    for classes in (3, WIDE + 1):
        sets = {}
        for name in ("validation", "test", "ood:x"):
            log_probs = torch.randn(4, 30, classes, generator=draw).log_softmax(-1)
            left = 0.5 * entropy(log_probs.double())
            distance = torch.randn(30, generator=draw, dtype=torch.float64)
            sets[name] = replace(Predictive.from_log_probs(log_probs, None, left), distance=distance)
        names = tuple(map(str, range(classes)))
        encoded = {
            n: Encoded(
                [Example(f"{n}-{i}", (), (), i % classes, classes) for i in range(30)], "head", None, names, "sum", 0
            )
            for n in sets
        }
        write_cell_predictions(tmp_path / "p.parquet", sets, encoded)
        found = read_predictions(tmp_path / "p.parquet").sets
        for name, predictive in sets.items():
            assert len(found[name].weights) == (4 if classes == 3 else 1)
            for part in (
                "entropy",
                "expected_entropy",
                "within_points",
                "between_points",
                "mutual_information",
                "distance",
            ):
                mine, other = getattr(found[name], part), getattr(predictive, part)
                exact = classes > WIDE and part in ("within_points", "between_points")
                torch.testing.assert_close(mine, other, atol=1e-6 if exact else 0.02, rtol=0)
            torch.testing.assert_close(found[name].probs, predictive.probs, atol=0.01, rtol=0)
