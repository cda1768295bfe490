"""The scikit-learn estimator: scikit-learn's own checks, and that it is the run which the command line makes."""

from __future__ import annotations

import gc
import json
import os
import pickle
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from helpers.documents import fenced
from helpers.made import FILLERS, WORDS
from helpers.made_runs import base_folder, command, predictions
from helpers.survey import put
from helpers.tokenizers_made import qwen_style
from mapie.classification import SplitConformalClassifier
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import estimator_checks
from sklearn.utils.estimator_checks import estimator_checks_generator
from sklearn.utils.validation import check_is_fitted, validate_data
from transformers import Qwen2Config, Qwen2ForCausalLM

import loracurve as lc
from loracurve.runs.classifier import CurveClassifier
from loracurve.system.errors import UserError
from loracurve.tasks.dataset import read_dataset
from loracurve.training.config import steps_for

QUICK: dict[str, Any] = {"steps": 2, "segments": 1, "points": 2, "rank": 2, "learning_rate": 1e-2}


def reviews(count: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Texts that all differ, whose last word says the label."""
    draw = random.Random(seed)
    labels = [draw.randrange(2) for _ in range(count)]
    texts = [f"{draw.choice(FILLERS)} {i} {draw.choice(WORDS[label])}" for i, label in enumerate(labels)]
    return texts, [("negative", "positive")[label] for label in labels]


TEXTS, LABELS = reviews(240)
NEW = reviews(13, seed=1)[0]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that takes no time, in float64: the checks compare predictions in batches of other sizes to 1e-7."""
    folder, tokenizer = tmp_path_factory.mktemp("base"), qwen_style()
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=16, **heads))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(5)  # as in `helpers.tiny`
    model.double().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def fitted(base: str) -> CurveClassifier:
    return CurveClassifier(base, **QUICK).fit(TEXTS, LABELS)


# ---- scikit-learn's checks


class OfNumbers(CurveClassifier):
    """The checks' data are numbers, which the classifier refuses: here scikit-learn's `validate_data` looks at them,
    and they are written as text. So what the checks say of X (shape, NaN, sparse) they say of `validate_data`; all the
    rest, y too, is the classifier's own."""

    def fit(self, X: Any, y: Any) -> OfNumbers:
        super().fit(self._written(validate_data(self, X)), y)
        return self

    def _predicted(self, X: Any) -> Any:
        check_is_fitted(self, "classes_")
        return super()._predicted(self._written(validate_data(self, X, reset=False)))

    @staticmethod
    def _written(X: Any) -> list[str]:
        return [" ".join(f"{number:.2g}" for number in row) for row in X]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.input_tags.one_d_array, tags.input_tags.string = True, False, False
        tags.classifier_tags.poor_score = True  # a step of a random model of width 8
        return tags


LEAST: dict[str, Any] = {"steps": 1, "segments": 1, "points": 1, "rank": 1, "scoring": "letter"}
CHECKS = [check for _, check in estimator_checks_generator(OfNumbers("unused", **LEAST))]


def name_of(check: Any) -> str:
    words = ", ".join(f"{k}={v}" for k, v in check.keywords.items())
    inner = check.func
    return getattr(inner, "__name__", None) or f"{inner.func.__name__}({words})"


@pytest.mark.parametrize("check", CHECKS, ids=name_of)
def test_estimator_checks(check: Callable[[Any], None], base: str) -> None:
    """All of them, none is expected to fail."""
    check(OfNumbers(base, **LEAST))


OF_PARAMETERS = [
    estimator_checks.check_estimator_cloneable,
    estimator_checks.check_estimator_tags_renamed,
    estimator_checks.check_valid_tag_types,
    estimator_checks.check_estimator_repr,
    estimator_checks.check_no_attributes_set_in_init,
    estimator_checks.check_do_not_raise_errors_in_init_or_set_params,
    estimator_checks.check_mixin_order,
    estimator_checks.check_parameters_default_constructible,
    estimator_checks.check_get_params_invariance,
    estimator_checks.check_set_params,
]


