"""The card of a run and its curve, ready for the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loracurve.curve.files import load_base_record, load_curve
from loracurve.curve.hub import hub_base, write_shared
from loracurve.curve.model_card import model_card
from loracurve.report.run_data import RunData, read_run
from loracurve.report.sections import summary
from loracurve.runs.identity import read_identity
from loracurve.system.errors import UserError
from loracurve.system.folders import new_folder

__all__ = ["share_run"]


def _training(run: RunData) -> list[str]:
    """Settings and versions, one line each."""
    lines = []
    config, environment = run.config, run.environment
    parts = {"anchors": "anchor_training", "curve": "curve_training"}
    for name, part in parts.items():
        if name == "anchors" and (config["curve"]["kind"] == "free" or config.get("adapters")):
            continue
        options = config[part]
        lines.append(
            f"{name}: {options['steps']:,} steps of {options['batch_size']} examples, learning rate "
            f"{options['learning_rate']:g} ({options['schedule']}), weight decay {options['weight_decay']:g}, "
            f"seed {options['seed']}"
        )
    objective = config["curve_training"]["objective"]
    if objective["jsd"] != "none":
        lines.append(f"diversity term: {objective['jsd']} of weight {objective['weight']:g}")
    if config["curve_training"]["perturbation"]["kind"] != "none":
        perturbation = config["curve_training"]["perturbation"]
        lines.append(f"perturbation: {perturbation['kind']}, rho {perturbation['rho']:g}")
    seconds = run.metrics.get("seconds", {}).get("total")
    on = f" on {environment['device']}" if environment.get("device") else ""
    if seconds is not None:
        lines.append(f"{seconds:,.0f} s in all{on}")
    packages = [f"{name} {number}" for name, number in environment.get("packages", {}).items() if number]
    if packages:
        lines.append(", ".join(packages))
    return lines


def _described(run: RunData) -> dict[str, Any]:
    """What the card says of a run."""
    task = run.metrics["task"]
    return {
        "name": run.name,
        "task": task,
        "sizes": ", ".join(f"{split} {size:,}" for split, size in task["sizes"].items()),
        "training": _training(run),
        "block": summary(run),
        "seed": run.config["curve_training"]["seed"],
        "average": run.metrics["average"],
        "examples": f"{run.metrics['methods']['curve']['sets']['test']['examples']:,}",
    }


def share_run(run: str | Path, out: str | Path, base: str | None = None, repo: str | None = None) -> Path:
    """Write the curve of an evaluated run with a model card into a folder, ready for the hub.

    Args:
        run: run directory.
        out: new or empty folder, returned.
        base: name of the base model on the hub, where the run used a folder.
        repo: OWNER/NAME that the card names.

    Raises:
        UserError: no evaluated run, a base model without a name on the hub, or a folder with something in it.
    """
    if not (Path(run) / "metrics.json").is_file():
        raise UserError(f"{run}: expected an evaluated run, found no metrics.json; make one with loracurve fit")
    read_identity(Path(run))  # of a newer version: refused
    config, spec, points = load_curve(Path(run) / "curve")
    name = hub_base(config, base)
    card = model_card(config, spec, name, repo, _described(read_run(Path(run), Path(run).resolve().name)))
    record = load_base_record(Path(run) / "curve")
    return write_shared(config, spec, points, name, card, new_folder(Path(out)), record)
