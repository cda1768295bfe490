"""The word sentiment data."""

from __future__ import annotations

from typing import Any

import pytest

from loracurve.system.errors import UserError
from loracurve.tasks.word_sentiment import FAMILY_LETTERS, word_sentiment


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
    assert len(words.splits["ambiguous"]) == 150 and len(words.splits["elements"]) > 110


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
