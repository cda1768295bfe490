"""The model card of a curve: what it is, what it was fitted to, its results, and how to load it.

What `card.md` prints is text, escaped for Markdown, unless a filter says what else it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any
from urllib.parse import quote

import jinja2
import peft
from huggingface_hub import ModelCardData

from loracurve.curve.spec import CurveSpec
from loracurve.system.escaping import code_block, markdown, markdown_cell, python_literal

__all__ = ["model_card"]


def model_card(
    config: peft.LoraConfig, spec: CurveSpec, base: str, repo: str | None = None, run: Mapping[str, Any] | None = None
) -> str:
    """README.md of a curve folder, in the hub's format: YAML header and Markdown.

    Args:
        config: LoRA options.
        spec: shape of the curve.
        base: name of the base model on the hub.
        repo: where the curve will lie; None: a placeholder.
        run: what `card.md` says of the evaluated run that made the curve (`runs.share`): name, task, sizes, training,
            block, seed, average, examples, unknowns (gaussians, familiarity: whether they go along; rows: whether with
            states of rows). None: its data, settings and results are left out.

    Raises:
        TypeError: a seed that is no whole number.
    """
    classifier = config.task_type == peft.TaskType.SEQ_CLS
    header = ModelCardData(
        base_model=base,
        library_name="loracurve",
        pipeline_tag="text-classification" if classifier else "text-generation",
        tags=["lora", "bayesian", "uncertainty", "mode-connectivity"],
    )
    values: dict[str, Any] = {
        "header": _Written(header.to_yaml()),
        "title": repo.rpartition("/")[2] if repo else run["name"] if run else "A curve of LoRA adapters",
        "base": base,
        "repo": repo or "FOLDER OR NAME",
        "classifier": classifier,
        "shape": _shape(config, spec),
        "run": run,
        "seed": 0,
        "unknowns": None,
    } | dict(run or {})
    environment: Any = jinja2.Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, _Written) else markdown(str(value)),
    )
    environment.filters |= {
        "cell": lambda value: _Written(markdown_cell(str(value))),
        "block": lambda value: _Written(code_block(value)),
        "python": lambda value: _Written(python_literal(value)),
        "address": lambda value: _Written(quote(value)),
    }
    source = files("loracurve.curve").joinpath("card.md").read_text(encoding="utf-8")
    return environment.from_string(source).render(values)


class _Written(str):
    """Text that is escaped already, for the place where it stands."""


def _shape(config: peft.LoraConfig, spec: CurveSpec) -> str:
    """Control points, segments and adapters in two sentences."""
    anchors = len(spec.anchor_times)
    through = f"anchored: it runs through {anchors} independently fine-tuned adapters" if anchors else "free"
    plural = "s" * (spec.segments > 1)
    targets = config.target_modules
    maps = targets if isinstance(targets, str) else ", ".join(sorted(targets or []))
    alignment = f", aligned by {spec.alignment}" if spec.alignment != "none" else ""
    shape = (
        f"The curve has {spec.size} control points in {spec.segments} segment{plural} of degree {spec.degree} and is "
        f"{through}{alignment}."
        if spec.degree
        else "This curve is a single point: one adapter."
    )
    return f"{shape} The adapters have rank {config.r} and alpha {config.lora_alpha:g} on {maps}."
