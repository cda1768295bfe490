"""Carrying control points inside a Hugging Face model, and running batches at points of their curve."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import peft
import torch
from torch import Tensor, nn

from loracurve.curve import bezier
from loracurve.curve.lora_space import PREFIX, ControlPoints
from loracurve.curve.spec import CurveSpec
from loracurve.model.causal_mask import PlainCausal
from loracurve.model.compiling import compile_layers, run_as_they_are
from loracurve.model.cuda_graphs import Captured
from loracurve.model.functional import cast_together
from loracurve.model.fused_norms import fuse_norms
from loracurve.model.heads import OutputHead
from loracurve.model.injection import inject
from loracurve.model.layers import CurveLinear
from loracurve.model.replication import Replication
from loracurve.model.routes import Layout, Route, within_segments
from loracurve.model.scoring import class_scores, takes_tree_masks
from loracurve.system.errors import UserError
from loracurve.tasks.batching import Batch, tree_mask

__all__ = ["CurveCarrier", "PointModel", "evaluation_mode", "without_gradients"]


logger = logging.getLogger("loracurve")


class CurveCarrier(nn.Module):
    """What runs at points of a curve: the base model with curve layers in it, the control points, the ways to run.

    `model.CurveModel` makes, saves and loads it. Without control points until `set_curve` gives them.
    """

    spec: CurveSpec
    compiled: bool = False
    """whether layers are compiled"""
    sharded: bool = False
    """whether the base's layers are spread over processes (`loracurve.sharding`), which then run in step"""

    def __init__(self, base: nn.Module, config: peft.LoraConfig) -> None:
        super().__init__()
        self.route = Route()
        self.config = copy.copy(config)
        if config.base_model_name_or_path is None:  # as PEFT notes it, so that what is saved finds its base
            self.config.base_model_name_or_path = getattr(base, "name_or_path", None) or None
        self.layers = inject(base, config, self.route)
        self.model = base
        fuse_norms(base)
        self.is_classifier = "SequenceClassification" in type(base).__name__
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
        self._trees: bool | None = None
        self._graphs: Captured | None = None

    def set_curve(self, spec: CurveSpec, points: ControlPoints) -> None:
        """Replace the curve: `points` by PEFT name, each [K, ...] in PEFT's layout.

        Raises:
            UserError: missing, unknown or wrong-shaped tensors.
        """
        expected = {f"{PREFIX}{name}.": layer for name, layer in self.layers.items()}
        left = set(points)
        device, dtype = self.device, torch.float64 if self.dtype == torch.float64 else torch.float32
        for prefix, layer in expected.items():
            factors = {}
            for suffix, shape in layer.shapes().items():
                tensor = points.get(prefix + suffix)
                if tensor is None or list(tensor.shape) != [spec.size, *shape]:
                    found = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
                    raise UserError(
                        f"control points: expected {prefix + suffix} of shape {[spec.size, *shape]}, found it {found}"
                    )
                left.discard(prefix + suffix)
                factors[suffix] = tensor.detach().to(device, dtype, copy=True)
            layer.set_factors(factors)
        if left:
            raise UserError(f"control points: unknown tensor {sorted(left)[0]}; they belong to another model or config")
        self.spec = spec
        self._graphs = None  # graphs hold the places of the control points they were captured with

    def control_points(self) -> ControlPoints:
        """The control points by PEFT name, detached copies on the CPU, [K, r, n_in] and [K, n_out, r]."""
        return {
            f"{PREFIX}{name}.{suffix}": (p.mT if suffix == "lora_B.weight" else p).detach().cpu().clone().contiguous()
            for name, layer in self.layers.items()
            for suffix, p in layer.factors().items()
        }

    @torch.no_grad()
    def copy_points(self, points: ControlPoints) -> None:
        """Give the control points of the present curve the values of others, [K, ...] by PEFT name, in their place."""
        for name, layer in self.layers.items():
            for suffix, p in layer.factors().items():
                values = points[f"{PREFIX}{name}.{suffix}"]
                p.copy_(values.mT if suffix == "lora_B.weight" else values)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype: the base model's."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @property
    def factors(self) -> list[nn.Parameter]:
        """All control points, one stacked tensor of leading dimension K for each factor."""
        return [p for layer in self.layers.values() for p in layer.factors().values()]

    @property
    def dependences(self) -> list[Tensor | None]:
        """For each of `factors`: how its control points depend on each other (`CurveSpec.dependence`)."""
        suffixes = [suffix for layer in self.layers.values() for suffix in layer.factors()]
        return [self.spec.dependence(self.spec.is_shared(suffix)) for suffix in suffixes]

    def coefficients(self, t: Tensor) -> Tensor:
        """c(t) [*t.shape, K] of this curve, in t's dtype."""
        return bezier.coefficients(t, self.spec.segments, self.spec.degree)

    @property
    def supports_trees(self) -> bool:
        """Whether several examples may share a row behind a 4-D mask; found out by a small trial, once."""
        if self._trees is None:
            if self.is_classifier:
                return False
            self._set_route(Route("base"))
            with evaluation_mode(self.model):
                self._trees = takes_tree_masks(self.model, self.dtype, self.device)
        return self._trees

    def forward(self, t: Tensor | float | None = None, **inputs: Any) -> Any:
        """The Hugging Face model's own forward at points of the curve.

        Args:
            t: a number or [n] points: every row is run at each of them, the output's leading dimension is n * N, points
                first. [n, K]: coefficients of points beside the curve. None: the base model without adapters.
            inputs: as the wrapped model takes them, tensors of leading dimension N.
        """
        if t is None:
            if self.route.kind != "merged":
                self._set_route(Route("base"))
            return self.model(**inputs)
        points = torch.as_tensor(t, dtype=torch.float64)
        c = points if points.dim() == 2 else self.coefficients(points.reshape(-1))
        rows = next(v.shape[0] for v in inputs.values() if isinstance(v, Tensor))
        self._set_route(self._route_for(c, Layout("points", len(c)), rows))
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
        if layout is None:
            coefficients, layout = self.arrange(batch, coefficients)
        rows = batch.input_ids.shape[0]
        if coefficients is not None and coefficients.dim() == 3:
            self._set_route(self._route_for(coefficients[0], layout, rows))
            for layer, own in zip(self.layers.values(), coefficients, strict=True):
                layer.route = self._route_for(own, layout, rows)
        else:
            self._set_route(self._route_for(coefficients, layout, rows, batch.token_units))
        self._cast_factors()
        self.route.plain = batch.ends is batch.visible is batch.attention_mask is None
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
        for key in ("attention_mask", "token_type_ids"):
            if getattr(batch, key) is not None:
                inputs[key] = getattr(batch, key)
        if not self.is_classifier:
            inputs["use_cache"] = False
        logits = self.model(**self.replication.inputs(inputs)).logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return class_scores(batch, logits.view(replicas, -1, logits.shape[-1]))

    def compile_layers(self, **options: Any) -> None:
        """Compile the layers of the stack that holds the curve (`loracurve.compiling`); options of torch.compile."""
        if self.replication.stack is None:
            logger.warning("running without compiled layers: %s has no stack of layers", type(self.model).__name__)
            return
        _ = self.supports_trees  # found out before: its odd shapes shall not be compiled for
        self.compiled = True
        layers = self.model.get_submodule(self.replication.stack).children()
        compile_layers(layers, self.plain_causal, **options)

    def run_layers_as_they_are(self) -> None:
        """Undo `compile_layers`."""
        self.compiled = False
        if self.replication.stack is not None:
            run_as_they_are(self.model.get_submodule(self.replication.stack).children())

    def _cast_factors(self) -> None:
        """Cast the factors of all layers at once where layers would take them whole, one by one, in the next pass."""
        route, dtype = self.route, self.dtype
        taken = route.kind in ("rows", "tokens") or (route.kind == "points" and route.whole)
        # Compiled layers cast as they read. Without gradients the copies would only outlive their layers.
        if not (taken and torch.is_grad_enabled() and self._maps) or self.compiled or self.sharded:
            return
        if self._maps[0].A.dtype != dtype:
            copies = cast_together([f for layer in self._maps for f in (layer.A, layer.B)], dtype)
            for layer, a, b in zip(self._maps, copies[::2], copies[1::2], strict=True):
                layer.cast = a, b
            self._cast = True

    def _set_route(self, route: Route) -> Route:
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
            if layout.kind == "tokens":
                assert token_units is not None
                by_point = c.to(self.dtype).unflatten(0, (layout.replicas, -1))
                route.coefficients = by_point[:, token_units.flatten()].flatten(0, 1)
            else:
                route.coefficients = c.to(self.dtype).repeat_interleave(rows * layout.replicas // len(c), dim=0)
        return route


class PointModel(Protocol):
    """A module that predicts at several points of a curve at once, such as `CurveModel`."""

    def point_log_probs(self, batch: Any, t: Tensor) -> Tensor:
        """Normalised float32 log-probabilities ``[n, E, C]`` of the batch at the points t ``[n]``."""
        ...

    def modules(self) -> Iterator[nn.Module]: ...
    def eval(self) -> Any: ...


def without_gradients(model: object) -> AbstractContextManager[object]:
    """Inference mode; of a base that is spread over processes, whose gathered weights training uses again, no-grad."""
    return torch.no_grad() if getattr(model, "sharded", False) else torch.inference_mode()


@contextmanager
def evaluation_mode(model: PointModel | nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every submodule has its own training flag again."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
