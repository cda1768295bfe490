"""The table of commands: each is a function whose signature is its options and whose docstring is its help.

What does the work is loaded when a command runs, so that help and mistakes are answered before torch is imported. No
function has a name of the package's public face: jsonargparse would look for it there, which loads torch.
"""

from __future__ import annotations

import json
import shlex
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from loracurve.bench.config import Executor, SuiteConfig
from loracurve.inference.config import GenerateConfig, Measure
from loracurve.landscape.config import ScanConfig
from loracurve.runs.config import RunConfig
from loracurve.serving.config import ServeConfig
from loracurve.system.distributed import is_launched, main_holds, on_main
from loracurve.system.errors import UserError
from loracurve.system.files import atomic_write
from loracurve.system.folders import locked, results_file, results_folder
from loracurve.system.paths import exists, is_file, writable
from loracurve.system.ranges import Amount, Count, NonNegative, OpenShare, Points, Positive, Seed, Share

__all__ = [
    "bench_command",
    "calibrate_command",
    "distill_command",
    "evaluate_command",
    "export_command",
    "fit_command",
    "generate_command",
    "init_command",
    "predict_command",
    "quickstart_command",
    "report_command",
    "scan_command",
    "serve_command",
    "share_command",
]


def bench_command(
    suite: SuiteConfig,
    out: str = "runs/bench",
    jobs: Amount = 0,
    seconds: NonNegative | None = None,
    retry: bool = False,
    tables_only: bool = False,
    executor: Executor = "processes",
    address: str | None = None,
) -> None:
    """Compare methods on tasks and seeds: SUITE.yaml, or smoke, small or paper; the same command resumes.

    Args:
        suite: all options of a suite, from a YAML file and the command line.
        out: folder for the results, new or begun by the same suite.
        jobs: cells (a method on a task with a seed) that run side by side. Default: one for each GPU, without GPUs one
            (with Ray one for each node).
        seconds: start no further cell after this time.
        retry: run cells again that failed.
        tables_only: make tables and page from what is in the folder, without running anything.
        executor: processes of this machine, or the workers of a Ray cluster.
        address: address of the Ray cluster, auto for one started on this machine. Default: what RAY_ADDRESS says, else
            a cluster of this machine alone.
    """
    from loracurve.bench.runner import run_suite
    from loracurve.bench.suite import cells_of, scans_of, suite_of
    from loracurve.bench.tables.write import write_tables

    folder = Path(out)
    if tables_only and not is_file(folder / "suite.yaml"):
        raise UserError(f"{out}: expected the folder of a suite that was run, found none; run it without --tables_only")
    suite = suite_of(vars(suite))
    try:
        if not tables_only:
            run_suite(suite, folder, jobs, seconds, retry, progress=True, executor=executor, address=address)
    finally:
        if is_file(folder / "suite.yaml"):
            with locked(folder):
                tables = write_tables(suite, folder, page=True)
            missing = sum(len(t.rows) for t in tables if t.name == "left_out")
            total = len(cells_of(suite)) + len(scans_of(suite))
            print(f"{total - missing} of {total} cells have results; tables.md and report.html are in {folder}")


def quickstart_command(out: str = "runs/quickstart", resume: bool = False, seed: Seed = 0) -> None:
    """Fit a curve to a real 135M model on word sentiment and judge it: two to four minutes on two CPU cores.

    Args:
        out: new folder for the run.
        resume: go on with a run that was interrupted.
        seed: seed of data, anchors and curve.
    """
    from loracurve.runs.quickstart import run_quickstart

    run_quickstart(Path(out), resume, seed)


def init_command(data: str, out: str = "config.yaml") -> None:
    """Look at a file of your own and write a commented YAML for fit, with a guess of columns, labels and scoring: DATA.

    Args:
        data: CSV, Parquet or JSON lines file, or a folder with train and perhaps validation and test in such files.
        out: new YAML file.
    """
    from loracurve.runs.init import config_for

    with results_file(Path(out)):
        text, assumed, run = config_for(data)
        atomic_write(Path(out), lambda p: p.write_text(text, encoding="utf-8"))
    for line in assumed:
        print(line)
    print(f"Written to {out}; look at it, then: loracurve fit {shlex.quote(out)} --out {shlex.quote(run)}")


