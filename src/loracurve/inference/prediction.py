"""Predicting batches and whole data sets at points of a curve: which way to run pays, and running it.

Points run together repeat every row at each point and add low-rank products to every map. Merged, one point at a time
is folded into a copy of the weights, which then cost what the base costs. Both read and write memory for their extras:
the products x [tokens, n_in] and y [tokens, n_out] of every map, folding its weight [n_out, n_in]. So the number of
tokens decides, whatever the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import psutil
import torch
from torch import Tensor, nn

from loracurve.inference.information import negative_log_likelihood
from loracurve.inference.predictive import Predictive
from loracurve.model.curve_model import CurveModel
from loracurve.model.layers import CurveLinear
from loracurve.model.runner import PointModel, evaluation_mode, without_gradients
from loracurve.system.distributed import gathered
from loracurve.tasks.batching import Batch, evaluation_batches
from loracurve.tasks.encoding import Encoded

__all__ = [
    "Way",
    "folding_tokens",
    "keeps_precision",
    "labels_of",
    "laid_out_for",
    "point_nll",
    "predict",
    "predict_split",
    "predict_splits",
    "room_for_merged",
]


def labels_of(encoded: Encoded) -> Tensor:
    """[E] labels of a split, -100 where there is none."""
    return torch.tensor([-100 if e.label is None else e.label for e in encoded.examples])


def predict_split(model: CurveModel, encoded: Encoded, t: Tensor, weights: Tensor | None = None) -> Predictive:
    """Predict a whole split at the points t; see `splits.predict_splits`."""
    return predict_splits(model, {"": encoded}, t, weights)[""]


def point_nll(predictive: Predictive, labels: Tensor) -> Tensor:
    """[n, E] NLL of each example at each point."""
    if predictive.label_log_probs is not None:
        return -predictive.label_log_probs.double()
    assert predictive.point_log_probs is not None
    return negative_log_likelihood(predictive.point_log_probs.double(), labels)


def predict(
    model: PointModel,
    batches: Iterable[Any],
    t: Tensor,
    weights: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
    summarise: bool = False,
    examples: int | None = None,
    shared: bool = False,
) -> Predictive:
    """Predict every example at every curve point, in evaluation mode and without gradients.

    Args:
        model: see `PointModel`.
        batches: whatever the model takes, each with ``.index``, the numbers ``[E]`` of its examples (together 0..N-1,
            each once, in any order), and for `summarise` ``.labels`` ``[E]``.
        t: curve points ``[n]``.
        weights: their weights ``[n]``; equal weights if None.
        progress: called after each batch with the number of examples done.
        summarise: keep only per-example summaries (`Predictive.summarise`).
        examples: N where it is known; without it examples missing at the very end go unnoticed.
        shared: the batches hold this process's share of the examples (`evaluation_batches`); every process calls this
            and returns the whole.

    Returns:
        The predictions of examples 0..N-1 in this order, on the CPU.

    Raises:
        RuntimeError: an example is missing or there twice, or the model returned another shape.
    """
    outputs, parts, indices, done, idle = [], [], [torch.zeros(0, dtype=torch.long)], 0, 0
    if shared and getattr(model, "sharded", False):
        batches = [*batches]
        passes = sum(model.passes(batch, len(t)) for batch in batches)  # type: ignore[attr-defined]
        idle = max(gathered(lambda: passes)) - passes
    with without_gradients(model), evaluation_mode(model):
        for batch in batches:
            log_probs = model.point_log_probs(batch, t)
            if log_probs.shape[:-1] != (len(t), len(batch.index)):
                raise RuntimeError(f"expected [{len(t)}, {len(batch.index)}, C], found {list(log_probs.shape)}")
            if summarise:
                parts.append(Predictive.from_log_probs(log_probs, weights).summarise(batch.labels).to("cpu"))
            else:
                outputs.append(log_probs)
            indices.append(batch.index)
            done += len(batch.index)
            if progress is not None:
                progress(done)
        for _ in range(idle):
            model.idle()  # type: ignore[attr-defined]

    def own() -> tuple[Tensor, list[Predictive]]:
        # Outside inference mode: its tensors could not take part in later gradients (temperature fits).
        summaries = parts if summarise else [Predictive.from_log_probs(part.cpu(), weights) for part in outputs]
        return torch.cat([index.cpu() for index in indices]), summaries

    found = gathered(own) if shared else [own()]
    order, done = torch.cat([index for index, _ in found]), sum(len(index) for index, _ in found)
    expected = done if examples is None else examples
    if not done or not torch.equal(order.sort().values, torch.arange(expected)):
        missing = set(range(expected)) - set(order.tolist())
        raise RuntimeError(
            f"expected each of the examples 0..{expected - 1} once, found {done}, without {sorted(missing)[:5]}; "
            "the batches dropped or repeated some"
        )
    return Predictive.cat([part for _, parts in found for part in parts]).index(order.argsort())


Way = Literal["auto", "points", "merged"]

# Padded tokens of a batch: a GPU wants large products.
CPU_TOKENS, GPU_TOKENS = 4096, 16_384

# Row lengths on a GPU are multiples of this, so that shapes come back and graphs are used again.
GPU_LENGTHS = 8

# Left free when a copy of the weights is made, as a part of its size.
SPARE = 0.25


def folding_tokens(model: CurveModel) -> float:
    """Tokens at each point from which on folding is cheaper than low-rank products; infinite where it cannot be done.

    Elements moved: folding reads the weight, writes its copy, reads and writes that once more to add the update, 4 n_in
    n_out; the products read x, read and write y, (n_in + 2 n_out) a token.
    """
    maps = [layer for layer in model.layers.values() if isinstance(layer, CurveLinear)]
    weights = [getattr(layer.base_layer, "weight", None) for layer in maps]
    if not maps or model.sharded or any(w is None or not w.is_floating_point() for w in weights):
        return float("inf")
    if model.replication.shared:
        return float("inf")  # points share the frozen lower layers, which merged weights would run at every point
    folding = sum(4 * layer.in_features * layer.out_features for layer in maps)
    return folding / sum(layer.in_features + 2 * layer.out_features for layer in maps)


def keeps_precision(model: CurveModel) -> bool:
    """Whether a folded point is what it was: in half precision rounding its weights makes points differ that do not."""
    return torch.finfo(model.dtype).bits >= 32


def room_for_merged(model: CurveModel) -> bool:
    """Whether a copy of the touched weights fits into free memory, with some to spare."""
    weights = [layer.base_layer.weight for layer in model.layers.values() if isinstance(layer, CurveLinear)]
    if model.device.type == "cuda":
        unused = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
        free = torch.cuda.mem_get_info(model.device)[0] + unused
    else:
        free = psutil.virtual_memory().available
    return free > (1 + SPARE) * sum(w.numel() * w.element_size() for w in weights)


def laid_out_for(model: CurveModel, encoded: Encoded, row_tokens: int = 256) -> list[Batch]:
    """This process's share of a split in batches of a size that suits the model's device."""
    gpu = model.device.type == "cuda"
    size, pad_to = (GPU_TOKENS, GPU_LENGTHS) if gpu else (CPU_TOKENS, 1)
    return [*evaluation_batches(encoded, size, row_tokens, model.supports_trees, pad_to, shared=True)]


def predict_splits(
    model: CurveModel, splits: Mapping[str, Encoded], t: Tensor, weights: Tensor | None = None, way: Way = "auto"
) -> dict[str, Predictive]:
    """Predict whole splits at the points t, sorted by length and packed; language modelling is summarised.

    Args:
        t: points [n], or coefficients [n, K] of points beside the curve.
        weights: of the points [n]; equal if None.
        way: `points` runs points together, `merged` one after the other; `auto` takes the cheaper one that keeps
            precision. Language modelling runs its points together: what lies between them is summarised at once.

    Several processes all call this, predict a share of the examples each, and return the whole.
    """
    laid_out = {name: laid_out_for(model, encoded) for name, encoded in splits.items()}
    choice = {name: batches for name, batches in laid_out.items() if splits[name].scoring != "lm"}
    tokens = sum(b.tokens for batches in choice.values() for b in batches)
    pays = way == "auto" and keeps_precision(model) and tokens > folding_tokens(model) and room_for_merged(model)
    merged = way == "merged" or pays
    done = _merged_log_probs(model, choice, t) if merged and choice else {}
    out = {}
    for name, encoded in splits.items():
        lm = encoded.scoring == "lm"
        examples = encoded.token_offsets[-1] if lm else len(encoded)
        source: Any = _Given(model, done[name]) if name in done else model
        out[name] = predict(source, laid_out[name], t, weights, summarise=lm, examples=examples, shared=True)
    return out


def _merged_log_probs(model: CurveModel, splits: Mapping[str, Sequence[Batch]], t: Tensor) -> dict[str, list[Tensor]]:
    """[n, E, C] of every batch of every split, one point after the other."""
    found: dict[str, list[list[Tensor]]] = {name: [[] for _ in batches] for name, batches in splits.items()}
    with torch.inference_mode(), evaluation_mode(model), model.merging() as fold:
        for point in t:
            fold(point)
            for name, batches in splits.items():
                for rows, batch in zip(found[name], batches, strict=True):
                    rows.append(model.merged_log_probs(batch))
        return {name: [torch.cat(rows) for rows in of_split] for name, of_split in found.items()}


class _Given:
    """Log-probabilities computed before, batch by batch, as something that `inference.predict` takes."""

    def __init__(self, model: CurveModel, log_probs: list[Tensor]) -> None:
        self.model, self.left = model, iter(log_probs)

    def point_log_probs(self, batch: Any, t: Tensor) -> Tensor:
        return next(self.left)

    def modules(self) -> Iterator[nn.Module]:
        return self.model.modules()

    def eval(self) -> Any:
        return self.model.eval()
