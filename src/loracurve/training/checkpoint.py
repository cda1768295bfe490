"""Checkpoints of a training loop: safetensors (control points, best state, moments) and JSON (everything else).

The JSON holds checksums of both files and what the training began with (`origin`), so that no training goes on from a
damaged checkpoint or from that of another one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loracurve.system.distributed import on_main
from loracurve.system.errors import CheckpointError, one_line
from loracurve.system.files import file_hash, read_json, write_json
from loracurve.system.paths import exists
from loracurve.system.tensors import read_tensors, write_tensors
from loracurve.training.origin import Changes, Origin

__all__ = ["Checkpoint", "LoopState", "checksum", "load_checkpoint", "save_checkpoint"]

# Those without a number had no checksums, and did not say what they belong to.
FORMAT = 2


@dataclass
class LoopState:
    """Everything a checkpoint holds beside the control points."""

    step: int
    best: list[Tensor]
    best_nll: list[float]
    best_step: list[int]
    stale: list[int]
    """validations of each group since its best"""
    history: list[dict[str, Any]]
    seconds: float = 0.0
    changes: list[dict[str, Any]] = field(default_factory=list)
    """options that changed when the training went on: `option`, `before`, `now`, and the `step` after which"""


@dataclass(frozen=True)
class Checkpoint:
    """Where a loop's state is kept, with the control points and the optimiser that belong to it."""

    folder: Path
    factors: Sequence[Tensor]
    optimizer: torch.optim.Optimizer
    origin: Origin | None = None
    """what the training begins with; None: that is neither kept nor compared"""

    def load(self, state: LoopState) -> Changes:
        """Fill everything from what is there, if anything is; as `load_checkpoint`."""
        if not exists(self.folder / "checkpoint.json"):
            return {}
        return load_checkpoint(self.folder, self.factors, self.optimizer, state, self.origin)

    def save(self, state: LoopState) -> None:
        """Write everything; of several processes the main one does."""
        record = None if self.origin is None else self.origin.record  # which all of them make together
        on_main(partial(save_checkpoint, self.folder, self.factors, self.optimizer, state, record))


