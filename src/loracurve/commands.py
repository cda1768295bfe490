"""Sub-commands on a run: each a function whose signature is its options and whose docstring is its help."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from loracurve.config import RunConfig
from loracurve.distributed import on_main
from loracurve.errors import UserError

__all__ = ["calibrate", "evaluate", "export", "fit", "predict", "quickstart"]


def quickstart(out: str = "runs/quickstart", resume: bool = False, seed: int = 0) -> None:
    """Fit a curve to a real 135M model on word sentiment and judge it: about three minutes on two CPU cores.

    Args:
        out: new folder for the run.
        resume: go on with a run that was interrupted.
        seed: seed of data, anchors and curve.
    """
    from loracurve.quickstart import run_quickstart

    run_quickstart(Path(out), resume, seed)


def fit(config: RunConfig, out: str, resume: bool = False) -> None:
    """Train anchors (if anchored) and a curve, and evaluate them: CONFIG.yaml [--key value ...] --out FOLDER.

    Args:
        config: all options of a run, from a YAML file and the command line.
        out: new folder for the run.
        resume: go on with a run that was interrupted.
    """
    from loracurve.report.tables import print_report
    from loracurve.run import fit_run

    print_report(fit_run(config, Path(out), resume))
    print(f"The run is in {out}")


def evaluate(
    run: str,
    task: str | None = None,
    points: int | None = None,
    weights: Literal["uniform", "arc-length", "likelihood"] | None = None,
    inference: Literal["curve", "tunnel"] | None = None,
    split: str = "test",
    out: str | None = None,
) -> None:
    """Average a fitted curve on a labelled split and write metrics and predictions.

    Args:
        run: run directory.
        task: another data set with the same classes, put into the same prompt. Default: the run's own.
        points: points of the curve. Default: the run's own.
        weights: weights of the points. Default: the run's own.
        inference: average points of the curve, or posterior samples beside it. Default: the run's own.
        split: which split.
        out: new folder. Default: a name made from the options, in RUN/evaluations.
    """
    from loracurve.evaluation import Method, labels_of, predict_split, summarise
    from loracurve.report.tables import print_methods
    from loracurve.run import environment, new_folder, open_run
    from loracurve.run_evaluation import write_predictions
    from loracurve.storage import write_json

    opened = open_run(run, task)
    asked = {"points": points, "weights": weights, "inference": inference}
    changes: dict[str, Any] = {k: v for k, v in asked.items() if v is not None}
    evaluation = replace(opened.config.evaluation, **changes)
    encoded = opened.task.encode(split)
    name = f"{opened.task.dataset.name}-{split}-{evaluation.points}-{evaluation.weights}"
    name = name.replace("/", "_").replace(" ", "_") + "-tunnel" * (evaluation.inference == "tunnel")
    folder = Path(out) if out else Path(run) / "evaluations" / name
    on_main(lambda: new_folder(folder))
    average = opened.average(evaluation)
    predicted = predict_split(opened.model, encoded, average.where, average.weights)
    method = Method(evaluation.inference, len(average.t), {split: predicted})
    known = method.sets[split].labels
    report = {
        "average": average.record,
        "methods": summarise([method], {split: labels_of(encoded) if known is None else known}),
    }

    def write() -> None:
        write_json(folder / "environment.json", environment())
        write_json(folder / "metrics.json", report)
        if known is None:
            write_predictions(folder / "predictions.parquet", [method], {split: encoded})

    on_main(write)
    print_methods(report["methods"], split)
    print(f"Written to {folder}")


def predict(run: str, input: str, out: str | None = None, points: int | None = None) -> None:
    """Predict rows of a JSONL file: one JSON line each with probabilities and uncertainty.

    Args:
        run: run directory.
        input: JSONL file with rows as in training; labels are not needed.
        out: new JSONL file. Default: standard output.
        points: points of the curve. Default: the run's own.
    """
    from loracurve.predicting import predict_rows
    from loracurve.run import open_run
    from loracurve.storage import atomic_write

    on_main(lambda: _check_new(out))
    opened = open_run(run)
    evaluation = opened.config.evaluation if points is None else replace(opened.config.evaluation, points=points)
    text = "".join(json.dumps(line) + "\n" for line in predict_rows(opened, Path(input), evaluation))
    if out is None:
        sys.stdout.write(text)
    else:
        on_main(lambda: atomic_write(Path(out), lambda p: p.write_text(text)))
        print(f"Written to {out}", file=sys.stderr)


def _check_new(out: str | None) -> None:
    if out is not None and Path(out).exists():
        raise UserError(f"{out} exists already; choose another --out")


def export(
    run: str, out: str | None = None, points: int | None = None, best: bool = False, t: float | None = None
) -> None:
    """Write points of a curve as ordinary PEFT adapter folders.

    Args:
        run: run directory.
        out: new folder for the adapters and index.json (their t and weights).
        points: this many points, as they are averaged. Default: the run's own number.
        best: only the point of lowest validation NLL.
        t: only this point, in [0, 1].
    """
    from loracurve.run import best_point, new_folder, open_run
    from loracurve.storage import export_adapter, write_json

    if out is None:
        raise UserError("export: expected --out FOLDER for the adapters, found none")
    if best + (t is not None) + (points is not None) > 1:
        raise UserError("expected one of --points, --best and --t, found several; give one")
    if t is not None and not 0 <= t <= 1:
        raise UserError(f"t: expected a number in [0, 1], found {t}")
    opened = open_run(run)
    folder = new_folder(Path(out))
    if best:
        times, weights = [best_point(opened)], [1.0]
    elif t is not None:
        times, weights = [t], [1.0]
    else:
        wanted = opened.config.evaluation if points is None else replace(opened.config.evaluation, points=points)
        average = opened.average(wanted)
        if average.coefficients is not None:
            raise UserError(
                "export: expected points of the curve, found inference tunnel; give --points, --t or --best"
            )
        times, weights = average.t.tolist(), average.weights.tolist()
    index = []
    for i, (time, weight) in enumerate(zip(times, weights, strict=True)):
        name = f"point-{i:02d}"
        export_adapter(opened.model.config, opened.model.adapter(time), folder / name)
        index.append({"folder": name, "t": time, "weight": weight})
    write_json(folder / "index.json", index)
    print(f"{len(index)} adapter{'s' * (len(index) > 1)} written to {folder}")


def calibrate(
    run: str,
    risk: float = 0.05,
    delta: float = 0.1,
    alpha: float = 0.1,
    measure: Literal["entropy", "mutual_information"] = "entropy",
    input: str | None = None,
) -> None:
    """Fit a temperature, an abstention threshold with its guarantee, and prediction sets; predict then uses them.

    Args:
        run: run directory; RUN/calibration.json is written (an earlier one is replaced).
        risk: highest error rate wanted among the answered rows.
        delta: probability with which the guarantee may fail.
        alpha: prediction sets miss the label with at most this probability.
        measure: uncertainty that decides on abstaining.
        input: labelled JSONL rows that were not used in training. Default: the validation split, which also chose the
            trained state, so that the guarantee then holds only approximately.
    """
    from loracurve.predicting import calibrate_run
    from loracurve.run import open_run

    for name, value in (("risk", risk), ("delta", delta), ("alpha", alpha)):
        if not 0 < value < 1:
            raise UserError(f"{name}: expected a number between 0 and 1, found {value}")
    for line in calibrate_run(open_run(run), risk, delta, alpha, measure, Path(input) if input else None):
        print(line)
