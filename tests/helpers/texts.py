"""Rows and folders of each kind of task, and tokenizers of each style."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers.tokenizers_made import bert_style, eos_style, llama_style, qwen_style, smollm_style
from loracurve.tasks.config import TaskConfig


def write_lines(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


STYLES = {
    "qwen": qwen_style,
    "smollm": smollm_style,
    "eos": eos_style,
    "llama": llama_style,
    "bert": bert_style,
}
PAIRS: list[dict[str, Any]] = [
    {"id": str(i), "text": "the sun is a star", "text2": "a star is the sun", "label": i % 2} for i in range(6)
]
TEXTS: list[dict[str, Any]] = [{"id": str(i), "text": f"a good film {i}", "label": i % 2} for i in range(6)]
QUESTIONS = [
    {"id": "q4", "question": "which metal rusts?", "choices": ["iron", "gold", "tin", "lead"], "label": 0},
    {"id": "q5", "question": "which is a star?", "choices": ["a", "b", "c", "d", "the sun"], "label": 4},
    {"id": "q3", "question": "what do plants need?", "choices": ["light", "dust", "rust"], "label": 0},
]
PASSAGES = [
    {"id": "t", "question": "is it red", "context": "it is red", "choices": ["no", "yes"], "label": 1},
    {"id": "f", "question": "is it blue", "context": "it is red", "choices": ["no", "yes"], "label": 0},
]


def shown(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids)))


def folder(
    path: Path, rows: list[dict[str, Any]], task: str = "classification", labels: Any = ("negative", "positive")
) -> str:
    path.mkdir(exist_ok=True)
    for split in ("train", "validation", "test"):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (path / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    (path / "meta.json").write_text(json.dumps({"task": task, "labels": list(labels)}))
    return str(path)


def classes(path: Path, **options: Any) -> TaskConfig:
    return TaskConfig(folder(path, TEXTS), **({"scoring": "label"} | options))


def questions(path: Path, **options: Any) -> TaskConfig:
    return TaskConfig(folder(path, QUESTIONS, "multiple_choice", ()), **({"scoring": "letter"} | options))