def save_checkpoint(
    folder: Path,
    factors: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    state: LoopState,
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Tensors under a name of their own first, then the JSON that points to them: a kill in between loses nothing.

    Args:
        origin: what the training began with (`Origin.record`).
    """
    tensors: dict[str, Tensor] = {}
    for i, (p, best) in enumerate(zip(factors, state.best, strict=True)):
        tensors |= {f"{i}.point": p, f"{i}.best": best}
        tensors |= {f"{i}.{k}": v for k, v in optimizer.state[p].items()}
    name = f"checkpoint-{state.step}.safetensors"
    write_tensors(folder / name, tensors)
    # JSON has no infinity: an NLL that was never measured is null.
    best_nll = [v if math.isfinite(v) else None for v in state.best_nll]
    values = {
        "format": FORMAT,
        "tensors": name,
        "tensors_sha256": file_hash(folder / name, "the checkpoint's tensors"),
        "origin": origin,
        "step": state.step,
        "best_nll": best_nll,
        "best_step": state.best_step,
        "stale": state.stale,
        "history": state.history,
        "seconds": state.seconds,
        "changes": state.changes,
    }
    write_json(folder / "checkpoint.json", values | {"sha256": checksum(values)})
    _remove_others(folder, name)


def checksum(values: Mapping[str, Any]) -> str:
    """SHA-256 of what a checkpoint.json says, however it is laid out, but for the checksum itself."""
    rest = {name: value for name, value in values.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _remove_others(folder: Path, name: str) -> None:
    for old in folder.glob("checkpoint-*.safetensors"):
        if old.name != name:
            with suppress(OSError):  # it costs space, nothing else
                old.unlink()


def load_checkpoint(
    folder: Path,
    factors: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    state: LoopState,
    origin: Origin | None = None,
) -> Changes:
    """Fill control points, optimiser moments and `state` from a checkpoint.

    Returns:
        The options that were changed since; all of them may be.

    Raises:
        CheckpointError: it is damaged, of an earlier version, or of another training; nothing has been filled in then.
    """
    try:
        values = _values(folder)
        found = _state(values, len(state.best_nll))
        changes = {} if origin is None else origin.check(values["origin"], str(folder))
        if origin is not None and found.step > origin.config.steps:
            raise ValueError(f"step {found.step} of {origin.config.steps}")
        tensors = _tensors(folder / values["tensors"], values["tensors_sha256"], factors, found.step)
        if origin is not None:
            origin.check_anchors([tensors[f"{i}.point"] for i in range(len(factors))], str(folder))
    except CheckpointError:
        raise
    except (AttributeError, KeyError, OverflowError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        said = f"no {error}" if isinstance(error, KeyError) else error
        raise CheckpointError(
            f"{folder}: expected a checkpoint as it was written, found a damaged one ({one_line(said, 200)}); delete "
            "the folder to train again from the first step, or put a copy back"
        ) from error
    for name in ("step", "stale", "history", "best_nll", "best_step", "seconds", "changes"):
        setattr(state, name, getattr(found, name))
    with torch.no_grad():
        for i, p in enumerate(factors):
            p.copy_(tensors[f"{i}.point"])
            state.best[i].copy_(tensors[f"{i}.best"])
            if found.step:
                # The fused kernel reads the count of steps from the device too.
                optimizer.state[p] = {k: tensors[f"{i}.{k}"].to(p.device) for k in ("step", "exp_avg", "exp_avg_sq")}
    _remove_others(folder, values["tensors"])
    return changes


def _values(folder: Path) -> dict[str, Any]:
    """What checkpoint.json says, once its checksum agrees."""
    values = read_json(folder / "checkpoint.json")
    version = values.get("format")
    if version is None and "tensors" in values:
        raise CheckpointError(
            f"{folder}: expected a checkpoint of format {FORMAT}, found one of an earlier version of loracurve, "
            "without checksums; delete the folder to train again from the first step, or go on with that version"
        )
    if type(version) is int and version > FORMAT:
        raise CheckpointError(
            f"{folder}: expected a checkpoint of format {FORMAT}, found {version}; a newer version of loracurve wrote "
            "it: pip install -U loracurve"
        )
    if version != FORMAT or values.get("sha256") != checksum(values):
        raise ValueError("checkpoint.json does not have its checksum")
    return dict(values)


def _state(values: Mapping[str, Any], groups: int) -> LoopState:
    """The state without its tensors, which may be read then."""
    name, step = values["tensors"], values["step"]
    if not _is_count(step) or name != f"checkpoint-{step}.safetensors":
        raise ValueError(f"step {step!r} with tensors {name!r}")
    best_nll = [math.inf if v is None else float(v) for v in values["best_nll"]]
    best_step, stale, history = [*values["best_step"]], [*values["stale"]], [*values["history"]]
    if {len(best_nll), len(best_step), len(stale)} != {groups} or any(math.isnan(v) for v in best_nll):
        raise ValueError(f"expected figures of {groups} groups")
    if not all(map(_is_count, [*best_step, *stale])) or len(history) != step:
        raise ValueError("counts that cannot be")
    if not all(isinstance(entry, dict) and isinstance(entry.get("nll"), float) for entry in history):
        raise ValueError("a history without losses")
    changes = [dict(change) for change in values["changes"]]
    return LoopState(step, [], best_nll, best_step, stale, history, float(values["seconds"]), changes)


def _tensors(path: Path, known: str, factors: Sequence[Tensor], step: int) -> dict[str, Tensor]:
    """The tensors, once their file has its checksum and they suit the control points."""
    if file_hash(path, "the checkpoint's tensors") != known:
        raise ValueError(f"{path.name} does not have its checksum")
    tensors = read_tensors(path, most=10 * len(factors))
    for i, p in enumerate(factors):
        for part in ("point", "best", *(("exp_avg", "exp_avg_sq") if step else ())):
            found = tensors[f"{i}.{part}"]
            if found.shape != p.shape or not found.is_floating_point():
                raise ValueError(f"tensor {i}.{part}: expected floating-point numbers of shape {list(p.shape)}")
        if step and tensors[f"{i}.step"].numel() != 1:
            raise ValueError(f"tensor {i}.step")
    return tensors


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53
