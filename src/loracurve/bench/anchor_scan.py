"""The landscape of one task and seed of a suite: barriers between its anchors, and figures along its trained curves.

The same scan as `loracurve scan`, cut to what every task and seed of a suite can afford: some pairs of anchors, some
rows, a coarse grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pandas as pd
import torch

from loracurve.bench.config import LandscapeConfig
from loracurve.curve.anchored import slot_times
from loracurve.curve.lora_space import ControlPoints, stack_adapters
from loracurve.curve.spec import CurveSpec
from loracurve.inference.prediction import point_nll, predict_split
from loracurve.landscape.barriers import barrier_frame, excess, gauge_verdicts
from loracurve.landscape.paths import Path, anchor_paths, curve_path, grid
from loracurve.landscape.scan import Scan, lay_out, scan_paths
from loracurve.landscape.sharpness import balanced_adapter, perturbed
from loracurve.model.curve_model import CurveModel
from loracurve.system.tables import records
from loracurve.tasks.encoding import Encoded

__all__ = ["along_curve", "scan_anchors"]


_DRAWS = 2  # noises at each point


def scan_anchors(
    model: CurveModel, anchors: ControlPoints, sets: Mapping[str, Encoded], options: LandscapeConfig
) -> tuple[dict[str, Any], dict[str, pd.DataFrame]]:
    """Paths through the first anchors: on each the highest point is chosen on validation rows and judged on test rows.

    The base weights are left in `options.dtype`.

    Args:
        anchors: at least `options.pairs` + 1, stacked.
        sets: with validation and test.

    Returns:
        What a record holds (rows, barriers, verdicts, cost; see `barrier_frame` and `gauge_verdicts`), and two tables:
        `paths` (of `Scan.frame`) and `excess`, the excess at t* of each test row (path, segment, excess in nats).

    Raises:
        UserError: a quantised base.
    """
    if options.dtype != "auto":
        model.model.to(getattr(torch, options.dtype))
    first = {name: points[: options.pairs + 1] for name, points in anchors.items()}
    paths = {n: _moved(p, model) for n, p in anchor_paths(first, options.paths, model.scalings).items()}
    splits = [lay_out(model, sets[name], name, options.rows or None) for name in ("validation", "test")]
    with _tf32(model):
        scan = scan_paths(model, paths, splits, {n: grid(p.segments, options.points) for n, p in paths.items()})
    barriers = barrier_frame(scan)
    record = {
        "rows": {s.name: s.examples for s in splits},
        "barriers": records(barriers),
        "verdicts": records(gauge_verdicts(barriers)),
        "distances": next(iter(paths.values())).distances(slot_times(options.pairs + 1).tolist()).tolist(),
        "cost": scan.cost,
    }
    return record, {"paths": scan.frame(), "excess": _excess_of_rows(scan, barriers)}


def _moved(path: Path, model: CurveModel) -> Path:
    """The path with its control points beside the model; norms are matched on the CPU, in small steps."""
    if path.norm_matched:
        return path
    return replace(path, points={name: p.to(model.device) for name, p in path.points.items()})


def _excess_of_rows(scan: Scan, barriers: pd.DataFrame) -> pd.DataFrame:
    parts = []
    for name, segment, t_star in barriers[["path", "segment", "t_star"]].itertuples(index=False):
        path = scan.paths[name]
        inside = path.segment(segment)
        t = path.t[inside]
        at = excess(path.nll["test"][inside], (t - t[0]) / (t[-1] - t[0]))[int((t - t_star).abs().argmin())]
        parts.append(pd.DataFrame({"path": name, "segment": segment, "excess": at.float().numpy()}))
    return pd.concat(parts, ignore_index=True)


@contextmanager
def _tf32(model: CurveModel) -> Iterator[None]:
    """Products of float32 matrices by tensor cores on a GPU: inputs rounded to 10 bits, bfloat16 has 7."""
    before = torch.get_float32_matmul_precision()
    if model.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def along_curve(
    model: CurveModel, t: Sequence[float], train: Encoded, options: LandscapeConfig, seed: int
) -> dict[str, Any]:
    """Figures along the curve that the model carries; other adapters are in it afterwards.

    Args:
        t: the points that are averaged.
        train: rows for the loss under noise.
        seed: of the noise.

    Returns:
        t, speed (||d Delta W / dt|| at t), distances (||Delta W(t_i) - Delta W(t_j)||), length (through these points)
        and sharpness: t, loss, noisy and increase (nats) at some points.
    """
    path = _moved(curve_path(model), model)
    distances = path.distances(t)
    out: dict[str, Any] = {
        "t": list(t),
        "speed": [path.speed(x) for x in t],
        "distances": distances.tolist(),
        "length": float(distances.diagonal(1).sum()),
    }
    if options.sharpness:
        places = torch.linspace(0, 1, options.sharpness, dtype=torch.float64).tolist()
        adapters = [balanced_adapter({n: p.cpu() for n, p in path.adapter(x).items()}) for x in places]
        noisy = [perturbed(a, options.noise, seed, draw) for draw in range(_DRAWS) for a in adapters]
        # Side by side, not folded: rounding bfloat16 weights would be noise of its own.
        spec = CurveSpec.slots(len(adapters) + len(noisy))
        model.set_curve(spec, stack_adapters(adapters + noisy))
        predicted = predict_split(model, train, slot_times(spec.size))
        loss, *under_noise = point_nll(predicted, train.labels).mean(1).view(1 + _DRAWS, -1)
        mean = torch.stack(under_noise).mean(0)
        columns = {"t": places, "loss": loss.tolist(), "noisy": mean.tolist(), "increase": (mean - loss).tolist()}
        out["sharpness"] = columns
    return out
