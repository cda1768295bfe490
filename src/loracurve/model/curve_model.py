"""CurveModel: a Hugging Face model that carries a curve of adapters; making, saving and loading it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import peft
import torch
from torch import Tensor, nn

from loracurve.curve.anchored import load_anchors, through
from loracurve.curve.config import Alignment
from loracurve.curve.files import export_adapter, load_curve, write_curve
from loracurve.curve.hub import curve_folder, push_model
from loracurve.curve.lora_space import PREFIX, ControlPoints, adapter_at
from loracurve.curve.spec import FREE_SEGMENTS, CurveSpec
from loracurve.model.base_model import load_base
from loracurve.model.injection import initial_control_points, inject
from loracurve.model.merging import Merger
from loracurve.model.routes import Route
from loracurve.model.runner import Runner
from loracurve.system.errors import UserError
from loracurve.system.randomness import stream_seed
from loracurve.tasks.batching import Batch

__all__ = ["CurveModel"]


_MOVED = {
    **{n: ("runner", n) for n in ("arrange", "compile_layers", "idle", "passes", "replication", "route", "scores")},
    **{n: ("runner", n) for n in ("run_layers_as_they_are", "sharded", "supports_trees", "vocabulary")},
    "merging": ("merger", "points"),
    "merged_log_probs": ("merger", "log_probs"),
}
"""Where names are that this class itself had until version 0.1."""


class CurveModel(nn.Module):
    """A language model or sequence classifier with a curve of LoRA adapters in it.

    Takes over `base`: its linear layers are wrapped in place, its weights frozen and never modified. Control points are
    float32 whatever the dtype of the base (float64 for a float64 base).

    Attributes: `config`, `model` (the base with curve layers in it), `layers` (these by name), `runner` (runs batches
    at points of the curve), `merger` (folds points and adapters into the weights).

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
        self.config = copy.copy(config)
        if config.base_model_name_or_path is None:  # as PEFT notes it, so that what is saved finds its base
            self.config.base_model_name_or_path = getattr(base, "name_or_path", None) or None
        route = Route()
        self.layers = inject(base, config, route)
        self.model = base
        self.runner = Runner(base, self.layers, route)
        self.merger = Merger(self.runner)
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
        config, anchors = load_anchors(folders)
        model = cls(_load_base(base, config), config, CurveSpec.slots(len(folders)), anchors)
        model.anchor(degree, alignment, inner, seed, pieces, closed)
        return model

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

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `curve_config.json` and `control_points.safetensors`; see `loracurve.curve.files`."""
        write_curve(self.config, self.spec, self.control_points(), Path(folder))

    def export(self, folder: str | Path, t: float) -> None:
        """Write the adapter at t as an ordinary PEFT folder."""
        export_adapter(self.config, self.adapter(t), folder)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, base: nn.Module | str | None = None, revision: str | None = None
    ) -> CurveModel:
        """Read what `save_pretrained` wrote, from a folder or from OWNER/NAME on the hub, where only its two files are
        fetched; `base` defaults to the model named in the file. `revision`: branch, tag or commit on the hub."""
        config, spec, points = load_curve(curve_folder(folder, revision))
        base = base if base is not None else config.base_model_name_or_path
        if base is None:
            raise UserError(f"{folder} does not name its base model; pass base=")
        return cls(_load_base(base, config), config, spec, points)

    def push_to_hub(
        self, repo: str, base: str | None = None, private: bool | None = None, token: str | None = None
    ) -> str:
        """Upload the curve to OWNER/NAME on the hub, with a short model card if there is none; returns the commit's
        address. `base`: the base model's name on the hub, where it was loaded from a folder. `loracurve share` writes
        the card of a whole run. Raises UserError as `loracurve.curve.hub.push_curve`."""
        return push_model(self.config, self.spec, self.control_points(), repo, base, private, token)


def _load_base(base: nn.Module | str, config: peft.LoraConfig) -> nn.Module:
    if isinstance(base, nn.Module):
        return base
    return load_base(base, classifier=config.task_type == peft.TaskType.SEQ_CLS)[0]