def fit_command(config: RunConfig, out: str, resume: bool = False, dry_run: bool = False) -> None:
    """Train anchors (if anchored) and a curve, and evaluate them: CONFIG.yaml [--key value ...] --out FOLDER.

    Args:
        config: all options of a run, from a YAML file and the command line.
        out: new folder for the run.
        resume: go on with a run that was interrupted.
        dry_run: say what would be done, how long it would take and whether it fits into memory, after a few steps, and
            write nothing.
    """
    if dry_run:
        from loracurve.runs.rehearsal import rehearse
        from loracurve.runs.rehearsal_tables import print_rehearsal

        if resume:
            raise UserError("--dry_run: expected a new run, found --resume; leave one of them out")
        print_rehearsal(rehearse(config, Path(out)))
        print(f"Nothing was written. To run it: {_command_without('dry_run')}")
        return
    from loracurve.report.terminal import print_report
    from loracurve.runs.fit import fit_run

    print_report(fit_run(config, Path(out), resume))
    print(f"The run is in {out}")


def _command_without(flag: str) -> str:
    """The present command without a flag of its own, as a shell takes it."""
    words = [w for w in sys.argv[1:] if w.partition("=")[0].lstrip("-").replace("-", "_") != flag]
    if is_launched() or words == sys.argv[1:]:  # a launcher's words, or none: called from Python
        return f"the same command without --{flag}"
    return shlex.join(["loracurve", *words])


def evaluate_command(
    run: str,
    task: str | None = None,
    points: Points | None = None,
    weights: Literal["uniform", "arc-length", "likelihood"] | None = None,
    inference: Literal["curve", "tunnel"] | None = None,
    split: str = "test",
    out: str | None = None,
    base: str | None = None,
) -> None:
    """Average a fitted curve on a labelled split and write metrics and predictions.

    Args:
        run: run directory.
        task: another data set with classes of the run, in any order, put into the same prompt; a single table is all of
            its split test. Default: the run's own.
        points: points of the curve. Default: the run's own.
        weights: weights of the points. Default: the run's own.
        inference: average points of the curve, or posterior samples off it. Default: the run's own.
        split: which split.
        out: new folder. Default: a name made from the options, in RUN/evaluations.
        base: where the base model is now, a folder or a name on the hub. Default: where it was.
    """
    from loracurve.report.terminal import print_methods
    from loracurve.runs.evaluate import evaluate_run

    asked = {"points": points, "weights": weights, "inference": inference}
    found, folder = evaluate_run(run, task, {k: v for k, v in asked.items() if v is not None}, split, out, base)
    print_methods(found["methods"], split)
    print(f"Written to {folder}")


def predict_command(
    run: str, input: str, out: str | None = None, points: Points | None = None, base: str | None = None
) -> None:
    """Predict rows of a file (CSV, Parquet, JSON lines) with probabilities and uncertainty.

    Args:
        run: run directory.
        input: file with rows as in training, a table with the same columns; labels and ids are not needed.
        out: new file, a table where it ends in .csv, .tsv or .parquet, else JSON lines. Default: these on standard
            output.
        points: points of the curve. Default: the run's own.
        base: where the base model is now, a folder or a name on the hub. Default: where it was.
    """
    from loracurve.runs.predict import predict_file

    with main_holds(lambda: _in_place_of(out)):
        content = predict_file(run, Path(input), points, base, "" if out is None else Path(out).suffix)
        if out is None:
            sys.stdout.write(content.decode())
        else:
            on_main(lambda: atomic_write(Path(out), lambda p: p.write_bytes(content)))
            print(f"Written to {out}", file=sys.stderr)


def _in_place_of(out: str | None, option: str = "--out") -> AbstractContextManager[Path | None]:
    return nullcontext() if out is None else results_file(Path(out), option)


def export_command(
    run: str,
    out: str | None = None,
    points: Points | None = None,
    best: bool = False,
    t: Share | None = None,
    base: str | None = None,
) -> None:
    """Write points of a curve as ordinary PEFT adapter folders.

    Args:
        run: run directory.
        out: new folder for the adapters, index.json (their t and weights), and what the run knows of unknown inputs.
        points: this many points, as they are averaged. Default: the run's own number.
        best: only the point of lowest validation NLL.
        t: only this point, in [0, 1].
        base: where the base model is now, which the adapters then name. Default: where it was.
    """
    from loracurve.runs.export import export_run

    if out is None:
        raise UserError("export: expected --out FOLDER for the adapters, found none")
    if best + (t is not None) + (points is not None) > 1:
        raise UserError("expected one of --points, --best and --t, found several; give one")
    for line in export_run(run, Path(out), points, best, t, base):
        print(line)


