"""Predicting at points of a curve: one engine, and which way to run whole data sets pays.

Points run together repeat every row at each point and add low-rank products to every map. Merged, one point at a time
is folded into a copy of the weights, which then cost what the base costs. Both read and write memory for their extras:
the products x [tokens, n_in] and y [tokens, n_out] of every map, folding its weight [n_out, n_in]. So the number of
tokens decides, whatever the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import psutil
import torch
from torch import Tensor

from loracurve.curve.quadrature import quadrature
from loracurve.inference.information import negative_log_likelihood
from loracurve.inference.predictive import Predictive
from loracurve.model.cuda_graphs import map_tensors
from loracurve.model.curve_model import CurveModel
from loracurve.model.layers import CurveLinear
from loracurve.model.runner import evaluation_mode, without_gradients
from loracurve.model.states import States
from loracurve.system.distributed import gathered
from loracurve.system.errors import UserError
from loracurve.tasks.batching import ROW_TOKENS, Batch, collate, evaluation_batches
from loracurve.tasks.encoding import Encoded

__all__ = [
    "NoNumbersError",
    "Read",
    "Reader",
    "Way",
    "Way",
    "folding_tokens",
    "keeps_precision",
    "laid_out_for",
    "point_nll",
    "predict",
    "predict_base",
    "predict_folded",
    "predict_split",
    "predict_splits",
    "room_for_merged",
]

Way = Literal["auto", "points", "merged"]

# Padded tokens of a batch: a GPU wants large products.
CPU_TOKENS, GPU_TOKENS = 4096, 16_384
# Row lengths on a GPU are multiples of this, so that shapes come back and graphs are used again.
GPU_LENGTHS = 8
# And of this in half precision on a CPU: oneDNN prepares each shape of a product anew and keeps it, half a MiB.
HALF_LENGTHS = 2
# Left free when a copy of the weights is made, as a part of its size.
SPARE = 0.25


@dataclass(frozen=True)
class Read:
    """What a `Reader` makes of a batch."""

    log_probs: Tensor
    """[n, E, C] to average over the points"""
    open_entropy: Tensor | None = None
    """[n, E], as `Predictive.from_log_probs` takes it"""
    distance: Tensor | None = None
    """[E] from the training data"""
    model_label_log_probs: Tensor | None = None
    """[n, E] as `Predictive` has it"""
    base_log_probs: Tensor | None = None
    """[1, E, C] as `Predictive` has it"""


class Reader(Protocol):
    """Looks at the last hidden states of each batch beside its log-probabilities."""

    def read(self, log_probs: Tensor, states: States, batch: Batch) -> Read:
        """Called once for each batch with the log-probabilities [n, E, C] and states of all points."""


def predict_split(
    model: CurveModel,
    encoded: Encoded,
    t: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    points: int = 10,
    way: Way = "auto",
    reader: Reader | None = None,
) -> Predictive:
    """Predict a whole split by the average over points of the curve.

    Args:
        model: with a curve.
        encoded: a split as `Task.encode` gives it, E rows.
        t: points ``[n]`` in [0, 1], or coefficients ``[n, K]`` of points off the curve; None: `points` of them, equally
            spaced (`quadrature`, uniform).
        weights: of the points ``[n]``, summing to 1; equal if None.
        points: how many where `t` is None; each takes a forward pass for every row.
        way: `points` runs the points together, `merged` folds one after the other into the weights, `auto` takes the
            cheaper one that keeps precision. All give the same predictions up to rounding.
        reader: what looks at the last hidden states (`inference.unknowns`); None: nothing does.

    Returns:
        Predictions of the E rows in their order, on the CPU; of language modelling, of all its target tokens,
        summarised.

    Raises:
        UserError: as `quadrature`.
        ValueError: weights that do not sum to 1.
    """
    if t is None:
        t, own = quadrature("uniform", points, model.spec.segments, closed=model.spec.closed)
        weights = own if weights is None else weights
    return predict_splits(model, {"": encoded}, t, weights, way, reader)[""]


def predict_splits(
    model: CurveModel,
    splits: Mapping[str, Encoded],
    t: Tensor,
    weights: Tensor | None = None,
    way: Way = "auto",
    reader: Reader | None = None,
) -> dict[str, Predictive]:
    """Predict several splits at the points t, sorted by length and packed; each point is folded once for all of them.

    Args:
        t: points [n], or coefficients [n, K] of points off the curve.
        weights: of the points [n]; equal if None.
        way: `points` runs points together, `merged` one after the other; `auto` takes the cheaper one that keeps
            precision. Language modelling runs its points together: what lies between them is summarised at once.
        reader: as `predict_split`.

    Several processes all call this, predict a share of the examples each, and return the whole.
    """
    laid_out = {name: laid_out_for(model, encoded, whole=reader is not None) for name, encoded in splits.items()}
    choice = {name: batches for name, batches in laid_out.items() if splits[name].scoring != "lm"}
    tokens = sum(b.tokens for batches in choice.values() for b in batches)
    pays = way == "auto" and keeps_precision(model) and tokens > folding_tokens(model) and room_for_merged(model)
    merged = way == "merged" or pays
    done = _merged(model, choice, t, reader is not None) if merged and choice else {}
    out = {}
    for name, encoded in splits.items():
        lm, count = encoded.scoring == "lm", encoded.predictions
        batches, names = laid_out[name], encoded.name_of
        try:
            if name in done:
                at_points = _in_turn(done[name])
                out[name] = _collect(
                    model, at_points, batches, len(t), weights, count, True, names=names, reader=reader
                )
            else:
                out[name] = predict(model, batches, t, weights, None, lm, count, True, names, reader)
        except NoNumbersError as error:
            raise _named_alone(model, encoded, t, error) from None
    return out


def predict(
    model: CurveModel,
    batches: Iterable[Batch],
    t: Tensor,
    weights: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
    summarise: bool = False,
    examples: int | None = None,
    shared: bool = False,
    names: Callable[[int], str] = str,
    reader: Reader | None = None,
) -> Predictive:
    """Predict every example of batches at every curve point, in evaluation mode and without gradients.

    `predict_split` makes the batches of a whole split and chooses the way to run them.

    Args:
        model: with a curve.
        batches: each with ``.index``, the numbers ``[E]`` of its examples (together 0..N-1, each once, in any order).
        t: curve points ``[n]``, or coefficients ``[n, K]`` of points off the curve.
        weights: their weights ``[n]``; equal weights if None.
        progress: called after each batch with the number of examples done.
        summarise: keep only per-example summaries (`Predictive.summarise`).
        examples: N where it is known; without it examples missing at the very end go unnoticed.
        shared: the batches hold this process's share of the examples (`evaluation_batches`); every process calls this
            and returns the whole.
        names: what an example is called in messages, by its number.
        reader: as `predict_split`; batches of texts are laid out `whole` for it.

    Returns:
        The predictions of examples 0..N-1 in this order, on the CPU.

    Raises:
        UserError: the model's outputs for an example are no numbers.
        RuntimeError: an example is missing or there twice, or the model returned another shape.
    """
    idle = 0
    if shared and _is_sharded(model):
        batches = [*batches]
        passes = sum(model.runner.passes(batch, len(t)) for batch in batches)
        idle = max(gathered(lambda: passes)) - passes
    if reader is None:
        at_points: _AtPoints = lambda batch: (model.point_log_probs(batch, t), None)  # noqa: E731
    else:
        at_points = lambda batch: model.runner.point_states(batch, t)  # noqa: E731
    return _collect(
        model, at_points, batches, len(t), weights, examples, shared, summarise, progress, idle, names, reader
    )


def predict_base(model: CurveModel, encoded: Encoded) -> Predictive:
    """Predict a whole split by the base model without adapters, in one pass; returns as `predict_split`.

    Several processes all call this, predict a share of the examples each, and return the whole.
    """

    def at_base(batch: Batch) -> tuple[Tensor, None]:
        there: Batch = map_tensors(batch, lambda x: x.to(model.device))
        return model.runner.scores(there, None).log_softmax(-1), None

    batches = laid_out_for(model, encoded)
    idle = max(gathered(lambda: len(batches))) - len(batches) if _is_sharded(model) else 0
    lm, count = encoded.scoring == "lm", encoded.predictions
    return _collect(
        model, at_base, batches, 1, None, count, shared=True, summarise=lm, idle=idle, names=encoded.name_of
    )


def predict_folded(
    model: CurveModel,
    batches: Iterable[Batch],
    examples: int,
    summarise: bool = False,
    names: Callable[[int], str] = str,
) -> Predictive:
    """Inside `Merger.adapter`: predict every example by the one adapter that is folded in; arguments as `predict`."""
    at_adapter = lambda batch: (model.runner.scores(batch, None).log_softmax(-1), None)  # noqa: E731
    return _collect(model, at_adapter, batches, 1, None, examples, False, summarise, names=names)


_AtPoints = Callable[[Batch], tuple[Tensor, States | None]]
"""Log-probabilities [n, E, C] of a batch, and the last hidden states if they are wanted."""


def _collect(
    model: CurveModel,
    at_points: _AtPoints,
    batches: Iterable[Batch],
    points: int,
    weights: Tensor | None,
    examples: int | None,
    shared: bool,
    summarise: bool = False,
    progress: Callable[[int], None] | None = None,
    idle: int = 0,
    names: Callable[[int], str] = str,
    reader: Reader | None = None,
) -> Predictive:
    """What `predict` returns, of what `at_points` finds for each batch; `idle` forward passes follow for other
    processes."""
    outputs: list[Read] = []
    parts, indices, done = [], [torch.zeros(0, dtype=torch.long)], 0
    with without_gradients(_is_sharded(model)), evaluation_mode(model):
        for batch in batches:
            log_probs, states = at_points(batch)
            if log_probs.shape[:-1] != (points, len(batch.index)):
                raise RuntimeError(f"expected [{points}, {len(batch.index)}, C], found {list(log_probs.shape)}")
            found = Read(log_probs)
            if reader is not None and states is not None:
                found = reader.read(log_probs, states, batch)
            if summarise:
                parts.append(_predictive(found, weights, batch.index, names).summarise(batch.labels).to("cpu"))
            else:
                outputs.append(found)
            indices.append(batch.index)
            done += len(batch.index)
            if progress is not None:
                progress(done)
        for _ in range(idle):
            model.runner.idle()

    def own() -> tuple[Tensor, list[Predictive]]:
        # Outside inference mode: its tensors could not take part in later gradients (temperature fits).
        summaries = parts
        for part, index in zip(outputs, indices[1:], strict=False):
            summaries.append(_predictive(map_tensors(part, torch.Tensor.cpu), weights, index, names))
        return torch.cat([index.cpu() for index in indices]), summaries

    shares = gathered(own) if shared else [own()]
    order, done = torch.cat([index for index, _ in shares]), sum(len(index) for index, _ in shares)
    expected = done if examples is None else examples
    if not done or not torch.equal(order.sort().values, torch.arange(expected)):
        missing = set(range(expected)) - set(order.tolist())
        raise RuntimeError(
            f"expected each of the examples 0..{expected - 1} once, found {done}, without {sorted(missing)[:5]}; "
            "the batches dropped or repeated some"
        )
    return Predictive.cat([part for _, parts in shares for part in parts]).index(order.argsort())


class NoNumbersError(UserError):
    """Outputs that are NaN, with the numbers of the examples that have them."""

    def __init__(self, name: str, numbers: Sequence[int]) -> None:
        super().__init__(
            f"{name}: the model's outputs are no numbers (NaN or infinite); does the base work in this dtype without "
            "adapters?"
        )
        self.numbers = numbers


def _predictive(read: Read, weights: Tensor | None, index: Tensor, names: Callable[[int], str]) -> Predictive:
    """Average what was read of the examples numbered `index` [E]; raises NoNumbersError where it is NaN."""
    try:
        average = Predictive.from_log_probs(read.log_probs, weights, read.open_entropy)
        beside = ("distance", "model_label_log_probs", "base_log_probs")
        return replace(average, **{name: getattr(read, name) for name in beside})
    except ValueError:
        bad = read.log_probs.isnan().any(-1).any(0)
        if not bool(bad.any()):
            raise
        numbers = index.cpu()[bad.cpu()].tolist()
        raise NoNumbersError(names(numbers[0]), numbers) from None


def _named_alone(model: CurveModel, encoded: Encoded, t: Tensor, error: NoNumbersError) -> NoNumbersError:
    """The same error, of the example that is to blame: in a row that several share, all of them have its outputs."""
    if encoded.scoring == "lm" or _is_sharded(model):
        return error
    with torch.inference_mode(), evaluation_mode(model):
        for number in error.numbers:
            if bool(model.point_log_probs(collate(encoded, [number], packing=False), t).isnan().any()):
                return NoNumbersError(encoded.name_of(number), [number])
    return error


def _is_sharded(model: CurveModel) -> bool:
    return isinstance(model, CurveModel) and model.runner.sharded


def _in_turn(found: Sequence[tuple[Tensor, States | None]]) -> _AtPoints:
    """What was found before, batch by batch."""
    left = iter(found)
    return lambda _: next(left)


def _merged(
    model: CurveModel, splits: Mapping[str, Sequence[Batch]], t: Tensor, states: bool
) -> dict[str, list[tuple[Tensor, States | None]]]:
    """Log-probabilities [n, E, C] of every batch of every split, and last hidden states if wanted, one point after the
    other."""
    found: dict[str, list[list[tuple[Tensor, States | None]]]] = {
        name: [[] for _ in batches] for name, batches in splits.items()
    }
    with torch.inference_mode(), evaluation_mode(model), model.merger.points() as fold:
        for point in t:
            fold(point)
            for name, batches in splits.items():
                for rows, batch in zip(found[name], batches, strict=True):
                    rows.append(model.merger.states(batch) if states else (model.merger.log_probs(batch), None))
        return {name: [_joined(rows) for rows in of_split] for name, of_split in found.items()}


def _joined(points: Sequence[tuple[Tensor, States | None]]) -> tuple[Tensor, States | None]:
    log_probs = torch.cat([found for found, _ in points])
    states = [found for _, found in points if found is not None]
    return log_probs, States.cat(states) if states else None


def laid_out_for(model: CurveModel, encoded: Encoded, row_tokens: int = ROW_TOKENS, whole: bool = False) -> list[Batch]:
    """This process's share of a split in batches of a size that suits the model's device; `whole` as for `collate`."""
    if model.device.type == "cuda":
        size, pad_to = GPU_TOKENS, GPU_LENGTHS
    else:
        size, pad_to = CPU_TOKENS, 1 if keeps_precision(model) else HALF_LENGTHS
    packing = model.runner.takes_trees(encoded, row_tokens)
    return [*evaluation_batches(encoded, size, row_tokens, packing, pad_to, shared=True, whole=whole)]


def folding_tokens(model: CurveModel) -> float:
    """Tokens at each point from which on folding is cheaper than low-rank products; infinite where it cannot be done.

    Elements moved: folding reads the weight, writes its copy, reads and writes that once more to add the update, 4 n_in
    n_out; the products read x, read and write y, (n_in + 2 n_out) a token.
    """
    maps = [layer for layer in model.layers.values() if isinstance(layer, CurveLinear)]
    weights = [getattr(layer.base_layer, "weight", None) for layer in maps]
    if not maps or model.runner.sharded or any(w is None or not w.is_floating_point() for w in weights):
        return float("inf")
    if model.runner.replication.shared:
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


def point_nll(predictive: Predictive, labels: Tensor | None = None) -> Tensor:
    """[n, E] NLL of each example under each point's own model; a summarised object knows its labels."""
    if predictive.model_label_log_probs is not None:
        return -predictive.model_label_log_probs.double()
    if predictive.label_log_probs is not None:
        return -predictive.label_log_probs.double()
    assert predictive.point_log_probs is not None and labels is not None
    return negative_log_likelihood(predictive.point_log_probs.double(), labels)
