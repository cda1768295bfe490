"""CurveModel: a Hugging Face model that carries a curve of adapters; making, saving and loading it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import peft
import torch
from torch import Tensor, nn

from loracurve.curve import bezier
from loracurve.curve.config import Alignment
from loracurve.curve.files import export_adapter, load_adapter, load_curve, write_curve
from loracurve.curve.gauge import align
from loracurve.curve.hub import curve_folder, push_model
from loracurve.curve.lora_space import ControlPoints, adapter_at, stack_adapters
from loracurve.curve.spec import FREE_SEGMENTS, CurveSpec
from loracurve.model.base_model import load_base
from loracurve.model.injection import initial_control_points
from loracurve.model.predictor import CurvePredictor
from loracurve.system.errors import UserError
from loracurve.system.randomness import stream_seed

__all__ = ["CurveModel", "save_curve"]


class CurveModel(CurvePredictor):
    """A language model or sequence classifier with a curve of LoRA adapters in it.

    Takes over `base`: its linear layers are wrapped in place, its weights frozen and never modified. Control points are
    float32 whatever the dtype of the base (float64 for a float64 base).

    Args:
        base: a Hugging Face model.
        config: a `peft.LoraConfig`; target matching is PEFT's own.
        spec: shape of the curve.
        points: control points; default: drawn like fresh adapters, independently, from `seed`.
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
        super().__init__(base, config)
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
        """A free curve: every control point drawn like a fresh adapter and trained; options as in `CurveSpec`."""
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
            alignment: gauge alignment of the anchors (`loracurve.gauge.align`).
            inner: inner control points start on the straight line (Garipov et al. 2018) or at the LoRA init.
            seed: seed of the LoRA init.
            pieces: segments between two neighbouring anchors (degree 1 and 2 pieces: a chain with one bend).
            closed: the curve goes on from the last anchor back to the first.

        Raises:
            UserError: adapters of different bases, ranks, scalings or targets; damaged folders; fewer than two.
        """
        loaded = [load_adapter(f) for f in folders]
        if len(loaded) < 2:
            raise UserError(f"an anchored curve needs at least 2 adapter folders, found {len(loaded)}")
        config = loaded[0][0]
        for folder, (other, _) in zip(folders, loaded, strict=True):
            for key in ("base_model_name_or_path", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
                mine, found = getattr(config, key), getattr(other, key)
                if mine != found:
                    raise UserError(f"{folder}: {key} is {found!r}, but {mine!r} in {folders[0]}; anchors must agree")
        anchors = stack_adapters([tensors for _, tensors in loaded])
        model = cls(_load_base(base, config), config, CurveSpec.slots(len(loaded)), anchors)
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
        """Turn M independent adapters (`CurveSpec.slots`) into the anchored curve through them; arguments as above."""
        if inner not in ("line", "init"):
            raise UserError(f"unknown start of inner points {inner!r}; expected line or init")
        anchors = align(self.control_points(), alignment)
        count = len(next(iter(anchors.values())))
        spec = CurveSpec.anchored(count, degree, alignment, pieces, closed)
        if closed:
            anchors = {name: torch.cat([tensor, tensor[:1]]) for name, tensor in anchors.items()}
        points = {name: bezier.on_line(tensor, degree * pieces) for name, tensor in anchors.items()}
        if inner == "init":
            fresh = self.fresh_points(spec, seed)
            points = {n: torch.where(_column(spec.mask, p), fresh[n].to(p), p) for n, p in points.items()}
        self.set_curve(spec, spec.tie(points))

    def fresh_points(self, spec: CurveSpec, seed: int = 0) -> ControlPoints:
        """Control points drawn like fresh adapters, each independently: where a free curve starts."""
        seeds = [stream_seed(seed, "control point", k) for k in range(spec.size)]
        return spec.tie(initial_control_points(self.layers, seeds, self.config.init_lora_weights))

    def adapter(self, t: float) -> dict[str, Tensor]:
        """The adapter at t as a PEFT state (`lora_A.weight` [r, n_in], `lora_B.weight` [n_out, r], dense heads)."""
        return adapter_at(self.control_points(), self.coefficients(torch.tensor(float(t), dtype=torch.float64)))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `curve_config.json` and `control_points.safetensors`; see `loracurve.storage`."""

        save_curve(self, folder)

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
        the card of a whole run. Raises UserError as `loracurve.sharing.push_curve`."""

        return push_model(self.config, self.spec, self.control_points(), repo, base, private, token)


def _column(mask: Tensor, like: Tensor) -> Tensor:
    """[K] -> [K, 1, ...], to select control points of a stacked tensor."""
    return mask.to(like.device).view(-1, *[1] * (like.dim() - 1))


def _load_base(base: nn.Module | str, config: peft.LoraConfig) -> nn.Module:
    if isinstance(base, nn.Module):
        return base

    return load_base(base, classifier=config.task_type == peft.TaskType.SEQ_CLS)[0]


def save_curve(model: CurveModel, folder: str | Path) -> None:
    """Write the curve of `model` into `folder`; the tensors first, so that a config never lacks them."""
    write_curve(model.config, model.spec, model.control_points(), Path(folder))