@pytest.mark.parametrize("check", OF_PARAMETERS)
def test_checks_that_need_no_data_hold_of_the_class_itself(check: Callable[[str, Any], None]) -> None:
    """By its tags, which say texts and no matrix of numbers, scikit-learn itself runs the first one only."""
    check("CurveClassifier", CurveClassifier())


# ---- it is the run that the command line makes


def test_it_is_the_run_that_loracurve_fit_makes(
    fitted: CurveClassifier, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = read_dataset(fitted.run_.folder.parent / "data").splits
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 192, "validation": 24, "test": 24}
    for name, rows in splits.items():  # written down again, from X and y
        chosen = [int(row.id) for row in rows]
        numbers = [["negative", "positive"].index(LABELS[i]) for i in chosen]
        listed = [{"id": str(i), "text": TEXTS[i], "label": n} for i, n in zip(chosen, numbers, strict=True)]
        put(tmp_path / "data" / f"{name}.jsonl", listed)
    (tmp_path / "data" / "meta.json").write_text('{"task": "classification", "labels": ["negative", "positive"]}')
    config = {
        "model": {"name": base},
        "task": {"data": str(tmp_path / "data"), "scoring": "label"},
        "lora": {"r": 2, "lora_alpha": 4},
        "curve": {"segments": 1},
        "curve_training": {"steps": 2, "learning_rate": 1e-2},
        "evaluation": {"points": 2},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    run = tmp_path / "run"
    command("fit", tmp_path / "config.yaml", "--out", run)
    command("calibrate", run, "--input", tmp_path / "data" / "test.jsonl")
    points = "curve/control_points.safetensors"
    assert (run / points).read_bytes() == (fitted.run_.folder / points).read_bytes()
    put(tmp_path / "new.jsonl", [{"id": str(i), "text": text} for i, text in enumerate(NEW)])
    records = predictions(capsys, run, tmp_path / "new.jsonl")
    assert fitted.predict_proba(NEW) == pytest.approx(np.array([r["probs"] for r in records]), abs=1e-6)
    assert fitted.predict(NEW).tolist() == [r["prediction"] for r in records]
    found = fitted.uncertainty(NEW)
    for column, key in {
        "total": "entropy",
        "data": "expected_entropy",
        "within": "within_points",
        "between": "between_points",
        "familiarity": "familiarity",
    }.items():
        assert found[column].tolist() == pytest.approx([r[key] for r in records], abs=1e-6)
    assert found.total.to_numpy() == pytest.approx((found.data + found.within + found.between).to_numpy())
    with pytest.warns(UserWarning, match="abstaining always: no threshold certified for risk 0.05"):
        where, reasons = fitted.abstain(NEW, return_reasons=True)
    assert where.tolist() == [r["abstain"] for r in records] and where.dtype == bool
    assert reasons == [tuple(r["reasons"]) for r in records]


def test_a_run_does_what_runs_do(fitted: CurveClassifier, tmp_path: Path) -> None:
    command("evaluate", fitted.run_.folder, "--out", tmp_path / "evaluation")
    command("export", fitted.run_.folder, "--out", tmp_path / "points", "--points", "2")
    assert json.loads((tmp_path / "evaluation" / "metrics.json").read_text())["methods"]
    assert len(list((tmp_path / "points").glob("*/adapter_model.safetensors"))) == 2


def own_sets(classifier: CurveClassifier, texts: list[str], labels: list[str], alpha: float) -> np.ndarray:
    """[E, C]: the library's own prediction sets of the new texts."""
    known, new = (torch.from_numpy(classifier.predict_proba(np.array(part))) for part in (texts, NEW))
    numbers = torch.from_numpy(np.searchsorted(classifier.classes_, labels))
    return lc.prediction_sets(new, lc.conformal_quantile(known, numbers, alpha)).numpy()


def test_mapie_makes_sets_of_three_classes(base: str) -> None:
    labels = ["plain" if i % 3 == 0 else label for i, label in enumerate(LABELS)]
    classifier = CurveClassifier(base, **QUICK, risk=None).fit(TEXTS[:120], labels[:120])
    for score in ("lac", "aps"):
        sets = SplitConformalClassifier(classifier, confidence_level=0.9, conformity_score=score, prefit=True)
        sets.conformalize(np.array(TEXTS[120:]), labels[120:])
        _, found = sets.predict_set(np.array(NEW))
        assert found.shape == (len(NEW), 3, 1)
        if score == "lac":
            assert (found[:, :, 0] == own_sets(classifier, TEXTS[120:], labels[120:], 0.1)).all()


def test_the_examples_of_the_page_run(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lc, "CurveClassifier", partial(CurveClassifier, **{"model": base, **QUICK}))
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "scikit-learn.md").read_text()
    first, names, sets, kept = fenced("python", page.replace('"HuggingFaceTB/SmolLM2-135M-Instruct", ', ""))
    run: dict[str, Any] = {"texts": TEXTS, "labels": LABELS, "new_texts": NEW}
    with pytest.warns(UserWarning, match="abstaining always"):
        exec(first, run)
    assert (run["classifier"].classes_ == ["negative", "positive"]).all()
    exec(f"import loracurve as lc\nnamed = {names}", run)
    run["named"].fit(TEXTS, [int(label == "positive") for label in LABELS])
    assert set(run["named"].predict(NEW)) <= {0, 1}
    run |= {"own_texts": [f"{text} again" for text in TEXTS[:60]], "own_labels": LABELS[:60]}
    exec(sets, run)
    assert (run["found"][:, :, 0] == own_sets(run["classifier"], run["own_texts"], run["own_labels"], 0.1)).all()
    exec(kept, run)
    assert read_dataset(tmp_path / "reviews" / "data").rows("train")
    assert (tmp_path / "reviews" / "run" / "metrics.json").is_file()


