"""CurveModel: a Hugging Face model that carries a curve of adapters; making, saving and loading it."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import peft
import torch
from torch import Tensor, nn

from loracurve.curve.anchored import load_anchors, through
from loracurve.curve.config import Alignment
from loracurve.curve.files import BaseRecord, export_adapter, load_base_record, load_curve, write_curve
from loracurve.curve.hub import curve_folder, push_model
from loracurve.curve.index import INDEX, index_of
from loracurve.curve.lora_space import PREFIX, ControlPoints, adapter_at, head_labels
from loracurve.curve.spec import FREE_SEGMENTS, CurveSpec
from loracurve.model.base_model import DRAWN_ANEW, load_base
from loracurve.model.fingerprint import base_fingerprint, compare_fingerprint
from loracurve.model.injection import base_parameters, initial_control_points, inject
from loracurve.model.layers import CurveLayer
from loracurve.model.merging import Merger
from loracurve.model.routes import Route
from loracurve.model.runner import Runner
from loracurve.model.targets import named_targets
from loracurve.system.errors import UserError
from loracurve.system.files import write_json
from loracurve.system.folders import new_folder
from loracurve.system.randomness import stream_seed
from loracurve.tasks.batching import Batch

__all__ = ["CurveModel"]

logger = logging.getLogger("loracurve")


_MOVED = {
    **{n: ("runner", n) for n in ("arrange", "idle", "passes", "replication", "route", "scores")},
    **{n: ("runner", n) for n in ("sharded", "vocabulary")},
    "merging": ("merger", "points"),
    "merged_log_probs": ("merger", "log_probs"),
}
"""Where names are that this class itself had until version 0.1."""


class CurveModel(nn.Module):
    """A language model or sequence classifier with a curve of LoRA adapters in it.

    Takes over `base`: its linear layers are wrapped in place, its weights frozen and never modified. Control points are
    float32 whatever the dtype of the base (float64 for a float64 base).

    Attributes: `config`, `model` (the base with curve layers in it), `layers` (these by name), `runner` (runs batches
    at points of the curve), `merger` (folds points and adapters into the weights), `base_weights` (weights of the base
    that are saved with the curve, by name: of classifiers what lies between layers and head, which checkpoints may
    lack, and what adapters brought).

    Args:
        base: a Hugging Face model.
        config: a `peft.LoraConfig`; target matching is PEFT's own.
        spec: shape of the curve; default: free, two segments of degree 2.
        points: control points by PEFT name, each [K, ...] for the K that `spec` has; default: drawn like fresh
            adapters, independently, from `seed`.
        seed: seed of the draw.

    Raises:
        UserError: targets that do not match or are not linear, options that curves do not support.
    """

    def __init__(
        self,
        base: nn.Module,
        config: peft.LoraConfig,
        spec: CurveSpec | None = None,
        points: ControlPoints | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        config = named_targets(config, base)
        self.config = config
        if config.base_model_name_or_path is None:  # as PEFT notes it, so that what is saved finds its base
            self.config.base_model_name_or_path = getattr(base, "name_or_path", None) or None
        route = Route()
        self.layers = inject(base, config, route)
        self.model = base
        self.runner = Runner(base, self.layers, route)
        self.merger = Merger(self.runner)
        self.base_weights = _own_weights(base, self.layers, self.is_classifier)
        if points is None and (drawn := sorted({*getattr(base, DRAWN_ANEW, ())} & {*self.base_weights})):
            logger.warning(
                "%s: its checkpoint lacks %s, drawn at random now and not trained; lora.modules_to_save trains them",
                *(getattr(base, "name_or_path", None) or type(base).__name__, ", ".join(drawn)),
            )
        self._fingerprint = base_fingerprint(base)
        spec = spec or CurveSpec()
        self.set_curve(spec, self.fresh_points(spec, seed) if points is None else points)

    @classmethod
    def from_config(
        cls,
        base: nn.Module | str,
        config: peft.LoraConfig,
        segments: int = FREE_SEGMENTS,
        degree: int = 2,
        seed: int = 0,
        closed: bool = False,
        factors: Literal["both", "A", "B"] = "both",
    ) -> CurveModel:
        """A free curve: every control point drawn like a fresh adapter, and trained.

        Args:
            base: the model, which is taken over, or its name on the hub or folder.
            config: the adapters, as PEFT takes them.
            segments: Bezier segments, joined at their ends.
            degree: degree of each segment; the curve has segments * degree + 1 control points.
            seed: seed of the draw.
            closed: the curve ends where it begins.
            factors: which factors vary along the curve; with A or B the other one is shared by all its points.

        Raises:
            UserError: as `CurveModel`, a shape that no curve has, a base that cannot be loaded.
        """
        spec = CurveSpec(segments, degree, closed=closed, factors=factors)
        return cls(_load_base(base, config), config, spec, seed=seed)

    @classmethod
    def from_adapters(
        cls,
        base: nn.Module | str,
        folders: Sequence[str | Path],
        degree: int = 2,
        alignment: Alignment = "balanced+procrustes",
        inner: Literal["line", "init"] = "line",
        seed: int = 0,
        pieces: int = 1,
        closed: bool = False,
    ) -> CurveModel:
        """An anchored curve through adapters that PEFT saved, in the order given.

        Args:
            base: the model they were trained on, or its name.
            folders: at least two PEFT adapter folders.
            degree: degree of each segment.
            alignment: how the anchors' rescaling freedom (gauge) is removed first (`loracurve.align`).
            inner: inner control points start on the straight line (Garipov et al. 2018) or at the LoRA init.
            seed: seed of the LoRA init.
            pieces: segments between two neighbouring anchors (degree 1 and 2 pieces: a chain with one bend).
            closed: the curve goes on from the last anchor back to the first.

        Raises:
            UserError: adapters of different bases, ranks, scalings or targets; damaged folders; fewer than two.
        """
        model = cls.with_adapters(base, folders)
        model.anchor(degree, alignment, inner, seed, pieces, closed)
        return model

    @classmethod
    def with_adapters(cls, base: nn.Module | str, folders: Sequence[str | Path]) -> CurveModel:
        """Adapters that PEFT saved as independent control points, in the order given (`CurveSpec.slots`); `anchor`
        makes the curve through them. Arguments and errors as in `from_adapters`."""
        if isinstance(folders, str | Path | nn.Module):
            found = type(folders).__name__ if isinstance(folders, nn.Module) else repr(str(folders))
            raise UserError(
                f"expected the base and then a list of adapter folders, found {found} in place of the list; give the "
                "base first"
            )
        config, adapters = load_anchors(folders)
        loaded = _load_base(base, config, adapters)
        named = base if isinstance(base, str) else getattr(base, "name_or_path", None)
        if named:
            config.base_model_name_or_path = named
        model = cls(loaded, config, CurveSpec.slots(len(folders)))
        model.set_curve(model.spec, model._sorted_out(adapters, folders))
        return model

    def read_adapters(self, folders: Sequence[str | Path]) -> ControlPoints:
        """Adapters that PEFT saved, stacked ``[M, ...]`` in the order given, with the tensors that this curve has.

        What else their folders hold must be the base's own. Where it is not, but all folders agree, it replaces the
        base's, as PEFT does it.

        Raises:
            UserError: as `from_adapters`; tensors that are neither this curve's nor the base's, or that differ.
        """
        return self._sorted_out(load_anchors(folders)[1], folders)

    def _sorted_out(self, adapters: ControlPoints, folders: Sequence[str | Path]) -> ControlPoints:
        own = {f"{PREFIX}{name}.{suffix}" for name, layer in self.layers.items() for suffix in layer.shapes()}
        brought, known = {}, base_parameters(self.model)
        for name in sorted(adapters.keys() - own):
            tensor, bare = adapters[name], name.removeprefix(PREFIX).replace(".base_layer.", ".")
            _base_weight(known, bare, str(folders[0]))
            if any(not torch.equal(other, tensor[0]) for other in tensor[1:]):
                raise UserError(
                    f"{folders[0]}: expected the same {bare} in all adapters, which is no part of the curve, found "
                    "different ones; a curve has one base for all its points"
                )
            brought[bare] = tensor[0]
        self.bring(brought, str(folders[0]))
        return {name: tensor for name, tensor in adapters.items() if name in own}

    @torch.no_grad()
    def bring(self, weights: Mapping[str, Tensor], source: str) -> None:
        """Give weights of the base, by its own names, the values that a curve or its adapters were trained with; they
        are saved with the curve. `source` begins the message of every error.

        Raises:
            UserError: the base has no such weight, or one of another shape.
        """
        known = base_parameters(self.model)
        for name, tensor in sorted(weights.items()):
            weight = _base_weight(known, name, source)
            if weight.shape != tensor.shape:
                raise UserError(
                    f"{source}: expected {name} of the base's shape {list(weight.shape)}, found {list(tensor.shape)}; "
                    "give the base as it was when trained (where tokens were added: resize_token_embeddings first)"
                )
            if not torch.equal(tensor.to(weight), weight):
                level = logging.INFO if name in self.base_weights else logging.WARNING
                logger.log(level, "%s replaces the base's %s, as it does in PEFT", source, name)
                weight.copy_(tensor)
                self.base_weights[name] = tensor.detach().cpu().clone()
        if weights:
            self._fingerprint = base_fingerprint(self.model)
        for name, tensor in weights.items():  # tied weights are one
            if not torch.equal(tensor.to(known[name]), known[name]):
                raise UserError(f"{source}: expected {name} as the weight that it is tied to, found another")

    def anchor(
        self,
        degree: int = 2,
        alignment: Alignment = "balanced+procrustes",
        inner: Literal["line", "init"] = "line",
        seed: int = 0,
        pieces: int = 1,
        closed: bool = False,
    ) -> None:
        """Turn M independent adapters (`CurveSpec.slots`) into the anchored curve through them, for instance after
        `fit_anchors`; arguments and errors as in `from_adapters`."""
        if inner not in ("line", "init"):
            raise UserError(f"unknown start of inner points {inner!r}; expected line or init")
        fresh = (lambda spec: self.fresh_points(spec, seed)) if inner == "init" else None
        self.set_curve(*through(self.control_points(), degree, alignment, pieces, closed, fresh))

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
        self.runner.set_shape(spec)

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
    def spec(self) -> CurveSpec:
        """Shape of the curve."""
        return self.runner.spec

    @property
    def is_classifier(self) -> bool:
        """Whether the base is a sequence classifier, and not a language model."""
        return self.runner.is_classifier

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.runner.device

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype: the base model's."""
        return self.runner.dtype

    @property
    def factors(self) -> list[nn.Parameter]:
        """All control points, one stacked tensor of leading dimension K for each factor."""
        return [p for layer in self.layers.values() for p in layer.factors().values()]

    @property
    def dependences(self) -> list[Tensor | None]:
        """For each of `factors`: how its control points depend on each other (`CurveSpec.dependence`)."""
        suffixes = [suffix for layer in self.layers.values() for suffix in layer.factors()]
        return [self.spec.dependence(self.spec.is_shared(suffix)) for suffix in suffixes]

    @property
    def window(self) -> int | None:
        """Longest input that the model takes, in tokens; None where nothing limits it."""
        return self.runner.window

    @property
    def scalings(self) -> dict[str, float]:
        """alpha / r of every map by the parameter name of its A; 1 for dense heads."""
        return {f"{PREFIX}{n}.lora_A.weight": getattr(layer, "scaling", 1.0) for n, layer in self.layers.items()}

    def coefficients(self, t: Tensor) -> Tensor:
        """c(t) [*t.shape, K] of this curve, in t's dtype."""
        return self.runner.coefficients(t)

    def forward(self, t: Tensor | float | None = None, **inputs: Any) -> Any:
        """The Hugging Face model's own forward at points of the curve.

        Args:
            t: a number or [n] points: every row is run at each of them, the output's leading dimension is n * N, points
                first. [n, K]: coefficients of points off the curve. None: the base model without adapters.
            inputs: as the wrapped model takes them, tensors of leading dimension N.
        """
        return self.runner.forward(t, inputs)

    def point_log_probs(self, batch: Batch, t: Tensor, tokens_per_pass: int | None = None) -> Tensor:
        """log p(y | x, theta(t_i)) of the E examples of a batch and their C classes, [n, E, C] float32, for t [n]; see
        `Runner.point_log_probs`. `predict_split` does this for a whole split, and averages."""
        return self.runner.point_log_probs(batch, t, tokens_per_pass)

    @contextmanager
    def merged(self, t: float) -> Iterator[None]:
        """Inside the block the point t is folded into copies of the touched weights: `forward` without t, and whole
        data sets, then cost what the base costs."""
        with self.merger.points() as fold:
            fold(t)
            yield

    def __getattr__(self, name: str) -> Any:
        if name not in _MOVED:
            return super().__getattr__(name)
        part, new = _MOVED[name]
        text = f"CurveModel.{name} is CurveModel.{part}.{new} now; the old name goes in the next version"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        return getattr(getattr(self, part), new)

    def fresh_points(self, spec: CurveSpec, seed: int = 0) -> ControlPoints:
        """Control points drawn like fresh adapters, each independently: where a free curve starts."""
        seeds = [stream_seed(seed, "control point", k) for k in range(spec.size)]
        return spec.tie(initial_control_points(self.layers, seeds, self.config.init_lora_weights))

    def adapter(self, t: float) -> dict[str, Tensor]:
        """The adapter at t as a PEFT state (`lora_A.weight` [r, n_in], `lora_B.weight` [n_out, r], dense heads)."""
        return adapter_at(self.control_points(), self.coefficients(torch.tensor(float(t), dtype=torch.float64)))

    def save_pretrained(self, folder: str | Path, base: str | None = None) -> None:
        """Write a curve folder, which `from_pretrained` reads; see `loracurve.curve.files`. What the commands take,
        which know prompt and data too, is a run: `loracurve.save_run`. `base`: the name of the base model in the file;
        None: the one that `config` has."""
        write_curve(self.config, self.spec, self.control_points(), Path(folder), base, self._record())

    def export(self, folder: str | Path, t: float) -> None:
        """Write the adapter at t as an ordinary PEFT folder."""
        export_adapter(self.config, self.adapter(t), folder, self.base_weights)

    def export_points(
        self,
        folder: str | Path,
        t: Tensor | Sequence[float],
        weights: Tensor | Sequence[float] | None = None,
        beside: Callable[[Sequence[Mapping[str, Any]]], None] | None = None,
    ) -> None:
        """Write the adapters at points as PEFT folders `point-00`, `point-01`, ... with `index.json` of their t and
        weights, as `loracurve export` does: for multi-LoRA servers and their client.

        Args:
            folder: new folder.
            t: [n] points, such as `loracurve.quadrature` gives with their weights.
            weights: [n], sum 1. None: equal.
            beside: writes what goes along, and is given what index.json is going to hold. That comes last: it says that
                the rest is there.

        Raises:
            UserError: a folder with something in it, weights that are none or not as many as points.
        """
        points = [float(x) for x in t]
        index = index_of(points, [1 / len(points) for _ in points] if weights is None else [float(w) for w in weights])
        place = new_folder(Path(folder))
        for point in index:
            self.export(place / point["folder"], point["t"])
        if beside is not None:
            beside(index)
        write_json(place / INDEX, index)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, base: nn.Module | str | None = None, revision: str | None = None
    ) -> CurveModel:
        """Read what `save_pretrained` wrote, from a folder or from OWNER/NAME on the hub, where only its two files are
        fetched; `base` defaults to the model named in the file. `revision`: branch, tag or commit on the hub."""
        place = curve_folder(folder, revision)
        config, spec, points = load_curve(place)
        base = base if base is not None else config.base_model_name_or_path
        if base is None:
            raise UserError(f"{folder} does not name its base model; pass base=")
        model = cls(_load_base(base, config, points), config, spec, points)
        record = load_base_record(place)
        model.bring(record.weights, str(folder))
        if record.fingerprint and (differs := compare_fingerprint(record.fingerprint, model.model)) is not None:
            raise UserError(f"{folder}: expected the base that the curve was trained on, found another: {differs}")
        return model

    def _record(self) -> BaseRecord:
        return BaseRecord(self.base_weights, self._fingerprint)

    def push_to_hub(
        self, repo: str, base: str | None = None, private: bool | None = None, token: str | None = None
    ) -> str:
        """Upload the curve to OWNER/NAME on the hub, with a short model card if there is none; returns the commit's
        address. `base`: the base model's name on the hub, where it was loaded from a folder. `loracurve share` writes
        the card of a whole run. Raises UserError as `loracurve.curve.hub.push_curve`."""
        return push_model(self.config, self.spec, self.control_points(), repo, base, private, token, self._record())


