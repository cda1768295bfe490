"""Running batches at points of a curve: which way, and the forward pass itself."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from loracurve.curve import bezier
from loracurve.curve.spec import CurveSpec
from loracurve.model.base_model import model_window
from loracurve.model.causal_mask import PlainCausal
from loracurve.model.cuda_graphs import Captured, capturing, map_tensors
from loracurve.model.declared import check_lengths, pad_token
from loracurve.model.functional import cast_together
from loracurve.model.fused_parts import fuse_parts
from loracurve.model.heads import OutputHead
from loracurve.model.layers import CurveLayer, CurveLinear
from loracurve.model.replication import Replication
from loracurve.model.routes import Held, Layout, Route, within_segments
from loracurve.model.scoring import class_scores
from loracurve.model.states import LastMap, States
from loracurve.model.trials import (
    PaddingSide,
    check_causal,
    decodes_in_batches,
    full_precision,
    mixing_layer,
    padding_side,
    takes_tree_masks,
)
from loracurve.system.errors import UserError
from loracurve.tasks.batching import ROW_TOKENS, Batch, tree_mask
from loracurve.tasks.encoding import Encoded

__all__ = ["MOST_LOGITS", "Request", "Runner", "evaluation_mode", "without_gradients"]

logger = logging.getLogger("loracurve")

MOST_LOGITS = 2**29
"""Of a pass at several points: texts are read out at many places for the whole vocabulary, 2 GiB of float32 here."""


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every submodule has its own training flag again."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def without_gradients(sharded: bool) -> AbstractContextManager[object]:
    """Inference mode; of a base that is spread over processes, whose gathered weights training uses again, no-grad."""
    return torch.no_grad() if sharded else torch.inference_mode()


@dataclass
class Request:
    """What a prediction depends on beside the weights: the key of its graph."""

    batch: Batch
    coefficients: Tensor | None
    layout: Layout
    mode: tuple[bool, bool]
    """whether the model is in training mode, and whether inference mode is on"""
    states: bool = False
    """whether last hidden states are wanted too"""


class Runner:
    """Runs a base model with curve layers in it at points of their curve.

    It holds no weights of its own: control points are the layers' parameters.

    Args:
        base: with the curve layers in it; parts of it are fused and its output head is wrapped in place.
        layers: the curve layers by name.
        route: the object in which all of them read where the rows of the running pass lie on the curve.
    """

    spec: CurveSpec
    """shape of the curve that the layers carry"""
    sharded: bool = False
    """whether the base's layers are spread over processes (`loracurve.model.fsdp`), which then run in step"""

    def __init__(self, base: nn.Module, layers: Mapping[str, CurveLayer], route: Route) -> None:
        self.model, self.layers, self.route = base, layers, route
        fuse_parts(base)
        # Classes of one's own are made from those of transformers.
        self.is_classifier = any("SequenceClassification" in kind.__name__ for kind in type(base).__mro__)
        find_head: Any = getattr(base, "get_output_embeddings", None)
        head = None if self.is_classifier or find_head is None else find_head()
        if head is not None:
            name = next(n for n, m in base.named_modules() if m is head)
            parent, _, child = name.rpartition(".")
            reading = OutputHead(head, self.route)
            setattr(base.get_submodule(parent), child, reading)
        self.vocabulary = 0 if head is None else len(reading.weight)
        self.replication = Replication(base, self.layers, self.route, share=not self.is_classifier)
        self.plain_causal = PlainCausal(base, self.replication.stack, self.route)
        self._maps = [layer for layer in self.layers.values() if isinstance(layer, CurveLinear)]
        self._cast = False
        self._padding: PaddingSide | None = None
        self._tried = False
        self._mixing: str | None = None
        self._decoding: bool | None = None
        self._window: tuple[int | None] | None = None
        self._last: LastMap | None = None
        self._trees: dict[tuple[Any, ...], bool] = {}
        self._graphs: Captured | None = None
        self._held: tuple[Tensor, Held] | None = None

    def hold(self, t: Tensor) -> None:
        """Keep the factors at points t [n], or at coefficients [n, K], for passes that run all of them together and no
        others, without gradients: small ones (a request, a token) spend much of their time on making them. As much
        memory as n adapters. On the CPU only; a GPU has its graphs."""
        t = t.to("cpu", torch.float64)
        self._held = (t if t.dim() == 2 else self.coefficients(t), {}) if self.device.type == "cpu" else None

    def set_shape(self, spec: CurveSpec) -> None:
        """Take the shape of a new curve in the layers; graphs hold the places of the control points before."""
        self.spec = spec
        self._held = None
        self.forget_graphs()

    def forget_graphs(self) -> None:
        """Capture anew at the next prediction."""
        self._graphs = None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype: the base model's."""
        bases = (module for module in self.model.modules() if not isinstance(module, CurveLayer))
        return next(p.dtype for module in bases for p in module.parameters(recurse=False) if p.is_floating_point())

    def coefficients(self, t: Tensor) -> Tensor:
        """c(t) [*t.shape, K] of this curve, in t's dtype."""
        return bezier.coefficients(t, self.spec.segments, self.spec.degree)

    def takes_trees(self, encoded: Encoded, row_tokens: int = ROW_TOKENS) -> bool:
        """Whether several examples of a split, or several choices, may share rows of about so many tokens behind a 4-D
        mask; found out by a trial of their size, once (`trials.takes_tree_masks`)."""
        self.try_out()
        self._check(encoded)
        if self.is_classifier or not len(encoded):
            return False
        # Rows of one shape serve many splits; balanced rows are longer than the budget by an example at most.
        path, row = (1 << (n - 1).bit_length() for n in (encoded.longest_path, row_tokens + encoded.sorted_sizes[-1]))
        size = path, row, self.dtype, self.device.type
        # Windows that hold a longer path, or that a longer row does not count along, hold shorter ones too.
        if any(size[2:] == s[2:] and path <= s[0] and row <= s[1] for s, taken in self._trees.items() if taken):
            return True
        if size not in self._trees:
            limit = self.window
            with self.bare():
                self._trees[size] = takes_tree_masks(self.model, self.dtype, self.device, min(path, limit or path), row)
        return self._trees[size]

    def _check(self, encoded: Encoded) -> None:
        """Raise UserError for rows that this model cannot take, or not together."""
        config: Any = self.model.config
        check_lengths(config, encoded.shortest_path, encoded.longest_path)
        known = getattr(config, "type_vocab_size", None)
        if self.is_classifier and isinstance(known, int) and known > 0:
            largest = encoded.largest_token_type
            if largest >= known:
                raise UserError(
                    f"{type(self.model).__name__}: expected token types below {known}, found {largest} from the "
                    "tokenizer, which belongs to another model"
                )

    def try_out(self) -> None:
        """Find out, once, on which side a classifier is padded, whether a language model is causal, and whether rows
        can lie at points of their own.

        Raises:
            UserError: it is not, or no side will do.
        """
        if self._tried or capturing():
            return
        with self.bare():
            if self.is_classifier:
                self._padding = padding_side(self.model, self.dtype, self.device)
            elif self.vocabulary:
                check_causal(self.model, self.dtype, self.device)
            self._mixing = mixing_layer(self.model, self.layers, self.is_classifier, self.device)
        self._tried = True

    def decodes_in_batches(self) -> bool:
        """Whether texts of unlike lengths can be continued together (`trials.decodes_in_batches`); tried once."""
        self.try_out()
        if self._decoding is None:
            with self.bare():
                self._decoding = decodes_in_batches(self.model, self.dtype, self.device)
        return self._decoding

    @property
    def window(self) -> int | None:
        """Longest input that the model takes, in tokens (`base_model.model_window`)."""
        if self._window is None:
            with self.bare():
                self._window = (model_window(self.model),)
        return self._window[0]

    @property
    def last_map(self) -> LastMap:
        """The linear map that gives the logits; raises UserError where none does."""
        if self._last is None:
            self.try_out()
            with self.bare():
                self._last = LastMap(self.model, self.route, self.device)
        return self._last

    def last_rows(self, t: Tensor, token_ids: Sequence[int] | None, size: int) -> Tensor:
        """Weight and bias of the last map at points of the curve, [n, C, size + 1] float64.

        Args:
            t: [n], or coefficients [n, K] of points off the curve.
            token_ids: the answers of a language model; None: all outputs.
            size: n_in.

        Raises:
            UserError: the logits are not proportional to what the map gives.
        """
        last, device = self.last_map, self.device
        if last.scale is None:
            raise UserError(
                f"{type(self.model).__name__}: expected logits proportional to what the output head gives, found "
                "others (soft-capping?): no rows of it give them"
            )
        c = t if t.dim() == 2 else self.coefficients(t.to("cpu", torch.float64))
        ids = None if token_ids is None else torch.tensor(token_ids, device=device)
        found = []
        for point in c[:, None]:
            self.set_route(self._route_for(point, Layout("points"), size + 1))
            found.append(last.rows(size, ids, self.dtype, device))
        self.set_route(Route("base"))
        return torch.stack(found)

    @contextmanager
    def bare(self) -> Iterator[None]:
        """Inside the block the model is the base, in evaluation mode, in float32 where that can be."""
        before = replace(self.route)
        self.set_route(Route("base"))
        try:
            with evaluation_mode(self.model), full_precision(self.model):
                yield
        finally:
            self.set_route(before)

    def forward(self, t: Tensor | float | None, inputs: dict[str, Any]) -> Any:
        """`CurveModel.forward`: the base model's own forward, `inputs` as it takes them."""
        if t is None:
            if self.route.kind != "merged":
                self.set_route(Route("base"))
            return self.model(**inputs)
        points = torch.as_tensor(t, dtype=torch.float64)
        c = points if points.dim() == 2 else self.coefficients(points.reshape(-1))
        self.try_out()
        if self._mixing is not None and len(c) > 1:
            raise self._no_rows()
        rows = next(v.shape[0] for v in inputs.values() if isinstance(v, Tensor))
        self.set_route(self._route_for(c, Layout("points", len(c)), rows))
        return self.model(**self.replication.inputs(inputs))

    def arrange(self, batch: Batch, coefficients: Tensor | None) -> tuple[Tensor | None, Layout]:
        """Choose the way to run for coefficients of any form that `scores` takes; best called with CPU tensors.

        Returns:
            Coefficients [G, K] (points: G equal groups of rows), [R, K] (rows) or [n E, K] (tokens), and the layout.
        """
        if coefficients is None:
            return None, Layout("merged" if self.route.kind == "merged" else "base")
        rows = batch.input_ids.shape[0]
        if batch.row_slots is not None:
            counts = torch.bincount(batch.row_slots, minlength=len(coefficients))
            if bool((counts == counts[0]).all()):
                whole = coefficients.device.type == "cpu" and torch.equal(
                    coefficients, torch.eye(self.spec.size).to(coefficients)
                )
                return coefficients, Layout("points", whole=whole)
            return coefficients[batch.row_slots.to(coefficients.device)], Layout("rows")
        if coefficients.dim() == 2:
            return coefficients, Layout("points", len(coefficients))
        n, segments = coefficients.shape[0], self.spec.segments
        flat = coefficients.flatten(0, 1)
        if batch.token_units is not None:
            return flat, Layout("tokens", n)
        # Stratified points ascend over the rows, so that equal groups of rows lie in one segment each.
        grouped = flat.view(segments, -1, flat.shape[1]) if segments > 1 and (n * rows) % segments == 0 else None
        windows = segments if grouped is not None and within_segments(grouped, self.spec.degree) else 1
        return flat, Layout("rows", n, windows)

    def scores(self, batch: Batch, coefficients: Tensor | None, layout: Layout | None = None) -> Tensor:
        """Score each class of each example at points of the curve.

        Args:
            batch: on the model's device.
            coefficients: [n, K], n points shared by all rows; [n, N, K], n points for each row (with `token_units`
                [n, E, K], for each example); for a batch with slots [M, K], one point for each slot; None: the base
                model, or the point folded in by `merged`.
            layout: with it, `coefficients` are what `arrange` returned, or for `points` [L, n, K], n points of its own
                for each of the L curve layers.

        Returns:
            [n, E, C] float32 (float64 for a float64 base) unnormalised log-probabilities; -inf where an example has no
            such choice.
        """
        return self._scored(batch, coefficients, layout, False)[0]

    def _scored(
        self, batch: Batch, coefficients: Tensor | None, layout: Layout | None, states: bool
    ) -> tuple[Tensor, States | None]:
        """`scores`, and the last hidden states if wanted."""
        self.try_out()
        last = self.last_map if states else None
        if not (self.is_classifier or self.vocabulary):
            raise UserError(
                f"expected a language model or a sequence classifier, found {type(self.model).__name__}, which "
                "predicts no tokens"
            )
        if layout is None:
            coefficients, layout = self.arrange(batch, coefficients)
        rows = batch.input_ids.shape[0]
        if self._mixing is not None and coefficients is not None and coefficients.shape[-2] > 1:
            return self._one_after_the_other(batch, coefficients, layout, states)
        if coefficients is not None and coefficients.dim() == 3:
            self.set_route(self._route_for(coefficients[0], layout, rows))
            for layer, own in zip(self.layers.values(), coefficients, strict=True):
                layer.route = self._route_for(own, layout, rows)
        else:
            self.set_route(self._route_for(coefficients, layout, rows, batch.token_units))
        self._cast_factors()
        self.route.plain = batch.ends is batch.visible is batch.attention_mask is None
        self.route.watched = states
        replicas = layout.replicas
        if batch.positions is not None:
            # Read-outs of every replica; the head is computed there and nowhere else.
            step = torch.arange(replicas, device=batch.positions.device)[:, None] * batch.tokens
            self.route.positions = (batch.positions + step).flatten()
            self.route.position_rows = self.route.positions
            if layout.kind != "tokens":
                self.route.position_rows = self.route.positions // batch.input_ids.shape[1]
            self.route.token_ids = batch.answer_ids
        inputs: dict[str, Any] = {"input_ids": batch.input_ids}
        if batch.ends is not None:
            inputs |= {
                "attention_mask": tree_mask(batch.ends, self.dtype, batch.visible),
                "position_ids": batch.position_ids,
            }
        elif batch.visible is not None:
            inputs["attention_mask"] = batch.visible.long()
        if batch.attention_mask is not None:
            inputs |= self._padded(batch, batch.attention_mask)
        if not self.is_classifier:
            inputs["use_cache"] = False
        logits = self.model(**self.replication.inputs(inputs)).logits
        found = None if last is None else last.states(batch, logits, replicas)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return class_scores(batch, logits.view(replicas, -1, logits.shape[-1])), found

    def _one_after_the_other(
        self, batch: Batch, coefficients: Tensor, layout: Layout, states: bool
    ) -> tuple[Tensor, States | None]:
        """`_scored` of a classifier that mixes rows: those of each point by themselves."""
        if not self.is_classifier:
            raise self._no_rows()
        rows = batch.input_ids.shape[0]
        size = rows * layout.replicas // coefficients.shape[-2] if layout.kind == "points" else 1
        found = []
        for place in range(0, rows * layout.replicas, size):
            first = place % rows
            own: dict[str, Any] = {
                field.name: value[first : first + size]
                for field in fields(batch)
                if isinstance(value := getattr(batch, field.name), Tensor) and value.shape[0] == rows
            }
            point = coefficients[..., place // size : place // size + 1, :]
            found.append(self._scored(replace(batch, **own), point, Layout("points"), states))
        scores = torch.cat([part for part, _ in found], 1).view(layout.replicas, rows, -1)
        if not states:
            return scores, None
        read = torch.cat([own.read for _, own in found if own is not None], 1)
        return scores, States(read.view(layout.replicas, rows, -1))

    def _no_rows(self) -> UserError:
        return UserError(
            f"{type(self.model).__name__} mixes the rows of a batch in {self._mixing}, so they cannot lie at different "
            "points; one point at a time can (curve_training.share_points: true, points: 1)"
        )

    def _padded(self, batch: Batch, mask: Tensor) -> dict[str, Tensor]:
        """Rows of a classifier, filled on its side by what it takes for padding, whatever the tokenizer does."""
        values = {"input_ids": batch.input_ids.masked_fill(mask == 0, pad_token(self.model)), "attention_mask": mask}
        if batch.token_type_ids is not None:
            values["token_type_ids"] = batch.token_type_ids
        if self._padding == "left":
            place = torch.arange(mask.shape[1], device=mask.device)
            turned = (place + mask.sum(1, keepdim=True)) % mask.shape[1]
            values = {name: value.gather(1, turned) for name, value in values.items()}
        return values

    def point_log_probs(self, batch: Batch, t: Tensor, tokens_per_pass: int | None = None) -> Tensor:
        """log p(y | x, theta(t_i)): [n, E, C] for t [n], or for coefficients [n, K] of points off the curve; points
        are run together as far as `tokens_per_pass` and `MOST_LOGITS` allow.

        Without gradients, shapes that come back are captured in CUDA graphs. Default of `tokens_per_pass`: 16,384 on
        the CPU, 65,536 elsewhere.
        """
        return torch.cat([log_probs for log_probs, _ in self._at_points(batch, t, tokens_per_pass, False)])

    def point_states(self, batch: Batch, t: Tensor) -> tuple[Tensor, States]:
        """`point_log_probs` and the last hidden states that they come from; rows of texts are laid out `whole`.

        Raises:
            UserError: the logits are not what one linear map gives.
        """
        found = [*self._at_points(batch, t, None, True)]
        states = States.cat([part for _, part in found if part is not None])
        return torch.cat([log_probs for log_probs, _ in found]), states

    def _at_points(
        self, batch: Batch, t: Tensor, tokens_per_pass: int | None, states: bool
    ) -> Iterator[tuple[Tensor, States | None]]:
        """What `respond` gives for each group of points that is run together."""
        t = t.to("cpu", torch.float64)
        c = t if t.dim() == 2 else self.coefficients(t)
        self.try_out()
        if states:
            _ = self.last_map  # found before anything is captured
        if self._graphs is None or self._graphs.device != self.device:
            self._graphs = Captured(self.respond, self.device, not self.sharded)
        run = self.respond if torch.is_grad_enabled() else self._graphs
        mode = (self.model.training, torch.is_inference_mode_enabled())
        for part in c.split(self._points_in_pass(batch, tokens_per_pass)):
            request = Request(batch, *self.arrange(batch, part), mode, states)
            yield run(request if run is self._graphs else map_tensors(request, lambda x: x.to(self.device)))

    def respond(self, request: Request) -> tuple[Tensor, States | None]:
        """The log-probabilities that a request asks for, in one pass, and the last hidden states if it does."""
        scores, states = self._scored(request.batch, request.coefficients, request.layout, request.states)
        return scores.log_softmax(-1), states

    def _points_in_pass(self, batch: Batch, tokens_per_pass: int | None = None) -> int:
        if self._mixing is not None and not self.is_classifier:
            return 1
        budget = tokens_per_pass or (16_384 if self.device.type == "cpu" else 65_536)
        classes = self.vocabulary if batch.answer_ids is None else len(batch.answer_ids)
        logits = 0 if batch.positions is None else len(batch.positions) * classes
        return max(1, min(budget // max(batch.tokens, 1), MOST_LOGITS // max(logits, 1)))

    def passes(self, batch: Batch, points: int) -> int:
        """Forward passes that `point_log_probs` takes."""
        return -(-points // self._points_in_pass(batch))

    def idle(self) -> None:
        """A forward pass for nothing but its communication with other processes."""
        self.set_route(Route("base"))
        self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device))

    def _cast_factors(self) -> None:
        """Cast the factors of all layers at once where layers would take them whole, one by one, in the next pass."""
        route, dtype = self.route, self.dtype
        taken = route.kind in ("rows", "tokens") or (route.kind == "points" and route.whole)
        # Without gradients the copies would only outlive their layers.
        if not (taken and torch.is_grad_enabled() and self._maps) or self.sharded:
            return
        if self._maps[0].A.dtype != dtype:
            copies = cast_together([f for layer in self._maps for f in (layer.A, layer.B)], dtype)
            for layer, a, b in zip(self._maps, copies[::2], copies[1::2], strict=True):
                layer.cast = a, b
            self._cast = True

    def set_route(self, route: Route) -> Route:
        """Say where the rows of the next pass lie on the curve; returns the object that the layers read it in."""
        # The layers hold this very object; checkpointed layers read it again in the backward pass, so it stays set.
        self.route.__dict__.update(route.__dict__)
        if self._cast:
            for carrying in self._maps:
                carrying.cast = None
            self._cast = False
        if next(iter(self.layers.values())).route is not self.route:
            for layer in self.layers.values():
                layer.route = self.route
        return self.route

    def _route_for(
        self, coefficients: Tensor | None, layout: Layout, rows: int, token_units: Tensor | None = None
    ) -> Route:
        route = Route(layout.kind, replicas=layout.replicas, rows=rows, windows=layout.windows, degree=self.spec.degree)
        route.whole = layout.whole
        if coefficients is not None:
            c = coefficients.to(self.device)
            route.groups = c if layout.kind == "points" else None
            if self._held is not None and layout.kind == "points" and _same(coefficients, self._held[0]):
                route.held = self._held[1]
            if layout.kind == "tokens":
                assert token_units is not None
                by_point = c.to(self.dtype).unflatten(0, (layout.replicas, -1))
                route.coefficients = by_point[:, token_units.flatten()].flatten(0, 1)
            else:
                route.coefficients = c.to(self.dtype).repeat_interleave(rows * layout.replicas // len(c), dim=0)
        return route


def _same(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.device) == (b.dtype, b.device) and torch.equal(a, b)
