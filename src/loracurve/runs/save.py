"""A run directory of a curve that was made in Python: what the commands and `open_run` need to open it again."""

from __future__ import annotations

from pathlib import Path

from loracurve.curve.config import CurveConfig
from loracurve.inference.config import EvaluationConfig, UnknownsConfig
from loracurve.model.base_model import load_tokenizer, loaded_with
from loracurve.model.config import ModelConfig
from loracurve.model.curve_model import CurveModel
from loracurve.model.fingerprint import compare_tokenizers, tokenizer_fingerprint
from loracurve.runs.config import RunConfig, save_config
from loracurve.runs.fit import checked_config
from loracurve.runs.identity import identity_of, write_identity
from loracurve.system.distributed import main_holds, on_main
from loracurve.system.environment import environment
from loracurve.system.errors import UserError
from loracurve.system.files import write_json
from loracurve.system.folders import results_folder
from loracurve.tasks.task import Task

__all__ = ["save_run", "write_run"]


def save_run(
    model: CurveModel,
    task: Task,
    folder: str | Path,
    evaluation: EvaluationConfig | None = None,
    base: str | None = None,
) -> None:
    """Write a curve with its task as a run directory, as `loracurve fit` does: all commands take it, and `open_run`
    opens it.

    The base and the rows are not written: their names, and numbers and hashes by which they are known again. How the
    curve was trained is not known here. Gaussians and familiarity are built by `loracurve calibrate`, and `report` and
    `share` evaluate the run first.

    Args:
        model: the curve.
        task: what it was trained for; its data are a file, a folder or a name.
        folder: new folder.
        evaluation: how the curve is averaged where nobody says otherwise. None: the library's defaults.
        base: where the base model is. None: where it was loaded from.

    Raises:
        UserError: a folder with something in it, data in memory, a task of another kind of model or with another
            tokenizer, a base whose place is not known or that cannot be loaded again as it is.
    """
    run = Path(folder)
    with main_holds(lambda: results_folder(run)):
        write_run(model, task, run, evaluation, base)


def write_run(
    model: CurveModel,
    task: Task,
    run: Path,
    evaluation: EvaluationConfig | None = None,
    base: str | None = None,
    unknowns: UnknownsConfig | None = None,
) -> None:
    """`save_run` into a folder that the caller holds. `unknowns`: how Gaussians and familiarity are built; None: the
    library's defaults."""
    options = loaded_with(model.model, model.dtype, base)
    _check(model, task, options)
    shape = CurveConfig.of(model.spec)
    config = RunConfig(
        options,
        task.config,
        curve=shape,
        evaluation=evaluation or EvaluationConfig(),
        unknowns=unknowns or UnknownsConfig(),
    )
    config = checked_config(config, options.trust_remote_code)
    identity = identity_of(config, model.model, task.tokenizer, task, brought=model.base_weights)

    def write() -> None:
        shaped = ("curve",) if model.spec.degree else ()  # no options make a single adapter
        save_config(config, run / "config.yaml", ("model", "task", *shaped, "evaluation", "unknowns"))
        write_identity(identity, run)
        write_json(run / "environment.json", environment())
        model.save_pretrained(run / "curve", options.name)  # last: it says that the rest is there

    on_main(write)


def _check(model: CurveModel, task: Task, options: ModelConfig) -> None:
    """Refuse a task that is not the model's: what would be found when the run is opened, or never."""
    heads = len(task.classes) if task.config.scoring == "head" else None
    labels = model.model.config.num_labels if model.is_classifier else None  # type: ignore[union-attr]
    if heads != labels:
        found, known = (
            "a language model" if n is None else f"a classification head of {n} classes" for n in (heads, labels)
        )
        raise UserError(f"task: expected one for {known}, found one for {found}; give the task that it was trained for")
    tokenizer = load_tokenizer(options.name, options.trust_remote_code, options.revision)
    if difference := compare_tokenizers(tokenizer_fingerprint(task.tokenizer), tokenizer):
        raise UserError(
            f"task: expected the tokenizer of {options.name}, found another: {difference}; save base and tokenizer "
            "into one folder (save_pretrained), and give it by base"
        )
