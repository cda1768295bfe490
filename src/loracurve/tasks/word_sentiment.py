"""The quickstart's data: sentiment of single English words, rated by ten people each, made from installed packages.

Words and ratings: the VADER lexicon (Hutto and Gilbert 2014, package vaderSentiment, MIT). Words on which the raters
disagree in sign are a test of aleatoric uncertainty; names of chemical elements (package periodictable) have no
sentiment at all and are out of distribution. Neither package's code for its purpose is used, only its lists.
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
import statistics
from pathlib import Path

from loracurve.system.errors import UserError
from loracurve.tasks.dataset import Dataset, Row, subset

__all__ = ["FAMILY_LETTERS", "word_sentiment"]


FAMILY_LETTERS = 5

MIN_MEAN = 1.0

MAX_SPREAD = 1.0

_PLAIN = re.compile("[a-z]{3,}")


def word_sentiment(
    train: int = 960, validation: int = 200, test: int = 600, ambiguous: int = 150, seed: int = 0
) -> Dataset:
    """Splits train, validation, test (classes negative, positive), ambiguous and elements (both without labels).

    Clear words: mean rating (from -4 to 4) of at least 1 in size, standard deviation at most 1, no raters of opposite
    sign. Ambiguous words: at least two raters on each side; `Row.spread` has the standard deviation of the ratings.
    A family (words that share their first five letters) lies in one split only, or "trust" would teach "trusting".

    Raises UserError where a package is missing or there are too few words.
    """
    clear: dict[str, list[Row]] = {}
    unclear: list[Row] = []
    lexicon = _lexicon()
    for word, ratings in lexicon.items():
        if not _PLAIN.fullmatch(word):
            continue
        mean, spread = statistics.fmean(ratings), statistics.pstdev(ratings)
        positive, negative = sum(r > 0 for r in ratings), sum(r < 0 for r in ratings)
        if min(positive, negative) >= 2:
            unclear.append(Row(word, text=word, spread=round(spread, 4)))
        elif abs(mean) >= MIN_MEAN and spread <= MAX_SPREAD and not (positive and negative):
            clear.setdefault(word[:FAMILY_LETTERS], []).append(
                Row(word, int(mean > 0), text=word, spread=round(spread, 4))
            )
    families = sorted(clear)
    random.Random(seed).shuffle(families)
    splits: dict[str, list[Row]] = {}
    used: set[str] = set()
    remaining = iter(families)
    # Test words are drawn first, so that they stay the same when the training size changes.
    for split, size in (("test", test), ("validation", validation), ("train", train)):
        rows: list[Row] = []
        while len(rows) < size:
            family = next(remaining, None)
            if family is None:
                total = sum(len(words) for words in clear.values())
                raise UserError(f"expected at most about {total} words in train, validation and test; ask for fewer")
            used.add(family)
            rows.extend(clear[family])
        splits[split] = rows[:size]
    splits = {split: splits[split] for split in ("train", "validation", "test")}
    splits["ambiguous"] = subset([row for row in unclear if row.id[:FAMILY_LETTERS] not in used], ambiguous, seed)
    splits["elements"] = [Row(name, text=name) for name in _elements() if name not in lexicon]
    notes = (
        f"VADER lexicon words a-z: |mean| >= {MIN_MEAN}, sd <= {MAX_SPREAD}, raters of one sign; split by the first "
        f"{FAMILY_LETTERS} letters, seed {seed}. ambiguous: at least two raters on each side, families not in the "
        "other splits. elements: names of chemical elements that the lexicon doesn't have."
    )
    source = "packages vaderSentiment (MIT) and periodictable (public domain)"
    return Dataset("word_sentiment", "classification", ("negative", "positive"), splits, notes, source)


def _lexicon() -> dict[str, list[int]]:
    """Ratings of each token, from the package's text file; the package itself is not imported."""
    path = _package_folder("vaderSentiment") / "vader_lexicon.txt"
    if not path.is_file():
        raise UserError(f"expected {path}, found none; run: pip install --no-deps --force-reinstall vaderSentiment")
    lexicon: dict[str, list[int]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        parts = line.split("\t")
        if len(parts) == 4:
            lexicon[parts[0]] = json.loads(parts[3])
    return lexicon


def _elements() -> list[str]:
    _package_folder("periodictable")
    from periodictable import elements

    return sorted(element.name.lower() for element in elements if element.number > 0)


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(
            f"expected the package {package} for the word sentiment data; run: pip install --no-deps {package}"
        )
    return Path(spec.origin).parent
