"""Checkpoints of a training loop: safetensors (control points, best state, moments) and JSON (everything else)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loracurve.errors import UserError
from loracurve.storage import read_json, read_tensors, write_json, write_tensors

__all__ = ["LoopState", "load_checkpoint", "save_checkpoint"]


@dataclass
class LoopState:
    """Everything a checkpoint holds beside the control points."""

    step: int
    best: list[Tensor]
    best_nll: list[float]
    best_step: list[int]
    stale: int
    history: list[dict[str, Any]]
    seconds: float = 0.0


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
    for old in folder.glob("checkpoint-*.safetensors"):
        if old.name != name:
            old.unlink()


def load_checkpoint(
    folder: Path, factors: Sequence[Tensor], optimizer: torch.optim.Optimizer, state: LoopState
) -> None:
    """Fill control points, optimiser moments and `state` from a checkpoint; raises UserError if it does not fit."""
    values = read_json(folder / "checkpoint.json")
    try:
        tensors = read_tensors(folder / str(values["tensors"]))
        state.step, state.stale, state.history = values["step"], values["stale"], values["history"]
        state.best_step, state.seconds = values["best_step"], values["seconds"]
        state.best_nll = [math.inf if v is None else v for v in values["best_nll"]]
        with torch.no_grad():
            for i, p in enumerate(factors):
                p.copy_(tensors[f"{i}.point"])
                state.best[i].copy_(tensors[f"{i}.best"])
                if state.step:
                    moments = {k: tensors[f"{i}.{k}"] for k in ("step", "exp_avg", "exp_avg_sq")}
                    optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in moments.items()}
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{folder}: the checkpoint does not fit this run ({error}); start in a new folder") from error