def test_the_example_of_the_readme_runs(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lc, "CurveClassifier", partial(CurveClassifier, **{"model": base, **QUICK}))
    (example,) = fenced("python")
    run: dict[str, Any] = {"texts": TEXTS, "labels": LABELS, "new_texts": NEW}
    with pytest.warns(UserWarning, match="abstaining always"):
        exec(example.replace('"HuggingFaceTB/SmolLM2-135M-Instruct"', ""), run)
    assert set(run["classifier"].predict(NEW)) <= {"negative", "positive"}


def test_it_learns_and_answers_what_it_is_sure_of(tmp_path: Path) -> None:
    base = str(base_folder(tmp_path / "base", "qwen2"))
    classifier = CurveClassifier(base, **QUICK | {"steps": 120}, risk=0.2, calibration_fraction=0.3).fit(TEXTS, LABELS)
    texts, labels = reviews(100, seed=2)
    assert classifier.score(texts, labels) > 0.9
    answered = ~classifier.abstain(texts)
    assert answered.mean() > 0.3
    assert (classifier.predict(texts) == np.array(labels))[answered].mean() > 0.9


def test_the_seed_decides(base: str, fitted: CurveClassifier) -> None:
    expected = fitted.predict_proba(NEW)
    state = np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    assert (clone(fitted).fit(TEXTS, LABELS).predict_proba(NEW) == expected).all()
    other = clone(fitted).set_params(random_state=1).fit(TEXTS, LABELS)
    assert not np.allclose(other.predict_proba(NEW), expected)
    drawn = [
        CurveClassifier(base, **QUICK, random_state=np.random.RandomState(3)).fit(TEXTS, LABELS).predict_proba(NEW)
        for _ in range(2)
    ]
    assert (drawn[0] == drawn[1]).all() and not np.allclose(drawn[0], expected)
    assert np.random.get_state()[1].tolist() == state  # type: ignore[index, union-attr]


