"""Run directories of tiny models, made by the command line as a user makes them."""

from __future__ import annotations

import hashlib
import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from transformers import BertForSequenceClassification

from helpers.made import write_rows
from helpers.tiny import tiny
from helpers.tokenizers_made import bert_style, llama_style, qwen_style
from loracurve.cli import main

TOKENIZERS = {"qwen2": qwen_style, "llama": llama_style, "encoder": bert_style}
SIZES = {"train": 40, "validation": 24, "test": 17}
# Steps and rates at which a tiny model learns something and no control point stays where it was.
QUICK = [
    "--anchor_training.steps=4",
    "--anchor_training.batch_size=4",
    "--anchor_training.learning_rate=1e-2",
    "--curve_training.steps=4",
    "--curve_training.batch_size=4",
    "--curve_training.learning_rate=1e-2",
    "--curve_training.points=2",
    "--curve_training.share_points=true",
    "--curve_training.evaluation_points=4",
    "--evaluation.points=3",
    "--curve.anchors=2",
    "--curve.segments=2",
    "--lora.r=2",
    "--lora.lora_alpha=4",
]


def base_folder(folder: Path, architecture: str) -> Path:
    """A tiny model and its tokenizer as a hub checkout has them; an encoder without a classification head."""
    tokenizer = TOKENIZERS[architecture]()
    base = tiny(architecture, vocabulary=len(tokenizer))
    if isinstance(base, BertForSequenceClassification):
        base = base.bert
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def data_folder(folder: Path, scoring: str, sizes: dict[str, int] | None = None, start: str = "") -> Path:
    return write_rows(folder, sizes or SIZES, scoring in ("letter", "text"), scoring == "lm", start)


def config_file(path: Path, model: Path, data: Path, scoring: str) -> Path:
    """The least that an anchored curve's config needs. JSON is YAML."""
    values = {
        "model": {"name": str(model)},
        "task": {"data": str(data), "scoring": scoring},
        "curve": {"kind": "anchored"},
    }
    path.write_text(json.dumps(values))
    return path


def command(*arguments: object) -> None:
    """Run `loracurve`; anything but success fails the test."""
    assert main([str(a) for a in arguments]) == 0


def predictions(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    """What `loracurve predict` prints, a record a row."""
    capsys.readouterr()
    command("predict", *arguments)
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def tree_hash(folder: Path) -> str:
    """Names and contents of everything below `folder`."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0")
        if path.is_file():
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


SCORINGS = {"letter": "qwen2", "text": "llama", "head": "encoder", "lm": "llama"}
CASES = list(product(["anchored", "free"], SCORINGS))


class Maker:
    """Fits each kind of run once for the whole session, when a test first asks for it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.made: dict[str, Path] = {}

    def base(self, architecture: str) -> Path:
        folder = self.root / "bases" / architecture
        return folder if folder.is_dir() else base_folder(folder, architecture)

    def data(self, scoring: str) -> Path:
        folder = self.root / "data" / scoring
        return folder if folder.is_dir() else data_folder(folder, scoring)

    def config(self, scoring: str) -> Path:
        path = self.root / f"{scoring}.yaml"
        return config_file(path, self.base(SCORINGS[scoring]), self.data(scoring), scoring)

    def __call__(self, kind: str, scoring: str) -> Path:
        name = f"{kind}-{scoring}"
        if name not in self.made:
            out = self.root / name
            command("fit", self.config(scoring), "--out", out, f"--curve.kind={kind}", *QUICK)
            self.made[name] = out
        return self.made[name]


SCAN = ["--points", "5", "--plane", "3", "--slopes", "2", "--speeds", "2", "--sharpness", "2", "--resamples", "50"]
SCORED = {"letter": "qwen2", "head": "encoder", "lm": "llama"}