def distill_command(
    run: str,
    out: str | None = None,
    input: str | None = None,
    steps: Count | None = None,
    learning_rate: Positive | None = None,
    base: str | None = None,
) -> None:
    """Train one ordinary adapter to the averaged probabilities of a run's curve, so that one pass serves.

    Args:
        run: run directory.
        out: new folder: a run of one point, which all commands take, and in it adapter, a PEFT folder.
        input: further rows to learn on, in a file as for predict: labels and ids are not needed.
        steps: of training. Default: a fifth of the curve's.
        learning_rate: peak. Default: the curve's.
        base: where the base model is now. Default: where it was.
    """
    from loracurve.runs.distill import distill_run

    if out is None:
        raise UserError("distill: expected --out FOLDER for the adapter, found none")
    for line in distill_run(run, Path(out), input, steps, learning_rate, base):
        print(line)


def calibrate_command(
    run: str,
    risk: OpenShare = 0.05,
    delta: OpenShare = 0.1,
    alpha: OpenShare = 0.1,
    measure: Literal["entropy", "mutual_information"] = "entropy",
    foreign: OpenShare = 0.05,
    input: str | None = None,
    base: str | None = None,
) -> None:
    """Fit a temperature, an abstention threshold with its guarantee, and prediction sets; predict then uses them.

    Args:
        run: run directory; RUN/calibration.json is written (an earlier one is replaced).
        risk: highest error rate wanted among the answered rows.
        delta: probability with which the guarantee may fail.
        alpha: prediction sets miss the label with at most this probability.
        measure: uncertainty that decides on abstaining.
        foreign: known rows are taken for foreign, by their distance from the training data, with at most this
            probability.
        input: labelled rows that were not used in training, in a file as for predict. Default: the validation split,
            which also chose the trained state, so that the guarantee then holds only approximately.
        base: where the base model is now, a folder or a name on the hub. Default: where it was.
    """
    from loracurve.runs.calibrate import calibrate_run
    from loracurve.runs.run import check_run, open_run

    check_run(Path(run))
    with writable(Path(run)):
        opened = open_run(run, base=base)
    for line in calibrate_run(opened, risk, delta, alpha, measure, None if input is None else Path(input), foreign):
        print(line)


def generate_command(
    options: GenerateConfig,
    run: str,
    prompt: str | None = None,
    input: str | None = None,
    out: str | None = None,
    html: str | None = None,
    points: Points | None = None,
    colour: Measure = "mutual_information",
    base: str | None = None,
) -> None:
    """Continue prompts by the average over the curve, with the uncertainty of each token: RUN --prompt TEXT.

    Args:
        options: how to decode.
        run: run directory of a causal language model, whatever its task.
        prompt: one text, printed in colours with what follows. It is continued as it stands, without a chat template.
        input: JSONL file with an id and a prompt in each row instead; one JSON line each is written.
        out: new JSONL file. Default: standard output for --input, none for --prompt.
        html: new HTML file with the texts in colours.
        points: points of the curve. Default: the run's own.
        colour: what the colours in the terminal show. Of tokens there are two parts of the uncertainty; the third, and
            familiarity, are of rows that are predicted.
        base: where the base model is now, a folder or a name on the hub. Default: where it was.
    """
    from loracurve.report.generations import print_generation, write_generations
    from loracurve.runs.generate import generate_texts, prompts_of

    if (prompt is None) == (input is None):
        raise UserError("generate: expected --prompt TEXT or --input FILE.jsonl, found both or neither")
    with _in_place_of(out), _in_place_of(html, "--html"):
        rows = prompts_of(prompt, input)
        generations = generate_texts(run, rows, options, points, base)
        if html is not None:
            write_generations(Path(html), generations, Path(run).resolve().name)
        lines = "".join(json.dumps({"id": r.id, **g.record()}) + "\n" for r, g in zip(rows, generations, strict=True))
        if out is not None:
            atomic_write(Path(out), lambda p: p.write_text(lines))
        elif prompt is None:
            sys.stdout.write(lines)
    if prompt is not None:
        print_generation(generations[0], colour)
    for file in (out, html):
        if file is not None:
            print(f"Written to {file}", file=sys.stderr)


