"""Small tasks made in tests: real tokenizer, real task code, data that a tiny model can learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from helpers.tokenizers_made import bert_style, llama_style, qwen_style
from loracurve.tasks.config import TaskConfig
from loracurve.tasks.task import Task, load_task
from loracurve.training.config import FitConfig

SHARED: dict[str, Any] = {"points": 2, "share_points": True}
WORDS = {0: ["bad", "poor", "dull", "awful"], 1: ["good", "great", "fine", "lovely"]}
FILLERS = ["the film is", "a truly", "it was", "this story feels rather", "quite", "i found the music"]


def write_rows(folder: Path, sizes: dict[str, int], choice: bool = False, lm: bool = False, start: str = "") -> Path:
    """A data folder: the label is which list the last word comes from. Texts begin with `start`."""
    draw = torch.Generator().manual_seed(5)
    folder.mkdir(parents=True, exist_ok=True)

    def pick(items: list[Any]) -> Any:
        return items[int(torch.randint(len(items), (1,), generator=draw))]

    for split, size in sizes.items():
        rows = []
        for i in range(size):
            label = int(torch.randint(2, (1,), generator=draw))
            text = f"{start}{pick(FILLERS)} {pick(WORDS[label])}"
            if lm:
                row = {"id": f"{split}-{i}", "prompt": text, "completion": [" no it is", " yes indeed"][label]}
            elif choice:
                options = ["negative", "positive", "no it is"][: 2 + i % 2]
                row = {"id": f"{split}-{i}", "question": text, "choices": options, "label": label}
            else:
                row = {"id": f"{split}-{i}", "text": text, "label": label}
            rows.append(json.dumps(row))
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    kind = "multiple_choice" if choice else "language_modelling" if lm else "classification"
    labels = [] if lm else ["A", "B", "C"] if choice else ["negative", "positive"]
    meta = {"name": "made", "task": kind, "labels": labels}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def made_task(folder: Path, architecture: str, scoring: str = "letter", sizes: dict[str, int] | None = None) -> Task:
    tokenizer = {"qwen2": qwen_style, "llama": llama_style, "encoder": bert_style}[architecture]()
    sizes = sizes or {"train": 40, "validation": 13, "test": 17}
    data = write_rows(folder / "data", sizes, choice=scoring in ("letter", "text"), lm=scoring == "lm")
    return load_task(TaskConfig(data=str(data), scoring=scoring), tokenizer, 512)  # type: ignore[arg-type]


def vocabulary(task: Task) -> int:
    return len(task.tokenizer)


def shared_points(**options: Any) -> FitConfig:
    """Two points (or as many as `options` say) that all rows share, which every option of the training goes with."""
    return FitConfig(**SHARED | options)