def _load_base(base: nn.Module | str, config: peft.LoraConfig, adapters: ControlPoints | None = None) -> nn.Module:
    """The base itself or by its name; of a classifier with as many labels as the head of the (stacked) adapters has."""
    if isinstance(base, nn.Module):
        return base
    if not isinstance(base, str | Path):
        raise UserError(f"base: expected a model, its folder or its name on the hub, found a {type(base).__name__}")
    classifier = config.task_type == peft.TaskType.SEQ_CLS
    labels = head_labels(adapters) if classifier and adapters else None
    return load_base(base, classifier, num_labels=labels, revision=config.revision)[0]


def _base_weight(known: Mapping[str, Tensor], name: str, source: str) -> Tensor:
    """The base's weight of this name; raises UserError, which `source` begins, where it has none."""
    weight = known.get(name)
    if weight is None or not weight.is_floating_point():
        raise UserError(
            f"{source}: {name} is neither a part of the curve nor a weight of this base: an adapter of another one, or "
            "of names before transformers 4.52 (then load it in PEFT and save it again)"
        )
    return weight


def _own_weights(base: nn.Module, layers: Mapping[str, CurveLayer], classifier: bool) -> dict[str, Tensor]:
    """Weights of a base that may be in no checkpoint and are no part of the curve, copied to the CPU.

    Checkpoints of classifiers' bases lack what lies between the layers and the head (poolers), where they were made for
    something else. It is all that is neither in a numbered layer nor an embedding, whatever its name. `load_base`
    noted what else was drawn anew.
    """
    names = set(getattr(base, DRAWN_ANEW, ()))
    known = base_parameters(base)
    if classifier:
        tables = {id(p) for m in base.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        names |= {n for n, p in known.items() if not re.search(r"\.\d+\.", n) and id(p) not in tables}
    carried = [f"{name}." for name in layers]
    return {
        name: p.detach().cpu().clone()
        for name, p in known.items()
        if name in names and p.is_floating_point() and not any(name.startswith(c) for c in carried)
    }