def test_an_anchored_curve_goes_through_fine_tunes(base: str) -> None:
    run = CurveClassifier(base, **QUICK | {"steps": 10}, kind="anchored").fit(TEXTS, LABELS).run_
    assert (run.config.curve.anchors, run.config.anchor_training.steps, run.config.curve_training.steps) == (2, 2, 1)
    assert run.model.spec.anchor_times == (0.0, 1.0)


def test_defaults_are_the_librarys() -> None:
    classifier = CurveClassifier()
    assert classifier.segments == lc.CurveConfig.segments
    assert classifier.points == lc.EvaluationConfig.points
    assert classifier.rank == lc.LoraOptions.r


def test_steps_come_from_the_rows() -> None:
    assert [steps_for(rows) for rows in (2, 106, 107, 160, 1600, 10**6)] == [100, 100, 101, 150, 1500, 1500]


# ---- rows and labels


@pytest.mark.parametrize(
    "as_given",
    [np.array, tuple, pd.Series, lambda x: pd.Series(x, dtype="string"), lambda x: np.array(x, object)[:, None]],
)
def test_texts_in_any_form(as_given: Callable[[list[str]], Any], fitted: CurveClassifier) -> None:
    assert (fitted.predict_proba(as_given(NEW)) == fitted.predict_proba(NEW)).all()


def test_frames_keep_their_index(fitted: CurveClassifier) -> None:
    frame = pd.DataFrame({"review": NEW}, index=[f"row {i}" for i in range(len(NEW))])
    assert fitted.uncertainty(frame).index.tolist() == frame.index.tolist()
    assert fitted.predict_proba(frame).tolist() == fitted.predict_proba(NEW).tolist()


def test_pairs_of_texts(base: str) -> None:
    pairs = pd.DataFrame({"first": TEXTS, "second": TEXTS[::-1]})
    classifier = CurveClassifier(base, **QUICK).fit(pairs, LABELS)
    assert classifier.run_.task.template is not None and classifier.run_.task.template.name == "class_label_pair"
    expected = classifier.predict_proba(pairs[:5])
    assert (classifier.predict_proba(list(zip(TEXTS[:5], TEXTS[::-1][:5], strict=True))) == expected).all()
    assert not np.allclose(classifier.predict_proba(pairs[["second", "first"]][:5].to_numpy()), expected)
    with pytest.raises(UserError, match="X: expected pairs of texts as in fit, found single texts"):
        classifier.predict(TEXTS)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("one text", r"X: expected a list of texts, found str; give one such as \[text\]"),
        ([], "X: expected at least one text"),
        ([[1.0, 2.0]], "found 1.0 in row 0; write numbers"),
        (["fine", None], "found None in row 1"),
        (["fine", float("nan")], "found nan in row 1"),
        (["fine", "  "], "expected texts that are not blank, found '  ' in row 1"),
        ([["a", "b", "c"]], r"expected texts \[n\] or pairs of texts \[n, 2\], found \[1, 3\]"),
        (["\ud83d"], "half of a surrogate pair"),
        ([["a", "b"]], "X: expected single texts as in fit, found pairs of texts"),
    ],
)
def test_what_is_no_text_is_refused(texts: Any, message: str, fitted: CurveClassifier) -> None:
    with pytest.raises(UserError, match=message):
        fitted.predict(texts)


@pytest.mark.parametrize(
    "values", [("no", "yes"), (2, 10), (False, True), (1.0, 2.0), (np.int8(-1), np.int8(1)), ("b_c", "d e")]
)
def test_labels_of_any_type_come_back(values: tuple[Any, Any], base: str) -> None:
    y = np.array([values[label == "positive"] for label in LABELS])
    classifier = CurveClassifier(base, **QUICK).fit(TEXTS, y)
    assert classifier.classes_.tolist() == sorted(values) and classifier.classes_.dtype == y.dtype
    assert classifier.predict(NEW).dtype == y.dtype
    probs = classifier.predict_proba(NEW)
    assert probs.sum(1) == pytest.approx(1)
    assert (classifier.classes_[probs.argmax(1)] == classifier.predict(NEW)).all()
    rows = read_dataset(classifier.run_.folder.parent / "data")
    assert all(rows.labels[row.label] == _name(y[int(row.id)]) for row in rows.rows("train"))


