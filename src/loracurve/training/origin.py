"""What a training began with: kept with its checkpoints, and compared when it goes on.

Options that the numbers depend on stay as they are. `MAY_CHANGE` are the others; `MAY_BE_LOWERED` are those that help
after a divergence, and every change of them is recorded with its step.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from loracurve.model.curve_model import CurveModel
from loracurve.model.fingerprint import base_fingerprint, compare_fingerprint
from loracurve.system.distributed import world
from loracurve.system.errors import CheckpointError
from loracurve.tasks.encoding import Encoded
from loracurve.training.config import LoopConfig

__all__ = ["MAY_BE_LOWERED", "MAY_CHANGE", "Changes", "Origin", "check_changes", "flat_options", "options_changed"]


# They decide how a step is computed, and on what, but for rounding not what comes out; `compile` until it was retired.
MAY_CHANGE = ("checkpoint_every", "compile", "device", "gradient_checkpointing", "point_passes", "processes")

# What steps that run away are made smaller by.
MAY_BE_LOWERED = ("learning_rate", "max_grad_norm", "perturbation.rho")

Changes = dict[str, tuple[Any, Any]]
"""values of options before and now, by dotted name"""


def flat_options(options: Any) -> dict[str, Any]:
    """The options of a dataclass by dotted name, as JSON has their values."""
    return _flat(dataclasses.asdict(options))


def _flat(values: Mapping[str, Any], heading: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{heading}{name}.")
        else:
            found[f"{heading}{name}"] = list(value) if isinstance(value, tuple) else value
    return found


def options_changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """What differs between flat options; an option that one of them lacks is None there."""
    names = {**before, **now}
    return {n: (before.get(n), now.get(n)) for n in names if not _same(before.get(n), now.get(n))}


def _same(a: Any, b: Any) -> bool:
    """Whether two values are one; true is no 1."""
    return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)


def check_changes(
    changes: Changes, where: str, free: Collection[str] = MAY_CHANGE, lowered: Collection[str] = MAY_BE_LOWERED
) -> None:
    """Refuse changes of what decides the numbers.

    Args:
        changes: as `options_changed` finds them.
        where: begins the message.
        free: options that may change.
        lowered: options that may become smaller.

    Raises:
        CheckpointError: another change; it names option and both values.
    """
    for name, (before, now) in changes.items():
        if name in free:
            continue
        if name in lowered and _is_lowered(name, before, now):
            continue
        most = "at most " if name in lowered else ""
        more = "" if len(changes) == 1 else f" ({len(changes)} options differ)"
        raise CheckpointError(
            f"{where}: {name}: expected {most}{_shown(before)}, as it was so far, found {_shown(now)}{more}; go on "
            "with the same options, or begin anew in another folder"
        )


def _is_lowered(name: str, before: Any, now: Any) -> bool:
    """Whether a number became smaller; no clipping, 0, is the largest norm."""
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in (before, now)):
        return False
    if name.rpartition(".")[2] == "max_grad_norm":
        before, now = before or math.inf, now or math.inf
    return bool(now <= before)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True)
class Origin:
    """All that decides the numbers of a training beside the steps that it has taken.

    Args:
        model: its base, the shape of its curve and its frozen control points are compared.
        config: the options.
        sets: tokenised rows by name: those that are trained on, validated with, or of another use.
    """

    model: CurveModel
    config: LoopConfig
    sets: Mapping[str, Encoded]

    @cached_property
    def options(self) -> dict[str, Any]:
        """Options by dotted name, those of the curve and its adapters among them."""
        shape = {k: v for k, v in flat_options(self.model.spec).items() if k != "alignment"}
        lora = self.model.config
        adapter = {n: getattr(lora, n) for n in ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")}
        return (
            flat_options(self.config)
            | {f"curve.{name}": value for name, value in shape.items()}
            | {f"lora.{name}": value for name, value in adapter.items()}
            | {"model.dtype": str(self.model.dtype).removeprefix("torch.")}
            | {"device": self.model.device.type, "processes": world()[1]}
        )

    @cached_property
    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps, for JSON."""
        layers = {
            name: [getattr(layer, "scaling", None), *layer.factors()] for name, layer in self.model.layers.items()
        }
        return {
            "options": self.options,
            "layers": hashlib.sha256(repr(layers).encode()).hexdigest(),
            "data": {name: _encoded_hash(encoded) for name, encoded in self.sets.items()},
            "base": base_fingerprint(self.model.model),
        }

    def check(self, known: Mapping[str, Any], where: str) -> Changes:
        """Compare with the `record` in a checkpoint; returns the options that changed and may.

        Raises:
            CheckpointError: something else changed, which the message names.
            KeyError, TypeError: no such record.
        """
        # What came into the library since then must have its default.
        before = {**flat_options(type(self.config)()), **known["options"]}
        changes = options_changed(before, self.options)
        check_changes(changes, where)
        differs = [
            f"{name} rows" for name in self.record["data"] if known["data"].get(name) != self.record["data"][name]
        ]
        if known["layers"] != self.record["layers"]:
            differs.append("adapted layers")
        if differs:
            raise CheckpointError(
                f"{where}: expected the {differs[0]} that it began with, found others; put them back, or begin anew "
                "in another folder"
            )
        if difference := compare_fingerprint(known["base"], self.model.model):
            raise CheckpointError(
                f"{where}: expected the base that it began with, found another: {difference}; put it back, or begin "
                "anew in another folder"
            )
        return changes

    def check_anchors(self, points: list[Tensor], where: str) -> None:
        """Compare frozen control points with those of a checkpoint, one tensor for each factor of the model.

        Their norms are: alignment may turn them in another way on another machine.

        Raises:
            CheckpointError: they are others.
        """
        frozen = ~self.model.spec.mask
        if not bool(frozen.any()):
            return
        mine, others = (
            torch.stack([p.detach().cpu()[frozen].double().flatten(1).norm(dim=1) for p in factors])
            for factors in (self.model.factors, points)
        )
        if not torch.allclose(mine, others, rtol=1e-3, atol=1e-6):
            raise CheckpointError(
                f"{where}: expected the anchors that it began with, found others; put them back, or begin anew in "
                "another folder"
            )


def _encoded_hash(encoded: Encoded) -> str:
    """SHA-256 of the tokens and labels of a set, whatever its rows are called."""
    digest = hashlib.sha256(repr((encoded.scoring, encoded.answer_ids, encoded.normalise)).encode())
    for example in encoded.examples:
        parts = (example.prompt, *example.choices, example.token_types or (), example.given)
        digest.update(repr((example.label, example.n_choices, [len(p) for p in parts])).encode())
        for part in parts:
            digest.update(array.array("q", part).tobytes())
    return digest.hexdigest()