def scan_command(
    options: ScanConfig,
    run: str | None = None,
    adapters: list[str] | None = None,
    task: str | None = None,
    base: str | None = None,
    scoring: Literal["letter", "label", "text", "head", "lm"] | None = None,
    out: str | None = None,
) -> None:
    """Scan the loss along paths between adapters and along the curve: RUN, or --adapters A B C --task T.

    Args:
        options: how finely.
        run: run directory; comes first, without --run.
        adapters: PEFT adapter folders instead of a run, at least two; nothing is trained.
        task: their data: a folder, the name of a hub data set, or word_sentiment.
        base: their base model, or where a run's is now. Default: the one they name, where it was.
        scoring: how answers are scored. Default: head for classifiers, letter for multiple choice, else label.
        out: new folder. Default: RUN/scan, or scan.
    """
    from loracurve.landscape.subject import adapters_to_scan
    from loracurve.landscape.survey import scan_to_folder
    from loracurve.report.terminal import print_barriers
    from loracurve.runs.run import check_run
    from loracurve.runs.scan import run_to_scan

    if (run is None) == (adapters is None):
        raise UserError("expected a run directory or --adapters A B C --task T, found both or neither")
    folder = Path(out) if out else Path(run, "scan") if run else Path("scan")
    if adapters is not None and task is None:
        raise UserError("expected the adapters' data, found no --task; give --task FOLDER")
    if run is not None:
        for name, value in (("task", task), ("scoring", scoring)):
            if value is not None:
                raise UserError(f"--{name} goes with --adapters; a run has its own")
        check_run(Path(run))
    with results_folder(folder):
        if run is not None:
            subject = run_to_scan(run, options.dtype, base)
        else:
            assert adapters is not None and task is not None
            subject = adapters_to_scan(adapters, task, base, scoring, options.dtype)
        print_barriers(scan_to_folder(subject, folder, options))
    print(f"Written to {folder}")


def report_command(runs: list[str], out: str | None = None, overwrite: bool = False, base: str | None = None) -> None:
    """Write one self-contained HTML page about one or several runs, and their figures as PNG and PDF.

    Runs that were saved from Python and not evaluated yet are evaluated first.

    Args:
        runs: run directories or folders of scans, side by side on the page; they come first, without --runs.
        out: the page, with its figures in PAGE-figures beside it. Default: RUN/report.html, with figures in
            RUN/figures; for several runs report.html.
        overwrite: replace a page that is there.
        base: where the base model of runs that are evaluated first is now. Default: where it was.
    """
    from loracurve.report.page import write_page
    from loracurve.runs.evaluate import evaluate_saved

    page = Path(out) if out else Path(runs[0], "report.html") if len(runs) == 1 else Path("report.html")
    if exists(page) and not overwrite:
        raise UserError(f"{page} exists already; choose another --out, or replace it by --overwrite")
    for run in runs:
        evaluate_saved(Path(run), base)
    write_page([Path(run) for run in runs], page)
    print(f"Written to {page}")


def serve_command(options: ServeConfig, run: str, points: Points | None = None, base: str | None = None) -> None:
    """Answer HTTP requests for predictions and texts, with a page to try it: RUN [--port N].

    Args:
        options: where to listen, and the limits.
        run: run directory; it is only read.
        points: points of the curve. Default: the run's own.
        base: where the base model is now, a folder or a name on the hub. Default: where it was.
    """
    from loracurve.serving.command import serve_run

    serve_run(options, run, points, base)


def share_command(
    run: str,
    out: str | None = None,
    hub: str | None = None,
    base: str | None = None,
    private: bool = False,
    without_unknowns: bool = False,
) -> None:
    """Write the curve of a run with a model card into a folder, or upload both to the Hugging Face hub.

    Args:
        run: run directory; one that was saved from Python is evaluated first.
        out: new folder for the curve's files and README.md, and what the run knows of unknown inputs.
        hub: OWNER/NAME on the hub to upload them to; you must be logged in there.
        base: name of the base model on the hub. Default: the one the run used.
        private: make a new repository private.
        without_unknowns: leave out unknowns.json and its tensors, which are statistics of the training rows' states.
    """
    from loracurve.curve.hub import push_curve
    from loracurve.runs.share import share_run

    if out is None and hub is None:
        raise UserError("share: expected --out FOLDER or --hub OWNER/NAME, found neither")
    with TemporaryDirectory() as temporary:
        folder = share_run(run, out or temporary, base, hub, not without_unknowns)
        if out is not None:
            print(f"Written to {out}; read {out}/README.md before others do")
        if hub is not None:
            print(f"Uploaded: {push_curve(folder, hub, private or None)}")