def _name(label: Any) -> str:
    return str(int(label)) if isinstance(label, np.floating) else str(label)


def test_names_of_classes_stand_in_the_prompt(base: str) -> None:
    y = [int(label == "positive") for label in LABELS]

    def of(names: Any) -> CurveClassifier:
        return CurveClassifier(base, **QUICK, class_names=names).fit(TEXTS, y)

    named = of({1: "positive", 0: "negative"})
    assert named.run_.task.classes == ("negative", "positive") and named.run_.config.task.scoring == "label"
    assert (of(["negative", "positive"]).predict_proba(NEW) == named.predict_proba(NEW)).all()
    of_words = CurveClassifier(base, **QUICK).fit(TEXTS, LABELS)
    assert (of_words.predict_proba(NEW) == named.predict_proba(NEW)).all()
    assert set(named.predict(NEW)) <= {0, 1}
    for names, message in (
        (["x"], "expected 2 names, one for each label in y"),
        ({0: "x"}, "found none for 1"),
        (["x", "x"], "expected different names"),
        (["x", " "], "expected labels that can be written"),
    ):
        with pytest.raises(UserError, match=message):
            of(names)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (["a"] * 240, "expected at least two classes, found 1 class"),
        ([None, *LABELS[1:]], "missing value"),
        ([float("nan")] + [1.0, 0.0] * 119 + [1.0], "NaN"),
        (np.array([1, "a"] * 120, object), "labels of one type"),
        (np.linspace(0, 1, 240), "Unknown label type: continuous"),
        (LABELS[1:], "a label for each of the 240 rows, found 239"),
        ([[0, 1]] * 240, "1d array"),
        (None, "requires y to be passed"),
    ],
)
def test_labels_that_are_no_classes_are_refused(y: Any, message: str, base: str) -> None:
    with pytest.raises(ValueError, match=message):
        CurveClassifier(base, **QUICK).fit(TEXTS, y)


def test_rows_are_divided_by_class_and_text(base: str, tmp_path: Path) -> None:
    texts = [*TEXTS, *(f"{text.upper()} !" for text in TEXTS[:60]), "quite rare", "truly rare"]
    labels = [*LABELS, *LABELS[:60], "rare", "rare"]

    def divided(order: list[int]) -> dict[str, str]:
        classifier = CurveClassifier(base, **QUICK).fit([texts[i] for i in order], [labels[i] for i in order])
        splits = read_dataset(classifier.run_.folder.parent / "data").splits
        return {str(row.text): name for name, rows in splits.items() for row in rows}

    found = divided(list(range(len(texts))))
    shuffled = random.Random(4).sample(range(len(texts)), len(texts))
    assert divided(shuffled) == found
    assert all(found[text] == found[f"{text.upper()} !"] for text in TEXTS[:60])
    assert found["quite rare"] == found["truly rare"] == "train"
    # Texts without any letter or digit are told apart too.
    assert CurveClassifier(base, **QUICK).fit(["!", "!!", "!!!", "?", "??", "???"], ["a"] * 3 + ["b"] * 3)
    for name in ("validation", "test"):
        for label in ("negative", "positive"):
            mine = [found[text] == name for text, y in zip(texts, labels, strict=True) if y == label]
            assert abs(sum(mine) - len(mine) / 10) <= 1.5  # a text and its copy count twice


@pytest.mark.parametrize(
    ("labels", "scoring"),
    [(("negative", "positive"), "label"), (("complaint about service", "praise"), "letter")],
)
def test_scoring_is_chosen_by_what_the_model_can_say(labels: tuple[str, str], scoring: str, base: str) -> None:
    y = [labels[label == "positive"] for label in LABELS]
    assert CurveClassifier(base, **QUICK).fit(TEXTS, y).run_.config.task.scoring == scoring


