"""Text by the average over the curve of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from loracurve.inference.config import GenerateConfig
from loracurve.inference.generation import Generation, generate
from loracurve.runs.run import open_run
from loracurve.system.errors import UserError
from loracurve.tasks.dataset import Row, read_rows

__all__ = ["generate_texts", "prompts_of"]


def prompts_of(prompt: str | None, file: str | None) -> list[Row]:
    """One prompt, or the rows of a JSONL file with an id and a prompt (or text) each."""
    if file is None:
        return [Row("prompt", prompt=prompt)]
    return read_rows(file, "language_modelling", (), False)


def generate_texts(
    run: str | Path, rows: Sequence[Row], options: GenerateConfig, points: int | None, base: str | None = None
) -> list[Generation]:
    """Continue prompts by the average of a run's curve, with a bar on the terminal; `base` as `open_run` takes it.

    Raises:
        UserError: a run of a classifier.
    """
    texts = [(row.text if row.prompt is None else row.prompt) or "" for row in rows]
    opened = open_run(run, base=base)
    if opened.model.is_classifier:
        raise UserError(f"{run}: expected a run of a causal language model, found a classifier; use loracurve predict")
    evaluation = opened.config.evaluation if points is None else replace(opened.config.evaluation, points=points)
    average = opened.average(evaluation)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        batches = -(-len(texts) // options.batch_size)
        shown = bar.add_task("tokens", total=batches * options.max_new_tokens)
        return generate(
            opened.model,
            opened.task.tokenizer,
            texts,
            options,
            average.where,
            average.weights,
            lambda _: bar.advance(shown),
        )
