"""Checkpoints of a training loop: safetensors (control points, best state, moments) and JSON (everything else)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loracurve.system.distributed import on_main
from loracurve.system.errors import UserError
from loracurve.system.files import read_json, write_json
from loracurve.system.tensors import read_tensors, write_tensors

__all__ = ["Checkpoint", "LoopState", "load_checkpoint", "save_checkpoint"]


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


@dataclass(frozen=True)
class Checkpoint:
    """Where a loop's state is kept, with the control points and the optimiser that belong to it."""

    folder: Path
    factors: Sequence[Tensor]
    optimizer: torch.optim.Optimizer

    def load(self, state: LoopState) -> None:
        """Fill everything from what is there, if anything is; raises UserError as `load_checkpoint` does."""
        if (self.folder / "checkpoint.json").exists():
            load_checkpoint(self.folder, self.factors, self.optimizer, state)

    def save(self, state: LoopState) -> None:
        """Write everything; of several processes the main one does."""
        on_main(partial(save_checkpoint, self.folder, self.factors, self.optimizer, state))


def save_checkpoint(
    folder: Path, factors: Sequence[Tensor], optimizer: torch.optim.Optimizer, state: LoopState
) -> None:
    """Tensors under a name of their own first, then the JSON that points to them: a kill in between loses nothing."""
    tensors: dict[str, Tensor] = {}
    for i, (p, best) in enumerate(zip(factors, state.best, strict=True)):
        tensors |= {f"{i}.point": p, f"{i}.best": best}
        tensors |= {f"{i}.{k}": v for k, v in optimizer.state[p].items()}
    name = f"checkpoint-{state.step}.safetensors"
    write_tensors(folder / name, tensors)
    # JSON has no infinity: an NLL that was never measured is null.
    best_nll = [v if math.isfinite(v) else None for v in state.best_nll]
    write_json(
        folder / "checkpoint.json",
        {
            "tensors": name,
            "step": state.step,
            "best_nll": best_nll,
            "best_step": state.best_step,
            "stale": state.stale,
            "history": state.history,
            "seconds": state.seconds,
        },
    )
    _remove_others(folder, name)


def _remove_others(folder: Path, name: str) -> None:
    for old in folder.glob("checkpoint-*.safetensors"):
        if old.name != name:
            with suppress(OSError):  # it costs space, nothing else
                old.unlink()


def load_checkpoint(
    folder: Path, factors: Sequence[Tensor], optimizer: torch.optim.Optimizer, state: LoopState
) -> None:
    """Fill control points, optimiser moments and `state` from a checkpoint.

    Raises:
        UserError: it is damaged or of another run; nothing has been filled in then.
    """
    values = read_json(folder / "checkpoint.json")
    try:
        name, step = values["tensors"], values["step"]
        if not _is_count(step) or name != f"checkpoint-{step}.safetensors":
            raise ValueError(f"step {step!r} with tensors {name!r}")
        tensors = read_tensors(folder / name)
        groups = len(state.best_nll)
        best_nll = [math.inf if v is None else float(v) for v in values["best_nll"]]
        best_step, stale, history = [*values["best_step"]], [*values["stale"]], [*values["history"]]
        if {len(best_nll), len(best_step), len(stale)} != {groups} or any(math.isnan(v) for v in best_nll):
            raise ValueError(f"expected figures of {groups} groups")
        if not all(map(_is_count, [*best_step, *stale])) or len(history) != step:
            raise ValueError("counts that cannot be")
        if not all(isinstance(entry, dict) and isinstance(entry.get("nll"), float) for entry in history):
            raise ValueError("a history without losses")
        seconds = float(values["seconds"])
        for i, p in enumerate(factors):
            for part in ("point", "best", *(("exp_avg", "exp_avg_sq") if step else ())):
                found = tensors[f"{i}.{part}"]
                if found.shape != p.shape or not found.is_floating_point():
                    raise ValueError(f"tensor {i}.{part}: expected floating-point numbers of shape {list(p.shape)}")
            if step and tensors[f"{i}.step"].numel() != 1:
                raise ValueError(f"tensor {i}.step")
    except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder}: the checkpoint does not fit this run ({error}); start in a new folder") from error
    state.step, state.stale, state.history = step, stale, history
    state.best_nll, state.best_step, state.seconds = best_nll, best_step, seconds
    with torch.no_grad():
        for i, p in enumerate(factors):
            p.copy_(tensors[f"{i}.point"])
            state.best[i].copy_(tensors[f"{i}.best"])
            if step:
                # The fused kernel reads the count of steps from the device too.
                optimizer.state[p] = {k: tensors[f"{i}.{k}"].to(p.device) for k in ("step", "exp_avg", "exp_avg_sq")}
    _remove_others(folder, name)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53