def test_encoders_get_a_head(tmp_path: Path) -> None:
    encoder = str(base_folder(tmp_path / "encoder", "encoder"))
    classifier = CurveClassifier(encoder, **QUICK).fit(TEXTS, LABELS)
    assert classifier.run_.config.task.scoring == "head"
    again = pickle.loads(pickle.dumps(classifier))
    assert (again.predict_proba(NEW) == classifier.predict_proba(NEW)).all()


def test_many_classes_and_prompts_without_options_get_a_head(base: str) -> None:
    many = [f"class {i % 30}" for i in range(240)]
    assert CurveClassifier(base, **QUICK).fit(TEXTS, many).run_.config.task.scoring == "head"
    long = [f"{label} indeed" for label in LABELS]
    for prompt, scoring in (("{text}\n{options}\nAnswer:", "letter"), ("{text}\nAnswer:", "head")):
        classifier = CurveClassifier(base, **QUICK, prompt=prompt).fit(TEXTS, long)
        assert classifier.run_.config.task.scoring == scoring
    with pytest.raises(UserError, match=r"prompt: expected fields from text, text2, options, found \{txt\}"):
        CurveClassifier(base, **QUICK, prompt="{txt} is").fit(TEXTS, LABELS)


# ---- calibration


def test_without_calibration_probabilities_are_the_averages_own(base: str, fitted: CurveClassifier) -> None:
    plain = CurveClassifier(base, **QUICK, risk=None).fit(TEXTS, LABELS)
    few = CurveClassifier(base, **QUICK).fit(TEXTS[:100], LABELS[:100])
    for classifier in (plain, few):
        assert not classifier.calibration_ and not (classifier.run_.folder / "calibration.json").exists()
        with pytest.raises(
            UserError, match="abstain: expected a classifier that was calibrated, found one that was not"
        ):
            classifier.abstain(NEW)
    temperature = json.loads((fitted.run_.folder / "calibration.json").read_text())["temperature"]
    tempered = plain.predict_proba(NEW) ** (1 / temperature)
    assert fitted.predict_proba(NEW) == pytest.approx(tempered / tempered.sum(1, keepdims=True), abs=1e-6)
    assert fitted.calibration_[0] == "24 rows of test.jsonl"


def test_verbose_says_what_quiet_does_not(base: str, capfd: pytest.CaptureFixture[str]) -> None:
    said = []
    for verbose in (0, 1):
        CurveClassifier(base, **QUICK, verbose=verbose).fit(TEXTS, LABELS)
        said.append(capfd.readouterr())
    assert said[0].out == "" and "it/s" not in said[0].err and "0%" not in said[0].err
    assert "2/2" in said[1].out and "24 rows of test.jsonl\ntemperature " in said[1].out


# ---- life of an estimator


def test_a_pickle_holds_the_curve_and_neither_the_base_nor_rows(
    fitted: CurveClassifier, base: str, tmp_path: Path
) -> None:
    expected = fitted.predict_proba(NEW)
    mine = clone(fitted).fit(TEXTS, LABELS)
    folder = mine.run_.folder.parent
    path = tmp_path / "classifier.joblib"
    joblib.dump(mine, path)
    del mine
    gc.collect()
    assert not folder.exists()  # a temporary folder goes with its estimator
    assert not any(text.encode() in path.read_bytes() for text in TEXTS)
    kept = sum(p.stat().st_size for p in fitted.run_.folder.rglob("*") if p.is_file() and p.parent.name != "training")
    assert os.path.getsize(path) < kept + 10_000
    again = joblib.load(path)
    assert (again.predict_proba(NEW) == expected).all()
    assert again.uncertainty(NEW).equals(fitted.uncertainty(NEW))
    moved = Path(base).rename(tmp_path / "elsewhere")
    try:
        other = joblib.load(path)
        with pytest.raises(UserError, match="cannot load"):
            other.predict(NEW)
        assert (other.set_params(model=str(moved)).predict_proba(NEW) == expected).all()
    finally:
        moved.rename(base)


