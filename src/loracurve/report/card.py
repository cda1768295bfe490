"""The model card of a curve: what it is, what it was fitted to, its results, and how to load it."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import jinja2
import peft
from huggingface_hub import ModelCardData

from loracurve.report.run_data import RunData
from loracurve.report.sections import summary
from loracurve.spec import CurveSpec

__all__ = ["model_card"]


def model_card(
    config: peft.LoraConfig, spec: CurveSpec, base: str, repo: str | None = None, run: RunData | None = None
) -> str:
    """README.md of a curve folder, in the hub's format: YAML header and Markdown.

    Args:
        config: LoRA options.
        spec: shape of the curve.
        base: name of the base model on the hub.
        repo: where the curve will lie; None: a placeholder.
        run: the evaluated run that made the curve; None: its data, settings and results are left out.
    """
    classifier = config.task_type == peft.TaskType.SEQ_CLS
    header = ModelCardData(
        base_model=base,
        library_name="loracurve",
        pipeline_tag="text-classification" if classifier else "text-generation",
        tags=["lora", "bayesian", "uncertainty", "mode-connectivity"],
    )
    values: dict[str, Any] = {
        "header": header.to_yaml(),
        "title": repo.rpartition("/")[2] if repo else run.name if run else "A curve of LoRA adapters",
        "base": base,
        "repo": repo or "FOLDER OR NAME",
        "classifier": classifier,
        "shape": _shape(config, spec),
        "run": run,
        "seed": 0,
    }
    if run is not None:
        task = run.metrics["task"]
        values |= {
            "task": task,
            "sizes": ", ".join(f"{split} {size:,}" for split, size in task["sizes"].items()),
            "training": _training(run),
            "block": summary(run),
            "seed": run.config["curve_training"]["seed"],
            "average": run.metrics["average"],
            "examples": f"{run.metrics['methods']['curve']['sets']['test']['examples']:,}",
        }
    environment: Any = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    source = files("loracurve.report").joinpath("card.md").read_text(encoding="utf-8")
    return environment.from_string(source).render(values)


def _shape(config: peft.LoraConfig, spec: CurveSpec) -> str:
    """Control points, segments and adapters in two sentences."""
    anchors = len(spec.anchor_times)
    through = f"anchored: it runs through {anchors} independently fine-tuned adapters" if anchors else "free"
    plural = "s" * (spec.segments > 1)
    targets = config.target_modules
    maps = targets if isinstance(targets, str) else ", ".join(sorted(targets or []))
    alignment = f", aligned by {spec.alignment}" if spec.alignment != "none" else ""
    return (
        f"The curve has {spec.size} control points in {spec.segments} segment{plural} of degree {spec.degree} and is "
        f"{through}{alignment}. The adapters have rank {config.r} and alpha {config.lora_alpha:g} on {maps}."
    )


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
