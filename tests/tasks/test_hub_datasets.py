"""The hub's formats on local files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from helpers.texts import write_lines

from loracurve.system.errors import UserError
from loracurve.tasks.dataset import Row
from loracurve.tasks.hub_datasets import HUB, load_from_hub

ARC = {"text": ["w", "x", "y"], "label": ["1", "2", "3"]}
FIVE = {"text": list("vwxyz"), "label": list("ABCDE")}
HUB_CASES: dict[str, tuple[dict[str, Any], Row]] = {
    "winogrande_s": (
        {"sentence": "the _ fell", "option1": "cup", "option2": "cat", "answer": "2"},
        Row("train-0", 1, question="the _ fell", choices=("cup", "cat")),
    ),
    "arc_challenge": (
        {"id": "M1", "question": "q?", "choices": ARC, "answerKey": "3"},
        Row("M1", 2, question="q?", choices=("w", "x", "y")),
    ),
    "arc_easy": (
        {"id": "M2", "question": "q?", "choices": FIVE, "answerKey": "E"},
        Row("M2", 4, question="q?", choices=tuple("vwxyz")),
    ),
    "openbookqa": (
        {"id": "7", "question_stem": "s", "choices": {"text": list("wxyz"), "label": list("ABCD")}, "answerKey": "B"},
        Row("7", 1, question="s", choices=tuple("wxyz")),
    ),
    "boolq": (
        {"question": "is it", "passage": "it is", "answer": True},
        Row("train-0", 1, question="is it", choices=("no", "yes"), context="it is"),
    ),
    "sst2": ({"idx": 5, "sentence": "good", "label": 1}, Row("train-5", 1, text="good")),
    "ag_news": ({"text": "news", "label": 3}, Row("train-0", 3, text="news")),
    "mrpc": (
        {"idx": 0, "sentence1": "a", "sentence2": "b", "label": 0},
        Row("train-0", 0, text="a", text2="b"),
    ),
    "rte": ({"idx": 0, "sentence1": "a", "sentence2": "b", "label": 1}, Row("train-0", 1, text="a", text2="b")),
    "cola": ({"idx": 0, "sentence": "a", "label": 0}, Row("train-0", 0, text="a")),
    "mmlu_anatomy": (
        {"question": "q", "choices": list("wxyz"), "answer": 2, "subject": "anatomy"},
        Row("dev-0", 2, question="q", choices=tuple("wxyz")),
    ),
}


@pytest.mark.parametrize("name", HUB_CASES)
def test_hub_format(tmp_path: Path, name: str) -> None:
    record, expected = HUB_CASES[name]
    for split in set(HUB[name].splits.values()):
        write_lines(tmp_path / "hub" / f"{split}.jsonl", [record])
    if "test" not in HUB[name].splits.values():
        hidden = {"label": -1, "answer": "" if name == "winogrande_s" else False}
        # The hub has a test split without labels; it must not be touched.
        write_lines(tmp_path / "hub" / "test.jsonl", [record | {key: hidden[key] for key in record if key in hidden}])
    dataset = load_from_hub(name, tmp_path / "hub", tmp_path / "cache")
    assert dataset.splits["train"] == [expected]
    assert dataset.splits["test"][0].label == expected.label
    assert ("validation" in dataset.splits) or "validation from train" in dataset.notes


def test_hub_configurations_and_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clone = tmp_path / "glue"
    card = ["---", "configs:"]
    for config, text in (("cola", "c"), ("mrpc", "m")):
        for split in ("train", "validation"):
            write_lines(clone / config / f"{split}.jsonl", [{"idx": 0, "sentence": text, "label": 1}])
        card += [f"- config_name: {config}", "  data_files:"]
        card += [f"  - {{split: {split}, path: {config}/{split}.jsonl}}" for split in ("train", "validation")]
    (clone / "README.md").write_text("\n".join([*card, "---", ""]))
    assert load_from_hub("cola", clone, tmp_path / "cache").splits["test"][0].text == "c"
    write_lines(clone / "cola" / "train.jsonl", [{"idx": 3, "sentence": text, "label": 1} for text in ("a", "b")])
    with pytest.raises(UserError, match=r"split train, row 1: id 'train-3' was used by row 0 already"):
        load_from_hub("cola", clone, tmp_path / "again")
    with pytest.raises(UserError, match="not in the hub's format, KeyError: 'sentence1'"):
        load_from_hub("mrpc", clone, tmp_path / "cache")
    with pytest.raises(UserError, match="expected a split 'test'"):
        monkeypatch.setitem(HUB, "cola", dataclasses.replace(HUB["cola"], splits=HUB["mrpc"].splits))
        load_from_hub("cola", clone, tmp_path / "cache")
    with pytest.raises(UserError, match="not in the hub's format"):
        load_from_hub("rte", clone / "cola", tmp_path / "cache")
    with pytest.raises(UserError, match="did you mean 'arc_easy'"):
        load_from_hub("arc_esay")
    with pytest.raises(UserError, match="no folder"):
        load_from_hub("cola", tmp_path / "absent")
    write_lines(tmp_path / "u" / "train.jsonl", [{"text": "x", "label": -1}])
    write_lines(tmp_path / "u" / "test.jsonl", [{"text": "x", "label": 1}])
    with pytest.raises(UserError, match="found none"):
        load_from_hub("ag_news", tmp_path / "u", tmp_path / "cache")
