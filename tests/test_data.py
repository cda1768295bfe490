"""Rows, folders, the hub's formats on local files, and the word sentiment data."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracurve.system.errors import UserError
from loracurve.tasks import word_sentiment
from loracurve.tasks.dataset import Row, as_text, read_dataset, read_rows, split_validation, subset
from loracurve.tasks.hub_datasets import HUB, load_from_hub
from loracurve.tasks.word_sentiment import FAMILY_LETTERS

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
GOOD = {"id": "a", "text": "fine", "label": 1}


def write(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("{'id'", "broken JSON"),
        ([1], "JSON object"),
        ({"text": "x", "label": 0}, "string 'id'"),
        ({"id": "b", "txt": "x", "label": 0}, "did you mean 'txt'"),
        ({"id": "b", "text": 3, "label": 0}, "'text' as text"),
        ({"id": "b", "text": " ", "label": 0}, "not blank"),
        ({"id": "b", "text": "x", "label": 2}, "label from 0 to 1, found 2"),
        ({"id": "b", "text": "x", "label": -1}, "label from 0 to 1"),
        ({"id": "b", "text": "x", "label": True}, "whole number"),
        ({"id": "b", "text": "x", "label": "1"}, "whole number"),
        ({"id": "b", "text": "x"}, "found none"),
        ({"id": "a", "text": "x", "label": 0}, "used on line 1"),
    ],
)
def test_row_errors_name_file_and_line(tmp_path: Path, record: Any, said: str) -> None:
    path = write(tmp_path / "train.jsonl", [GOOD, record])
    with pytest.raises(UserError, match="line 2") as caught:
        read_rows(path, "classification", ("no", "yes"))
    assert said in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"choices": "yes"}, "list of strings"),
        ({"choices": ["one"]}, "2 to 26 choices"),
        ({"choices": ["a", 2]}, "list of strings"),
        ({"label": 2}, "label from 0 to 1"),
        ({"question": None}, "'question'"),
    ],
)
def test_multiple_choice_errors(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    row = {"id": "q", "question": "why?", "choices": ["a", "b"], "label": 0} | change
    with pytest.raises(UserError, match="line 1") as caught:
        read_rows(write(tmp_path / "x.jsonl", [row]), "multiple_choice")
    assert said in str(caught.value)


def test_labels_may_be_absent_only_where_they_are_not_needed(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"id": 7, "text": "x"}, "", {"id": "b", "text": "y", "label": None}])
    assert [row.label for row in read_rows(path, "classification", ("n", "y"), require_labels=False)] == [None, None]
    assert read_rows(path, "classification", ("n", "y"), require_labels=False)[0].id == "7"


def make_folder(folder: Path, **meta: Any) -> Path:
    for split in ("train", "test"):
        write(folder / f"{split}.jsonl", [GOOD])
    (folder / "meta.json").write_text(json.dumps({"task": "classification", "labels": ["n", "y"]} | meta))
    return folder


def test_folder_errors(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "d")
    assert read_dataset(folder).name == "d" and "validation" not in read_dataset(folder).splits
    (folder / "validation.jsonl").write_text("")
    with pytest.raises(UserError, match="empty file"):
        read_dataset(folder)
    make_folder(folder, sizes={"validation": 0})
    assert "validation" not in read_dataset(folder).splits
    with pytest.raises(UserError, match="did you mean 'test'"):
        read_dataset(folder).rows("tests")
    (folder / "test.jsonl").unlink()
    with pytest.raises(UserError, match="no file"):
        read_dataset(folder)
    for meta, said in (
        ({"task": "clasification"}, "did you mean 'classification'"),
        ({"labels": ["n"]}, "two different"),
    ):
        with pytest.raises(UserError, match=said):
            read_dataset(make_folder(folder, **meta))
    (folder / "meta.json").unlink()
    with pytest.raises(UserError, match="meta.json"):
        read_dataset(folder)
    with pytest.raises(UserError, match="no folder"):
        read_dataset(tmp_path / "absent")


@given(st.integers(2, 60), st.floats(0.01, 0.99), st.integers(0, 5))
def test_validation_split_depends_on_ids_alone(size: int, fraction: float, seed: int) -> None:
    rows = [Row(str(i), 0, text="x") for i in range(size)]
    train, validation = split_validation(rows, fraction, seed)
    assert train and validation and not set(train) & set(validation) and len(train) + len(validation) == size
    assert set(split_validation(rows[::-1], fraction, seed)[1]) == set(validation)
    assert set(subset(rows, size // 2, seed)) <= set(subset(rows, size // 2 + 1, seed))


def test_plain_text_of_every_kind() -> None:
    assert as_text(Row("1", text="a", text2="b")) == "a b"
    assert as_text(Row("1", question="q", choices=("x", "y"), context="c")) == "c q"
    assert as_text(Row("1", prompt="p ", completion="c")) == "p c"


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
        write(tmp_path / "hub" / f"{split}.jsonl", [record])
    if "test" not in HUB[name].splits.values():
        hidden = {"label": -1, "answer": "" if name == "winogrande_s" else False}
        # The hub has a test split without labels; it must not be touched.
        write(tmp_path / "hub" / "test.jsonl", [record | {key: hidden[key] for key in record if key in hidden}])
    dataset = load_from_hub(name, tmp_path / "hub", tmp_path / "cache")
    assert dataset.splits["train"] == [expected]
    assert dataset.splits["test"][0].label == expected.label
    assert ("validation" in dataset.splits) or "validation from train" in dataset.notes


def test_hub_configurations_and_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clone = tmp_path / "glue"
    card = ["---", "configs:"]
    for config, text in (("cola", "c"), ("mrpc", "m")):
        for split in ("train", "validation"):
            write(clone / config / f"{split}.jsonl", [{"idx": 0, "sentence": text, "label": 1}])
        card += [f"- config_name: {config}", "  data_files:"]
        card += [f"  - {{split: {split}, path: {config}/{split}.jsonl}}" for split in ("train", "validation")]
    (clone / "README.md").write_text("\n".join([*card, "---", ""]))
    assert load_from_hub("cola", clone, tmp_path / "cache").splits["test"][0].text == "c"
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
    write(tmp_path / "u" / "train.jsonl", [{"text": "x", "label": -1}])
    write(tmp_path / "u" / "test.jsonl", [{"text": "x", "label": 1}])
    with pytest.raises(UserError, match="found none"):
        load_from_hub("ag_news", tmp_path / "u", tmp_path / "cache")


def test_all_shared_data_sets_load() -> None:
    if not SHARED.is_dir():
        pytest.skip("the project's shared data are not here")
    folders = [folder for folder in sorted(SHARED.iterdir()) if (folder / "meta.json").is_file()]
    assert folders
    for folder in folders:
        sizes = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["sizes"]
        splits = read_dataset(folder).splits
        assert {split: len(rows) for split, rows in splits.items()} == {s: n for s, n in sizes.items() if n}, folder


@pytest.fixture(scope="module")
def words() -> Any:
    pytest.importorskip("periodictable")
    try:
        return word_sentiment()
    except UserError as error:
        pytest.skip(str(error))


def test_word_families_lie_in_one_split_each(words: Any) -> None:
    parts = ("train", "validation", "test", "ambiguous")
    families = [{row.text[:FAMILY_LETTERS] for row in words.splits[split]} for split in parts]
    for i, first in enumerate(families):
        assert all(not first & other for other in families[i + 1 :])
    assert [len(words.splits[split]) for split in parts[:3]] == [960, 200, 600]
    assert len(words.splits["ambiguous"]) == 300 and len(words.splits["elements"]) > 110


def test_word_sentiment_is_sound_and_deterministic(words: Any) -> None:
    assert word_sentiment() == words
    assert word_sentiment(train=100).splits["test"] == words.splits["test"]
    assert word_sentiment(seed=1).splits["test"] != words.splits["test"]
    known = {row.text: row.label for split in ("train", "validation", "test") for row in words.splits[split]}
    assert all(row.spread > 0 and row.label is None for row in words.splits["ambiguous"])
    assert not set(known) & {row.text for row in words.splits["elements"]}
    assert 0.4 < sum(known.values()) / len(known) < 0.6
    checks = {"happy": 1, "awful": 0, "excellent": 1, "terrible": 0, "great": 1, "murder": 0, "love": 1}
    assert all(known[word] == label for word, label in checks.items() if word in known)
    with pytest.raises(UserError, match="ask for fewer"):
        word_sentiment(train=10**6)


def test_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps vaderSentiment"):
        word_sentiment()
