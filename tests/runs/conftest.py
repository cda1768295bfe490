"""Runs that several of these tests share."""

from __future__ import annotations

import pytest
from helpers.made_runs import command
from helpers.survey import NAMES, put, survey

from loracurve.bench.tiny_model import tiny_model
from loracurve.runs.run import Run, open_run
from loracurve.system.files import write_json


@pytest.fixture(scope="session", params=["float32", "bfloat16"])
def few_texts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on answers of a survey: scores are tied, and the same text in another batch differs by rounding."""
    root = tmp_path_factory.mktemp("survey")
    model, tokenizer = tiny_model()
    model.save_pretrained(root / "model")  # type: ignore[operator]
    tokenizer.save_pretrained(root / "model")
    for split, count in (("train", 200), ("validation", 50), ("test", 50)):
        put(root / "data" / f"{split}.jsonl", survey(count))
    write_json(root / "data" / "meta.json", {"task": "classification", "labels": NAMES})
    config = {
        "model": {"name": str(root / "model"), "dtype": request.param},
        "task": {"data": str(root / "data"), "scoring": "label"},
        "lora": {"r": 4},
        "curve": {"segments": 1},
        "curve_training": {"steps": 100, "batch_size": 16, "learning_rate": 5e-3},
        "evaluation": {"points": 4},
    }
    write_json(root / "config.yaml", config)
    command("fit", root / "config.yaml", "--out", root / "run")
    put(root / "cal.jsonl", survey(500))
    return open_run(root / "run")
