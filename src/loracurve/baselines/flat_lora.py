"""Flat-LoRA (Li et al., arXiv 2409.14396): one adapter trained under noise on the merged weights."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from loracurve.baselines.method import Fitted, Setting, fit_notes, from_adapters
from loracurve.baselines.single_adapter_loop import fresh_adapter
from loracurve.curve.spec import CurveSpec
from loracurve.system.errors import UserError
from loracurve.training.anchors import slot_seeds
from loracurve.training.config import FitConfig, LoopConfig, PerturbationConfig
from loracurve.training.fit import fit

__all__ = ["FlatLoRA"]


@dataclass(frozen=True)
class FlatLoRA:
    """A single adapter trained with a flat-minima perturbation."""

    perturbation: PerturbationConfig = field(default_factory=lambda: PerturbationConfig("flat_lora", 0.05, "ramp"))
    """The noise; the paper's form is flat_lora with the schedule ramp."""

    def __post_init__(self) -> None:
        if self.perturbation.kind == "none":
            raise UserError("perturbation.kind: expected flat_lora, lora_space or sam, found none; choose one")

    def fit(self, setting: Setting) -> Fitted:
        """Train one adapter from the start and over the batches of anchor 0."""
        options = {f.name: getattr(setting.training, f.name) for f in fields(LoopConfig)}
        options["seed"] = slot_seeds(setting.training.seed, 1)[0]
        config = FitConfig(**options, points=1, share_points=True, perturbation=self.perturbation)
        setting.model.set_curve(CurveSpec.slots(1), fresh_adapter(setting))
        folder = setting.folder / "training" if setting.folder else None
        result = fit(setting.model, setting.task, config, folder, label="Flat-LoRA", progress=setting.progress)
        passes = 2 if self.perturbation.kind == "sam" else 1
        cost = passes * result.steps * config.batch_size / setting.unit
        return from_adapters(setting, setting.model.control_points(), cost, notes=fit_notes(result))
