"""What the server runs on the model: rows of several requests predicted together, prompts decoded together."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loracurve.inference.config import EvaluationConfig, GenerateConfig
from loracurve.inference.generation import generate
from loracurve.inference.hidden_states import states_of
from loracurve.runs.calibration import calibration_for
from loracurve.runs.predict import parts_of, prediction_records, say_what_is_missing
from loracurve.runs.run import Run
from loracurve.serving.batcher import Job
from loracurve.serving.config import ServeConfig
from loracurve.serving.memory import give_back_memory
from loracurve.system.errors import UserError
from loracurve.tasks.batching import ROW_TOKENS
from loracurve.tasks.classes import TaskIdentity, rows_in_class_order
from loracurve.tasks.dataset import Row, as_text, parse_row, subset
from loracurve.tasks.encoding import Encoded
from loracurve.tasks.tokens import tokenise

__all__ = ["PREDICT", "Engine", "Nearest"]


PREDICT = "predict"


class Nearest(NamedTuple):
    """The key of predictions that name so many training rows each."""

    most: int


MOST_FIELDS = 32


class _Abandoned(Exception):
    """Nobody waits for the texts that are being decoded."""


class Engine:
    """A run made ready: its points and weights are chosen once.

    Args:
        run: an opened run.
        options: the limits.
        evaluation: points and weights to average. Default: the run's own.
        count: told the number of tokens as they are read and generated: `count("read", 40)`.
        observe: told the number of requests that ran together.
    """

    def __init__(
        self,
        run: Run,
        options: ServeConfig,
        evaluation: EvaluationConfig | None = None,
        count: Callable[[str, int], None] = lambda kind, tokens: None,
        observe: Callable[[int], None] = lambda requests: None,
    ) -> None:
        self.run, self.options, self.count, self.observe = run, options, count, observe
        self.average = run.average(evaluation)
        self.calibration = calibration_for(run, self.average)
        say_what_is_missing(run)
        self.predicts = run.config.task.scoring != "lm"
        self.generates = not run.model.is_classifier
        self.prefix = 0
        """tokens with which all prompts begin, as far as known"""
        self.training: list[Row] = []
        """among which the nearest to a row are looked for"""
        if options.nearest_rows and self.predicts:
            self.training = subset(run.task.dataset.rows("train"), options.nearest_rows)
        self.states = torch.zeros(0, 0)
        """[N, d] their hidden states, of length 1"""

    def describe(self) -> dict[str, Any]:
        """What this run can do, for clients: fields of a row, classes, points, limits."""
        dataset = self.run.task.dataset
        examples: dict[str, dict[str, Any]] = {
            "classification": {"id": "1", "text": "a text"},
            "multiple_choice": {"id": "1", "question": "a question", "choices": list(dataset.labels) or ["yes", "no"]},
            "language_modelling": {"id": "1", "prompt": "a text"},
        }
        example = examples[dataset.kind]
        template = self.run.task.template
        if template is not None and "text2" in template.fields:
            example["text2"] = "its second text"
        known = self.average.unknowns
        limits = ["max_body_bytes", "max_rows", "max_tokens_per_row", "max_new_tokens", "max_queue", "max_wait_s"]
        return {
            "run": self.run.folder.resolve().name,
            "base": base.resolve().name if os.path.isdir(base := Path(self.run.config.model.name)) else str(base),
            "task": dataset.kind,
            "scoring": self.run.config.task.scoring,
            "classes": list(self.run.task.classes),
            "predict": self.predicts,
            "generate": self.generates,
            "points": len(self.average.weights),
            "calibration": None if self.calibration is None else self.calibration.rule,
            "parts": list(parts_of(self.average)),
            "familiarity": known is not None and known.familiarity is not None,
            "nearest": bool(self.training),
            "example_row": example,
            "limits": {name: getattr(self.options, name) for name in [*limits, "timeout_s"]},
        }

    def rows(self, records: Sequence[dict[str, Any]]) -> list[Row]:
        """Rows as in training, checked; one without an id gets its place. Raises UserError."""
        if not self.predicts:
            raise UserError("this run is of language modelling, which has no classes to predict; use /generate")
        dataset = self.run.task.dataset
        self.check_count(len(records), "rows")
        for i, record in enumerate(records):
            if len(record) > MOST_FIELDS:
                raise UserError(f"row {i + 1}: expected at most {MOST_FIELDS} fields, found {len(record)}")
        _check_text(records, "row")
        rows = [
            parse_row({"id": str(i), **record}, dataset.kind, dataset.labels, f"row {i + 1}", require_label=False)
            for i, record in enumerate(records)
        ]
        return rows_in_class_order(rows, dataset.labels, TaskIdentity.of(self.run.task))

    def key(self, nearest: int = 0) -> Hashable:
        """What predictions that name so many training rows are run together by. Raises UserError."""
        if nearest and not self.training:
            raise UserError("nearest: this server keeps no training texts; start it with --nearest_rows 500")
        return Nearest(nearest) if nearest else PREDICT

    def prompts(self, prompts: Sequence[str], config: GenerateConfig) -> list[str]:
        """Prompts, checked against the limits. Raises UserError."""
        self.check_generates()
        self.check_count(len(prompts), "prompts")
        _check_text(prompts, "prompt")
        if config.max_new_tokens > self.options.max_new_tokens:
            raise UserError(
                f"max_new_tokens: expected at most {self.options.max_new_tokens}, found {config.max_new_tokens}"
            )
        return list(prompts)

    def check_generates(self) -> None:
        """Raise UserError where the run has no text to continue."""
        if not self.generates:
            raise UserError("this run is of a classifier, which has no text to continue; use /predict")

    def check_count(self, count: int, what: str) -> None:
        """Raise UserError where a request has more than it may, or nothing."""
        if not 1 <= count <= self.options.max_rows:
            raise UserError(f"{what}: expected 1 to {self.options.max_rows}, found {count}; send several requests")

    def warm_up(self) -> None:
        """Do once what the first requests would wait for: try out what the model takes, and run through it."""
        model = self.run.model
        model.runner.hold(self.average.where)
        if self.predicts:
            field = {"classification": "text", "multiple_choice": "question"}[self.run.task.dataset.kind]
            example = self.describe()["example_row"]
            with suppress(UserError):  # an alphabet that has not these letters
                encoded = self.run.task.encode_rows(self.rows([{**example, field: text} for text in ("a", "the")]))
                self.prefix = encoded.prefix
                tokens = min(ROW_TOKENS, model.window or ROW_TOKENS)
                longest = replace(
                    encoded.examples[0], prompt=(encoded.examples[0].prompt * tokens)[:tokens], choices=()
                )
                model.runner.takes_trees(replace(encoded, examples=[longest]))
                self.average.predict(model, encoded)
        if self.training:
            self.states = self._states(self.run.task.encode_rows(self.training, "training rows", labelled=False))
        if self.generates:
            model.runner.decodes_in_batches()
        give_back_memory()  # trials in full precision copy the weights

    def weigh(self, job: Job) -> float:
        """Check and tokenise the work of a job; which share of a batch it is. Raises UserError."""
        if isinstance(job.key, GenerateConfig):
            self._count_tokens([[prompt] for prompt in job.work], "prompt")
            return len(job.work) / self.options.batch_prompts
        self._count_tokens([_texts(row) for row in job.work], "row")
        job.ready = self.run.task.encode_rows(job.work, "a request", labelled=False)
        tokens = job.ready.total_size - self.prefix * len(job.ready)
        return float(tokens / max(self.options.batch_tokens - self.prefix, 1))

    def work(self, key: Hashable, jobs: Sequence[Job]) -> None:
        """Run weighed jobs of one key: PREDICT, Nearest, or how their prompts are decoded."""
        self.observe(len(jobs))
        if isinstance(key, GenerateConfig):
            self._generate(key, jobs)
        else:
            self._predict(jobs)

    def _predict(self, jobs: Sequence[Job]) -> None:
        # Requests whose rows have the same answers (nearly always all of them) are one packed set.
        together: dict[Hashable, list[tuple[Job, Encoded]]] = defaultdict(list)
        for job in jobs:
            together[job.ready.answer_ids, job.ready.classes].append((job, job.ready))
        for group in together.values():
            examples = [example for _, encoded in group for example in encoded.examples]
            whole = replace(group[0][1], examples=examples)
            predictive = self.average.predict(self.run.model, whole).to("cpu")
            key, start = jobs[0].key, 0
            nearest = self._nearest(whole, key.most) if isinstance(key, Nearest) else None
            for job, encoded in group:
                own = predictive.index(torch.arange(start, start + len(encoded)))
                start += len(encoded)
                records = list(prediction_records(job.work, encoded, own, self.calibration, self.average))
                if nearest is not None:
                    for record, found in zip(records, nearest[start - len(encoded) : start], strict=True):
                        record["nearest"] = found
                job.succeed({"predictions": records, "truncated": encoded.truncated})

    def _nearest(self, encoded: Encoded, count: int) -> list[list[dict[str, Any]]]:
        """The training rows nearest to each example."""
        cosine, place = (self._states(encoded) @ self.states.mT).topk(min(count, len(self.training)), dim=1)
        return [
            [self._neighbour(self.training[i], c) for i, c in zip(of, by, strict=True)]
            for of, by in zip(place.tolist(), cosine.tolist(), strict=True)
        ]

    def _neighbour(self, row: Row, cosine: float) -> dict[str, Any]:
        names = row.choices or self.run.task.classes
        label = None if row.label is None else names[row.label]
        return {"text": as_text(row), "label": label, "cosine": round(cosine, 6)}

    def _states(self, encoded: Encoded) -> Tensor:
        """[E, d] last hidden states at the middle point of the average, of length 1."""
        where = self.average.where
        middle = where[len(where) // 2 :][:1]
        states = states_of(self.run.model, encoded, middle).states.read[0].float()
        return torch.nn.functional.normalize(states, dim=-1)

    def _generate(self, config: GenerateConfig, jobs: Sequence[Job]) -> None:
        def check(tokens: int) -> None:
            if not any(job.live for job in jobs):
                raise _Abandoned("nobody waits for these texts any more")

        generations = generate(
            self.run.model,
            self.run.task.tokenizer,
            [prompt for job in jobs for prompt in job.work],
            replace(config, batch_size=self.options.batch_prompts),
            self.average.where,
            self.average.weights,
            check,
            [number for job in jobs for number in range(len(job.work))],
        )
        self.count("generated", sum(len(g.token_ids) for g in generations))
        left = iter(generations)
        for job in jobs:
            job.succeed({"generations": [next(left).record() for _ in job.work]})

    def _count_tokens(self, texts: Sequence[Sequence[str]], what: str) -> None:
        """Count the tokens of each row's texts; raises UserError where a row has too many."""
        flat = [text for row in texts for text in row if text]
        lengths = iter([len(ids) for ids in tokenise(self.run.task.tokenizer, flat)] if flat else [])
        found = [sum(next(lengths) for text in row if text) for row in texts]
        for i, tokens in enumerate(found):
            if tokens > self.options.max_tokens_per_row:
                raise UserError(
                    f"{what} {i + 1}: expected at most {self.options.max_tokens_per_row} tokens, found {tokens}; "
                    "shorten it"
                )
        self.count("read", sum(found))


def _check_text(items: Sequence[Any], what: str) -> None:
    """Raise UserError where JSON escapes made text that no tokenizer takes."""
    for i, item in enumerate(items):
        try:
            json.dumps(item, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError(f"{what} {i + 1}: expected text, found half of a surrogate pair; send UTF-8") from None
        except RecursionError:
            raise UserError(f"{what} {i + 1}: expected an object with text in its fields, found deep nesting") from None


def _texts(row: Row) -> list[str]:
    """All the text of a row that a client chooses."""
    return [text for text in (row.context, row.question, row.text, row.text2, *row.choices) if text]
