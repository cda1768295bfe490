"""Tiny models of every scoring, rows of uneven lengths, and each row's prediction by itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from helpers.tiny import SIZES, lora_config, random_points, tiny
from helpers.tokenizers_made import bert_style, llama_style, qwen_style
from loracurve.curve.spec import CurveSpec
from loracurve.inference.predictive import Predictive
from loracurve.model.curve_model import CurveModel
from loracurve.model.runner import evaluation_mode
from loracurve.tasks.batching import Batch, collate
from loracurve.tasks.config import TaskConfig
from loracurve.tasks.dataset import Row
from loracurve.tasks.encoding import Encoded
from loracurve.tasks.task import Task, load_task

__all__ = ["CASES", "POINTS", "Case", "log_probs_of", "make_case", "parts_of", "write_data"]

POINTS = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)

CASES: dict[str, tuple[str, str]] = {
    "letter": ("qwen2", "letter"),
    "label": ("llama", "label"),
    "text": ("qwen2", "text"),
    "lm": ("llama", "lm"),
    "head": ("encoder", "head"),
    "decoder head": ("decoder", "head"),
}
"""architecture and scoring of each"""

TOKENIZERS = {"qwen2": qwen_style, "decoder": qwen_style, "llama": llama_style, "encoder": bert_style}

LABELS = ["red", "green", "blue"]

# One begins another, two are equal, and lengths differ by a factor of thirty.
TEXTS = [
    "plants need light",
    "plants need light to grow and some metals rust in damp air",
    "plants",
    "the film was good",
    "the film was good",
    "the film was a very plain story about water and fire which is not the same as large or small or different " * 2,
    "which option is right",
    "he",
    "the sun is a star and the sun is the sun is a star",
    "they what? she who: it the small",
]


def write_data(folder: Path, scoring: str, labels: Sequence[str] = LABELS, pairs: bool = False) -> Path:
    """A data folder whose splits all hold `TEXTS`; the classes of the rows do not depend on the order of `labels`."""
    rows = []
    for number, text in enumerate(TEXTS):
        row: dict[str, Any] = {"id": f"row {number}"}
        if scoring in ("letter", "text"):
            options = ["a star", "water and fire", "light", "the very same thing as that"][: 2 + number % 3]
            row |= {"question": text, "choices": options, "label": number % 2}
        elif scoring == "lm":
            row |= {"prompt": text, "completion": " " + TEXTS[(number + 3) % 5][: 4 + 7 * (number % 4)]}
        else:
            row |= {"text": text, "label": list(labels).index(LABELS[number % 3])}
            if pairs and number % 2:
                row["text2"] = TEXTS[-number]
        rows.append(json.dumps(row) + "\n")
    folder.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("".join(rows))
    kinds = {"letter": "multiple_choice", "text": "multiple_choice", "lm": "language_modelling"}
    meta = {"task": kinds.get(scoring, "classification"), "labels": [] if scoring in kinds else list(labels)}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@dataclass
class Case:
    """A model and its task, and what it predicts for each row by itself, unpacked, one point at a time."""

    model: CurveModel
    task: Task
    options: TaskConfig
    alone: list[Tensor]
    """[n, 1, C] of each row; of language modelling [n, tokens, 1], of its target tokens"""

    @property
    def rows(self) -> list[Row]:
        return self.task.dataset.rows("test")

    def encode(self, numbers: Iterable[int]) -> Encoded:
        """Rows by number, in this order."""
        return self.task.encode_rows([self.rows[n] for n in numbers])

    def with_tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> Task:
        """The task with another tokenizer."""
        return load_task(self.options, tokenizer, self.model.window)

    def check(self, found: Sequence[Tensor], numbers: Sequence[int], tolerance: float = 1e-5) -> None:
        """Predictions of rows by number (`parts_of`) are those of each by itself."""
        for part, number in zip(found, numbers, strict=True):
            expected = self.alone[number]
            assert bool((part[..., expected.shape[-1] :] == -torch.inf).all()), "choices of another row"
            part = part[..., : expected.shape[-1]].double()
            torch.testing.assert_close(part, expected, rtol=tolerance, atol=tolerance)


def make_case(name: str, folder: Path) -> Case:
    """A float64 model with a random curve of two segments, and its task."""
    architecture, scoring = CASES[name]
    tokenizer = TOKENIZERS[architecture]()
    data = write_data(folder / name, scoring, pairs=architecture == "encoder")
    options = TaskConfig(data=str(data), scoring=scoring)  # type: ignore[arg-type]
    model = CurveModel(_base(architecture, tokenizer), lora_config("encoder" if scoring == "head" else "qwen2"))
    model.set_curve(CurveSpec(2, 2), random_points(model, scale=0.2))
    task = load_task(options, tokenizer, model.window)
    case = Case(model.eval(), task, options, [])
    for number in range(len(case.rows)):
        encoded = case.encode([number])
        batch = collate(encoded, [0], packing=False)
        at_points = [log_probs_of(model, [batch], POINTS[i : i + 1]) for i in range(len(POINTS))]
        case.alone.append(torch.cat(at_points))
    return case


def _base(architecture: str, tokenizer: PreTrainedTokenizerFast) -> nn.Module:
    if architecture != "decoder":
        return tiny(architecture, torch.float64, len(tokenizer), labels=len(LABELS))
    torch.manual_seed(0)
    config = tf.Qwen2Config(
        vocab_size=len(tokenizer), num_labels=len(LABELS), num_key_value_heads=2, max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id, **SIZES,
    )  # fmt: skip
    base = tf.Qwen2ForSequenceClassification(config)
    for parameter in base.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(5)
    return base.double().eval()


def log_probs_of(model: CurveModel, batches: Iterable[Batch], t: Tensor, tokens_per_pass: int | None = None) -> Tensor:
    """[n, E, C] of all examples in their order; of language modelling [n, tokens, 1], of the target tokens."""
    found, order = [], []
    with torch.inference_mode(), evaluation_mode(model):
        for batch in batches:
            part = model.point_log_probs(batch, t, tokens_per_pass)
            if batch.scoring == "lm":
                part = part.gather(-1, batch.labels.expand(len(t), -1)[..., None])
            found.append(part.double())
            order.append(batch.index)
    width = max(part.shape[-1] for part in found)
    padded = [nn.functional.pad(part, (0, width - part.shape[-1]), value=-torch.inf) for part in found]
    return torch.cat(padded, 1)[:, torch.cat(order).argsort()]


def parts_of(found: Tensor | Predictive, encoded: Encoded) -> list[Tensor]:
    """Predictions row by row."""
    if isinstance(found, Predictive):
        if found.point_log_probs is not None:
            found = found.point_log_probs
        else:
            assert found.label_log_probs is not None
            found = found.label_log_probs[..., None]
    if encoded.scoring == "lm":
        ends = encoded.token_offsets
        return [found[:, start:stop] for start, stop in zip(ends, ends[1:], strict=False)]
    return list(found.split(1, dim=1))
