"""The library's ways to run one split at three points of a curve."""

from __future__ import annotations

import torch
from torch import Tensor

from loracurve.inference.prediction import predict_split
from loracurve.model.curve_model import CurveModel
from loracurve.model.runner import evaluation_mode
from loracurve.tasks.batching import Batch, collate
from loracurve.tasks.encoding import Encoded

POINTS = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)


def predictions(model: CurveModel, encoded: Encoded, way: str) -> Tensor:
    """[3, E, C] log-probabilities at the three points; of language modelling [3, tokens, 1], of the target tokens."""
    if way in ("rows", "tokens"):
        return _own_points(model, encoded, way)
    if way == "merged" and encoded.scoring == "lm":
        batch, out = _batch(model, encoded, "rows"), []
        for t in POINTS.tolist():
            with evaluation_mode(model), torch.no_grad(), model.merged(t):
                out.append(_log_probs(batch, model.runner.scores(batch.to(model.device), None))[0])
        return torch.stack(out)
    found = predict_split(model, encoded, POINTS, way=way)  # type: ignore[arg-type]
    if encoded.scoring == "lm":
        assert found.label_log_probs is not None
        return found.label_log_probs.double()[..., None]
    assert found.point_log_probs is not None
    return found.point_log_probs.double()


def _batch(model: CurveModel, encoded: Encoded, way: str) -> Batch:
    packing = model.runner.takes_trees(encoded)
    return collate(encoded, range(len(encoded)), packing=packing, own_points=way == "tokens")


def _own_points(model: CurveModel, encoded: Encoded, way: str) -> Tensor:
    """As in training: each row (each example) at a point of its own. Over three passes each is at each point once."""
    batch = _batch(model, encoded, way)
    on_device = batch.to(model.device)
    turns = torch.arange(3)[:, None]
    if batch.token_units is not None:  # points by example
        owners = torch.arange(len(encoded))
        of_read_outs = owners
        if encoded.scoring == "lm":
            assert batch.positions is not None
            of_read_outs = batch.token_units.flatten()[batch.positions]
    else:  # points by row; the rows of one example share theirs
        owners = torch.arange(len(batch.input_ids)) if batch.units is None else batch.units
        of_read_outs = owners[batch.rows]
    t = POINTS[(turns + owners) % 3]
    with evaluation_mode(model):
        found = _log_probs(batch, model.runner.scores(on_device, model.coefficients(t))).detach()
    out = torch.empty_like(found)
    out.scatter_(0, ((turns + of_read_outs) % 3)[..., None].expand_as(found), found)
    order = batch.index.argsort()
    return out[:, order]


def _log_probs(batch: Batch, scores: Tensor) -> Tensor:
    found = scores.double().cpu().log_softmax(-1)
    if batch.scoring != "lm":
        return found
    return found.gather(-1, batch.labels.expand(len(found), -1)[..., None])
