"""The card of a run and its curve, ready for the hub, with what the run knows of unknown inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from loracurve.curve.files import load_base_record, load_curve
from loracurve.curve.hub import hub_base, write_shared
from loracurve.curve.model_card import model_card
from loracurve.inference.model_average import Average
from loracurve.inference.unknowns import Unknowns, read_unknowns
from loracurve.report.run_data import RunData, fitting_files, read_run
from loracurve.report.sections import summary
from loracurve.runs.carried import carry_unknowns
from loracurve.runs.config import RunConfig, load_config
from loracurve.runs.evaluate import awaits_evaluation, evaluate_saved
from loracurve.runs.identity import read_identity
from loracurve.system.errors import UserError
from loracurve.system.folders import results_folder
from loracurve.system.paths import is_file
from loracurve.system.shapes import Shape, check_shape

__all__ = ["share_run"]


# What a card cannot do without, beside what a report shows.
_SHARED: Shape = {
    "average": {},
    "methods": {"curve": {"sets": {"test": {"examples": int}}}},
}


def _training(run: RunData, config: RunConfig) -> list[str]:
    """Settings and versions, one line each."""
    if is_file(run.folder / "distilled.json"):
        lines = ["one adapter trained to the averaged probabilities of a curve, by loracurve distill"]
    elif "curve_training" in run.config:
        lines = _trained(config)
    else:
        lines = ["in Python, by settings that are not recorded"]
    environment = run.environment
    seconds = run.metrics.get("seconds", {}).get("total")
    on = f" on {environment['device']}" if environment.get("device") else ""
    if seconds is not None:
        lines.append(f"{seconds:,.0f} s in all{on}")
    packages = [f"{name} {number}" for name, number in environment.get("packages", {}).items() if number]
    if packages:
        lines.append(", ".join(packages))
    return lines


def _trained(config: RunConfig) -> list[str]:
    """How `fit` trained anchors and curve."""
    lines = []
    for name, options in (("anchors", config.anchor_training), ("curve", config.curve_training)):
        if name == "anchors" and (config.curve.kind == "free" or config.adapters):
            continue
        lines.append(
            f"{name}: {options.steps:,} steps of {options.batch_size} examples, learning rate "
            f"{options.learning_rate:g} ({options.schedule}), weight decay {options.weight_decay:g}, "
            f"seed {options.seed}"
        )
    objective, perturbation = config.curve_training.objective, config.curve_training.perturbation
    if objective.jsd != "none":
        lines.append(f"diversity term: {objective.jsd} of weight {objective.weight:g}")
    if perturbation.kind != "none":
        lines.append(f"perturbation: {perturbation.kind}, rho {perturbation.rho:g}")
    return lines


def _described(run: RunData) -> dict[str, Any]:
    """What the card says of a run. Raises UserError where its files hold something else."""
    check_shape(run.metrics, _SHARED, f"{run.folder / 'metrics.json'}")
    config = load_config(run.folder / "config.yaml")
    task = {"template": None, "notes": "", "source": ""} | run.metrics["task"]
    return {
        "name": run.name,
        "task": task,
        "sizes": ", ".join(f"{split} {size:,}" for split, size in task["sizes"].items()),
        "training": _training(run, config),
        "block": summary(run),
        "seed": config.curve_training.seed,
        "average": run.metrics["average"],
        "examples": f"{run.metrics['methods']['curve']['sets']['test']['examples']:,}",
    }


def share_run(
    run: str | Path, out: str | Path, base: str | None = None, repo: str | None = None, unknowns: bool = True
) -> Path:
    """Write the curve of a run with a model card into a folder, ready for the hub. A run that was saved from Python is
    evaluated first; others are only read.

    Args:
        run: run directory.
        out: new or empty folder, returned.
        base: name of the base model on the hub, where the run used a folder.
        repo: OWNER/NAME that the card names.
        unknowns: whether the run's Gaussians and familiarity go along, where it has them (`runs.carried`).

    Raises:
        UserError: no evaluated run, files that hold something else than a run's or do not belong together, a base model
            without a name on the hub, or a folder with something in it.
    """
    if not is_file(Path(run) / "metrics.json") and not awaits_evaluation(Path(run)):
        raise UserError(f"{run}: expected an evaluated run, found no metrics.json; make one with loracurve fit")
    with results_folder(Path(out)) as folder:
        return _share(Path(run), folder, base, repo, unknowns)


def _share(run: Path, folder: Path, base: str | None, repo: str | None, with_unknowns: bool) -> Path:
    read_identity(run)  # of a newer version: refused
    config, spec, points = load_curve(run / "curve")
    name = hub_base(config, base)
    evaluate_saved(run)
    known = read_unknowns(run) if with_unknowns else None
    with fitting_files([run]):
        data = read_run(run, run.resolve().name)
        described = _described(data) | {"unknowns": known and _named(known[0])}
        if known is not None:
            _check_average(data.metrics, known[1], run)
        card = model_card(config, spec, name, repo, described)
    record = load_base_record(run / "curve")
    written = write_shared(config, spec, points, name, card, folder, record)
    if known is not None:
        carry_unknowns(*known, written)
    return written


def _named(unknowns: Unknowns) -> dict[str, bool]:
    """What there is, and whether it holds a state of each training row."""
    familiarity = unknowns.familiarity
    return {
        "gaussians": unknowns.gaussians is not None,
        "familiarity": familiarity is not None,
        "rows": familiarity is not None and familiarity.measure == "cosine",
    }


def _check_average(metrics: Mapping[str, Any], points: Sequence[Sequence[float]], run: Path) -> None:
    """Raise UserError where unknowns are of other points of the curve than the run was evaluated at."""
    recorded = metrics["average"]
    if "tunnel" in metrics or not {"t", "w"} <= recorded.keys():
        return
    t, weights = (torch.tensor(recorded[name], dtype=torch.float64) for name in ("t", "w"))
    if not Average(t, weights).has(points):
        raise UserError(
            f"{run / 'unknowns.json'}: expected Gaussians and familiarity of the {len(recorded['t'])} points of "
            f"metrics.json, found those of {len(points)} others; run loracurve calibrate, or share --without_unknowns"
        )
