"""The command `generate`, which `cli.py` offers."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from loracurve.errors import UserError
from loracurve.generate import GenerateConfig
from loracurve.report.generations import Measure
from loracurve.tasks import Row, read_rows

__all__ = ["generate"]


def generate(
    options: GenerateConfig,
    run: str,
    prompt: str | None = None,
    input: str | None = None,
    out: str | None = None,
    html: str | None = None,
    points: int | None = None,
    colour: Measure = "mutual_information",
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
        colour: what the colours in the terminal show.
    """
    from loracurve.generate import generate as decode
    from loracurve.report.generations import print_generation, write_generations
    from loracurve.run import open_run
    from loracurve.storage import atomic_write

    if (prompt is None) == (input is None):
        raise UserError("generate: expected --prompt TEXT or --input FILE.jsonl, found both or neither")
    for file in (out, html):
        if file is not None and Path(file).exists():
            raise UserError(f"{file} exists already; choose another --out or --html")
    rows = [Row("prompt", prompt=prompt)] if input is None else read_rows(input, "language_modelling", (), False)
    texts = [(row.text if row.prompt is None else row.prompt) or "" for row in rows]
    opened = open_run(run)
    if opened.model.is_classifier:
        raise UserError(f"{run}: expected a run of a causal language model, found a classifier; use loracurve predict")
    evaluation = opened.config.evaluation if points is None else replace(opened.config.evaluation, points=points)
    average = opened.average(evaluation)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        batches = -(-len(texts) // options.batch_size)
        shown = bar.add_task("tokens", total=batches * options.max_new_tokens)
        generations = decode(
            opened.model,
            opened.task.tokenizer,
            texts,
            options,
            average.where,
            average.weights,
            lambda _: bar.advance(shown),
        )
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
