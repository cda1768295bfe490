"""Functional diversity along a path: how far apart predictions are, against how far apart the adapters are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from loracurve.inference.information import jensen_shannon
from loracurve.inference.predictive import Predictive
from loracurve.landscape.paths import Path
from loracurve.landscape.scan import PathScan

__all__ = ["diversity_frame", "information_frame", "pairwise_divergence"]


def pairwise_divergence(log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean JSD (nats) and share of examples of another most probable class, for every pair of points.

    `information.pairwise_jensen_shannon` is the mean over the pairs, for each example.

    Args:
        log_probs: normalised ``[n, E, C]``.

    Returns:
        Two symmetric matrices ``[n, n]`` float64 with zeros on the diagonal.
    """
    log_probs = log_probs.double()
    n, examples, _ = log_probs.shape
    best = log_probs.argmax(-1)
    jsd, disagreement = torch.zeros(2, n, n, dtype=torch.float64)
    for i in range(n - 1):
        others = log_probs[i + 1 :]
        pairs = torch.stack([log_probs[i].expand_as(others), others]).flatten(1, 2)
        jsd[i, i + 1 :] = jensen_shannon(pairs).view(-1, examples).mean(1)
        disagreement[i, i + 1 :] = (best[i] != best[i + 1 :]).double().mean(1)
    return jsd + jsd.T, disagreement + disagreement.T


def _spread(count: int, points: int) -> list[int]:
    """`points` of `count` places, evenly, both ends among them."""
    return sorted({round(x) for x in torch.linspace(0, count - 1, min(points, count), dtype=torch.float64).tolist()})


def diversity_frame(scan: PathScan, path: Path, points: int = 21) -> pd.DataFrame:
    """Every pair of points of a path, on every split.

    Args:
        scan: of this path, with predictions.
        path: its distances are taken in ||Delta W||_F.
        points: evenly chosen among the scanned ones.

    Returns:
        split, t_i < t_j, segment_i, segment_j, within (both on one segment), distance, jsd (nats) and disagreement
        (fraction). A joint belongs to the segments on both its sides.
    """
    places = _spread(len(scan.t), points)
    t = scan.t[places].tolist()
    distance = path.distances(t)
    rows = []
    for split, log_probs in scan.log_probs.items():
        jsd, disagreement = pairwise_divergence(log_probs[places])
        for i in range(len(t)):
            for j in range(i + 1, len(t)):
                # The segments that i begins on and j ends on; the margin is for joints that rounding moved.
                first = math.floor(t[i] * scan.segments + 1e-9)
                last = math.ceil(t[j] * scan.segments - 1e-9) - 1
                rows.append(
                    (
                        *(split, t[i], t[j], first, last, first == last),
                        *(float(m[i, j]) for m in (distance, jsd, disagreement)),
                    )
                )
    columns = ["split", "t_i", "t_j", "segment_i", "segment_j", "within", "distance", "jsd", "disagreement"]
    return pd.DataFrame(rows, columns=columns)


def information_frame(
    scan: PathScan, labels: dict[str, Tensor], counts: Sequence[int] = (2, 3, 5, 10, 20, 30, 60)
) -> pd.DataFrame:
    """The model average of n evenly spaced points of a path, for several n, on every split.

    Returns:
        path, split, n, mutual_information (the plug-in value, which grows with n), corrected (times n / (n - 1)),
        pairwise_jsd (does not grow with n), nll of the average; nats.
    """
    rows = []
    for split, log_probs in scan.log_probs.items():
        for count in [n for n in counts if n <= len(scan.t)]:
            average = Predictive.from_log_probs(log_probs[_spread(len(scan.t), count)])
            information = float(average.mutual_information.mean())
            nll = float(average.negative_log_likelihood(labels[split]).mean())
            jsd = float(average.pairwise_jsd.mean())
            rows.append((scan.name, split, count, information, information * count / (count - 1), jsd, nll))
    columns = ["path", "split", "n", "mutual_information", "corrected", "pairwise_jsd", "nll"]
    return pd.DataFrame(rows, columns=columns)