def test_searches_pipelines_and_cross_validation(base: str) -> None:
    classifier = CurveClassifier(base, **QUICK)
    scores = cross_val_score(classifier, TEXTS, LABELS, cv=2)
    assert scores.shape == (2,) and np.isfinite(scores).all()
    pipeline = make_pipeline(FunctionTransformer(lambda texts: [text.lower() for text in texts]), classifier)
    search = GridSearchCV(
        pipeline, {"curveclassifier__rank": [1, 2]}, cv=2, scoring="neg_log_loss", error_score="raise"
    )
    search.fit(np.array(TEXTS), LABELS)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    best = clone(classifier).set_params(rank=search.best_params_["curveclassifier__rank"])
    assert (best.fit(TEXTS, LABELS).predict_proba(NEW) == search.predict_proba([t.upper() for t in NEW])).all()


def test_a_folder_of_ones_own_is_kept_and_never_overwritten(base: str, tmp_path: Path) -> None:
    classifier = CurveClassifier(base, **QUICK, folder=tmp_path / "mine")
    with pytest.raises(UserError, match="prompt"):
        clone(classifier).set_params(prompt="no field").fit(TEXTS, LABELS)
    assert not list((tmp_path / "mine").iterdir())  # what failed early is not in the way
    classifier.fit(TEXTS, LABELS)
    with pytest.raises(UserError, match="folder: expected a new folder, found one with contents"):
        classifier.fit(TEXTS, LABELS)
    run = lc.open_run(tmp_path / "mine" / "run")
    assert run.folder == classifier.run_.folder
    del classifier
    gc.collect()
    assert (tmp_path / "mine" / "run" / "metrics.json").exists()


def test_before_fit_there_is_nothing(base: str) -> None:
    classifier = CurveClassifier(base)
    for method in (classifier.predict, classifier.predict_proba, classifier.uncertainty, classifier.abstain):
        with pytest.raises(NotFittedError):
            method(NEW)
    assert not hasattr(classifier, "run_")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "fre"}, "kind: expected free or anchored, found 'fre'"),
        ({"scoring": "leter"}, "scoring: expected one of"),
        ({"validation_fraction": 0.0}, "validation_fraction: expected a part between 0 and 1"),
        ({"validation_fraction": 0.5, "calibration_fraction": 0.5}, "the two together below 1"),
        ({"risk": 1.5}, "risk"),
        ({"rank": 0}, "lora.r"),
        ({"steps": 0, "kind": "anchored"}, "steps: expected"),
        ({"model": "/nowhere"}, "cannot load"),
    ],
)
def test_options_are_checked_at_fit_in_one_line(options: dict[str, Any], message: str, base: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        CurveClassifier(**{"model": base} | QUICK | options).fit(TEXTS, LABELS)
    assert "\n" not in str(error.value)


def test_the_same_texts_are_predicted_once(fitted: CurveClassifier, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted.predict(NEW)
    expected, found = fitted.predict_proba(NEW), fitted.uncertainty(NEW)
    calls: list[int] = []
    task = fitted.run_.task
    encode = task.encode_rows
    monkeypatch.setattr(task, "encode_rows", lambda rows, *a, **k: calls.append(len(rows)) or encode(rows, *a, **k))
    assert (fitted.predict_proba(NEW[::-1])[::-1] == pytest.approx(expected)) and fitted.uncertainty(NEW).equals(found)
    fitted.predict(list(NEW))
    assert calls == [len(NEW)] * 2


@pytest.mark.parametrize("count", [2, 4])
def test_too_few_rows(count: int, base: str) -> None:
    with pytest.raises(UserError, match="at least 3 different texts of some class"):
        CurveClassifier(base, **QUICK).fit(TEXTS[:count], ["one", "other", "one", "other"][:count])
