"""Rows and arguments for the trainers, and the scripts of examples/."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from helpers.kills import ended, forked
from helpers.places import ROOT


def rows(count: int = 12, classifier: bool = False) -> list[dict[str, Any]]:
    """Token sequences; the first three tokens of language modelling are prompt."""
    draw = torch.Generator().manual_seed(3)
    out = []
    for i in range(count):
        ids = torch.randint(3, 300, (9,), generator=draw).tolist()
        labels = i % 3 if classifier else [-100] * 3 + ids[3:]
        out.append({"input_ids": ids, "attention_mask": [1] * 9, "labels": labels})
    return out


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    values: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 5,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 5,
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    return TrainingArguments(str(folder), **(values | options))


def run_example(name: str, folder: Path, *options: object) -> str:
    """What a script of examples/ prints, run as a program in a process that has imported everything already."""

    def program() -> None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        sys.argv = [name, *map(str, options)]
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")

    said = folder / f"{name}.txt"
    code = ended(forked(program, said))
    assert code == 0, said.read_text()[-2000:]
    return said.read_text()
