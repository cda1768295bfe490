"""`CurveClassifier`: a run as a scikit-learn estimator of texts in memory, which it writes down for `fit_run`."""

from __future__ import annotations

import contextlib
import json
import math
import numbers
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import scipy.sparse
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import Tags, check_array, check_random_state, column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from loracurve.curve.config import CurveConfig, LoraOptions
from loracurve.inference.calibration import apply_temperature
from loracurve.inference.config import EvaluationConfig
from loracurve.inference.model_average import Average
from loracurve.inference.predictive import Predictive
from loracurve.model.base_model import load_tokenizer
from loracurve.model.config import ModelConfig
from loracurve.runs.calibrate import FEWEST_ROWS, calibrate_run
from loracurve.runs.calibration import Calibration, calibration_for
from loracurve.runs.config import RunConfig, load_config
from loracurve.runs.fit import fit_run
from loracurve.runs.predict import average_of_classes, familiarity_of, prediction_records
from loracurve.runs.run import Run, open_run
from loracurve.system.errors import UserError
from loracurve.system.files import atomic_write, write_json
from loracurve.system.folders import has_results
from loracurve.system.paths import exists, is_folder
from loracurve.system.ranges import Count, OpenShare, in_range
from loracurve.tasks.config import Scoring, TaskConfig
from loracurve.tasks.dataset import Row, check_rows
from loracurve.tasks.encoding import Encoded
from loracurve.tasks.repeats import bare
from loracurve.tasks.splitting import divide
from loracurve.tasks.task import load_task
from loracurve.training.config import FitConfig, LoopConfig, steps_for

__all__ = ["CurveClassifier"]


class CurveClassifier(ClassifierMixin, BaseEstimator):
    """A curve of LoRA adapters on a language model, as a scikit-learn classifier of texts.

    `fit` writes the rows into a folder and makes a run there with the same code as `loracurve fit`: everything that
    takes a run directory works on `clf.run_.folder`. Rows are divided by the hash of their text, class by class: most
    train the curve, some choose the state that is kept (validation), and some, which neither saw, judge and calibrate
    it. Rows of the same text stay together.

    Args:
        model: base model: a folder, or a name on the hub.
        kind: free: all points of the curve are trained together. anchored: a curve through fine-tunes made first.
        segments: of the curve; an anchored one has one fine-tune more.
        steps: optimiser steps of a free curve, 16 rows each. An anchored curve trains each fine-tune for a fifth of
            them, and the curve through them for a tenth. None: 15 passes over the training rows, at least 100 steps
            and at most 1500 (`steps_for`).
        learning_rate: peak learning rate; None: the library's.
        points: points of the curve that predictions average; so many forward passes.
        scoring: how an answer is read from the model, as in `TaskConfig.scoring`. auto: for causal language models the
            class names where each is one token (`label`), else letters of listed options (`letter`), or a
            classification head where there are more than 26 classes or the prompt lists none (`head`); for encoders
            and all other models a head.
        prompt: a prompt of your own with {text} in it ({text2} for pairs; {options} lists the classes). None: a
            built-in one.
        class_names: what the classes are called in the prompt: a mapping from the labels in y, or a list in the order
            of `classes_`. None: the labels as text. Names help: "positive" says more to a language model than 1.
        rank: of the adapters.
        risk: error rate that the answered rows may have in the long run, where `abstain` decides what is answered.
            None: nothing is calibrated, probabilities are the average's own, and there is no `abstain`.
        validation_fraction: part of the rows on which the best state is chosen.
        calibration_fraction: part of the rows on which the run is judged (metrics.json) and calibrated. With fewer
            than 20 such rows nothing is calibrated.
        random_state: seed of everything that is drawn: an int gives the same predictions again.
        folder: new folder for the rows (`data`) and the run directory (`run`). None: a temporary one, which goes with
            the estimator.
        verbose: 0: quiet. 1: progress bars, and what calibration found.

    After `fit` there are `classes_`, the labels of y, sorted: [C]; `run_`, the opened run (`loracurve.open_run`), with
    its `folder`, `model` and `task`; and `calibration_`, what calibration found, a line each, or nothing without it.

    A pickled estimator holds the curve and what was measured on it, and neither the base model, which is opened again
    where `model` says, nor any rows.
    """

    def __init__(
        self,
        model: str = "HuggingFaceTB/SmolLM2-135M-Instruct",
        *,
        kind: Literal["free", "anchored"] = "free",
        segments: int = 4,
        steps: int | None = None,
        learning_rate: float | None = None,
        points: int = 10,
        scoring: Literal["auto"] | Scoring = "auto",
        prompt: str | None = None,
        class_names: Mapping[Any, str] | Sequence[str] | None = None,
        rank: int = 8,
        risk: float | None = 0.05,
        validation_fraction: float = 0.1,
        calibration_fraction: float = 0.1,
        random_state: Any = 0,
        folder: str | Path | None = None,
        verbose: int = 0,
    ) -> None:
        self.model = model
        self.kind = kind
        self.segments = segments
        self.steps = steps
        self.learning_rate = learning_rate
        self.points = points
        self.scoring = scoring
        self.prompt = prompt
        self.class_names = class_names
        self.rank = rank
        self.risk = risk
        self.validation_fraction = validation_fraction
        self.calibration_fraction = calibration_fraction
        self.random_state = random_state
        self.folder = folder
        self.verbose = verbose

    def fit(self, X: Any, y: Any) -> CurveClassifier:
        """Fit to texts.

        Args:
            X: texts [n] (a list, an array, a Series, a frame of one column), or pairs of texts [n, 2].
            y: labels [n]: strings, whole numbers or booleans, of two classes or more.

        Raises:
            UserError (a ValueError): what is no text, labels that are no classes, too few rows, options that do not
                suit each other or the model; one line says what to do.
        """
        texts = _texts(X)
        classes, labels = _classes(y, len(texts))
        names = _names(classes, self.class_names)
        seed = _seed(self.random_state)
        if self.risk is not None:
            in_range("risk", self.risk, OpenShare)  # before hours of training
        rows = _rows(texts, labels)
        parts = _parts(rows, self.validation_fraction, self.calibration_fraction, seed)
        with _Kept.new(self.folder) as kept, _progress(bool(self.verbose)):
            _write(kept.data, rows, names, parts)
            fit_run(self._config(kept.data, len(parts["train"]), seed), kept.folder, progress=bool(self.verbose))
            calibration = self._calibrate(kept, len(parts["test"]))
        self.classes_, self.calibration_, self._names, self._columns = classes, calibration, names, len(texts[0])
        self._kept = kept
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class of each row: [n], of y's dtype. X: as in `fit`."""
        probs = self.predict_proba(X)
        found: np.ndarray = self.classes_[probs.argmax(1)]
        return found

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities [n, C], columns in the order of `classes_`: those of the average over the curve, at the
        temperature that calibration found. X: as in `fit`."""
        _, encoded, predictive, calibration, _ = self._predicted(X)
        temperature = 1.0 if calibration is None else calibration.temperature
        probs = apply_temperature(predictive.log_probs, temperature).exp().cpu().numpy()
        # By name: the run says which class a column is of.
        return probs[:, [encoded.classes.index(name) for name in self._names]]

    def uncertainty(self, X: Any) -> pd.DataFrame:
        """How uncertain each row is and why, a row each, with X's index where it has one.

        Columns, in nats and before any temperature: `total` (entropy of the average) = `data` (what the data leave
        open) + `within` (far from the training data) + `between` (the fine-tunes along the curve disagree). And
        `familiarity`, from 0 to 1: the part of known rows that are at least as far from the training data; NaN where
        the run has none.
        """
        _, _, predictive, calibration, average = self._predicted(X)
        tolerance = 0.0 if calibration is None else calibration.foreign_tolerance
        familiarity = familiarity_of(predictive, average, tolerance)
        columns = {
            "total": predictive.entropy.cpu().numpy(),
            "data": predictive.expected_entropy.cpu().numpy(),
            "within": predictive.within_points.cpu().numpy(),
            "between": predictive.between_points.cpu().numpy(),
            "familiarity": math.nan if familiarity is None else familiarity.cpu().numpy(),
        }
        return pd.DataFrame(columns, index=X.index if isinstance(X, pd.Series | pd.DataFrame) else None)

    def abstain(self, X: Any, return_reasons: bool = False) -> Any:
        """Where not to answer: [n] bool.

        Args:
            X: as in `fit`.
            return_reasons: also give the reasons of each row, [n] tuples: `uncertain` (the classes are too close for
                `risk`), `foreign` (the text is far from the training data), both or none.

        Raises:
            UserError: nothing was calibrated.
        """
        check_is_fitted(self, "classes_")
        calibration = self._kept.opened(self.model)[2]
        if calibration is None:
            raise UserError(
                "abstain: expected a classifier that was calibrated, found one that was not; fit with risk, and with "
                f"{FEWEST_ROWS} rows or more in calibration_fraction (now {self.calibration_fraction:g})"
            )
        rows, encoded, predictive, calibration, average = self._predicted(X)
        assert calibration is not None
        if calibration.selective.threshold is None:
            warnings.warn(f"abstaining always: {calibration.selective.reason}", stacklevel=2)
        records = list(prediction_records(rows, encoded, predictive, calibration, average))
        where = np.array([record["abstain"] for record in records], dtype=bool)
        return (where, [tuple(record["reasons"]) for record in records]) if return_reasons else where

    @property
    def run_(self) -> Run:
        """The opened run."""
        check_is_fitted(self, "classes_")
        return self._kept.opened(self.model)[0]

    def _predicted(self, X: Any) -> tuple[list[Row], Encoded, Predictive, Calibration | None, Average]:
        """Rows, the same tokenised, their prediction, and what it was made and is calibrated with."""
        check_is_fitted(self, "classes_")
        texts = _texts(X)
        if len(texts[0]) != self._columns:
            kinds = {1: "single texts", 2: "pairs of texts"}
            raise UserError(f"X: expected {kinds[self._columns]} as in fit, found {kinds[len(texts[0])]}")
        run, average, calibration = self._kept.opened(self.model)
        # Each of the four questions about the same texts would predict them again.
        if self._kept.last is None or self._kept.last[0] != texts:
            rows = _rows(texts)
            encoded = run.task.encode_rows(rows, "X", labelled=False)
            self._kept.last = texts, rows, encoded, average.predict(run.model, encoded)
        return *self._kept.last[1:], calibration, average

    def _config(self, data: Path, rows: int, seed: int) -> RunConfig:
        """What `loracurve fit` would be given."""
        if self.kind not in ("free", "anchored"):
            raise UserError(f"kind: expected free or anchored, found {self.kind!r}; choose one of them")
        anchored = self.kind == "anchored"
        steps = steps_for(rows) if self.steps is None else in_range("steps", self.steps, Count)
        each: dict[str, Any] = {"seed": seed}
        if self.learning_rate is not None:
            each["learning_rate"] = self.learning_rate
        curve: dict[str, Any] = {"anchors": self.segments + 1} if anchored else {"segments": self.segments}
        name = str(self.model)
        task = TaskConfig(str(data), "head", prompt=self.prompt, seed=seed)
        return RunConfig(
            model=ModelConfig(name),
            task=replace(task, scoring=_scoring(name, task) if self.scoring == "auto" else self.scoring),
            lora=LoraOptions(r=self.rank, lora_alpha=2 * self.rank),
            curve=CurveConfig(kind=self.kind, **curve),
            anchor_training=LoopConfig(steps=max(steps // 5, 1), **each) if anchored else LoopConfig(),
            curve_training=FitConfig(steps=max(steps // 10, 1) if anchored else steps, **each),
            evaluation=EvaluationConfig(points=self.points, seed=seed),
        )

    def _calibrate(self, kept: _Kept, rows: int) -> list[str]:
        """What `loracurve calibrate RUN --input data/test.jsonl` says, where it can be done."""
        if self.risk is None or rows < FEWEST_ROWS:
            return []
        run = open_run(kept.folder)
        lines = calibrate_run(run, self.risk, delta=0.1, alpha=0.1, measure="entropy", path=kept.data / "test.jsonl")
        kept.keep(run)
        if self.verbose:
            print("\n".join(lines))
        return lines

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.one_d_array = True
        tags.input_tags.two_d_array = False  # of numbers, as scikit-learn means it; pairs of texts may be one
        return tags


class _Kept:
    """Where a fitted run lies, and the run once it is opened. Pickled it is the run's files without base and rows."""

    def __init__(self, root: Path, temporary: bool) -> None:
        self.root = root
        self._opened: tuple[Run, Average, Calibration | None] | None = None
        self.last: tuple[list[tuple[str, ...]], list[Row], Encoded, Predictive] | None = None
        """the texts that were predicted last, and their prediction"""
        if temporary:
            weakref.finalize(self, shutil.rmtree, root, ignore_errors=True)

    @classmethod
    @contextlib.contextmanager
    def new(cls, root: str | Path | None) -> Iterator[_Kept]:
        """A new place for a fit. Where that fails before a run was begun the rows are removed again."""
        if root is not None and exists(root) and (not is_folder(root) or has_results(Path(root))):
            raise UserError(f"folder: expected a new folder, found one with contents at {root}; choose another")
        place = Path(tempfile.mkdtemp(prefix="loracurve-") if root is None else root).absolute()
        kept = cls(place, root is None)
        try:
            yield kept
        except BaseException:
            if not exists(kept.folder):
                shutil.rmtree(kept.data, ignore_errors=True)
            raise

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def folder(self) -> Path:
        return self.root / "run"

    def keep(self, run: Run) -> None:
        """Keep an opened run, with its average and calibration as they are now."""
        average = average_of_classes(run)
        self._opened = run, average, calibration_for(run, average)

    def opened(self, base: str) -> tuple[Run, Average, Calibration | None]:
        """The run, its average and its calibration. `base`: where the base model is now."""
        if self._opened is None:
            known = load_config(self.folder / "config.yaml").model.name
            with _progress(False):
                self.keep(open_run(self.folder, base=None if base == known else base))
        assert self._opened is not None
        return self._opened

    def __getstate__(self) -> dict[str, bytes]:
        paths = [self.folder / name for name in _PICKLED if exists(self.folder / name)]
        paths += sorted((self.folder / "curve").iterdir())
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in paths}

    def __setstate__(self, files: dict[str, bytes]) -> None:
        self.__init__(Path(tempfile.mkdtemp(prefix="loracurve-")), True)  # type: ignore[misc]
        for name, content in files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


_PICKLED = (
    *("config.yaml", "identity.json", "environment.json", "metrics.json"),
    *("calibration.json", "unknowns.json", "unknowns.safetensors"),
)


@contextlib.contextmanager
def _progress(shown: bool) -> Iterator[None]:
    """Show transformers' progress bars or not."""
    before = transformers_logging.is_progress_bar_enabled()
    if before and not shown:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            transformers_logging.enable_progress_bar()


def _texts(X: Any) -> list[tuple[str, ...]]:
    """Each row's one or two texts."""
    if scipy.sparse.issparse(X):
        raise TypeError("X: expected texts, found a sparse matrix; give a list of texts")
    values = np.asarray(X, dtype=object)
    if values.ndim == 0:
        raise UserError(f"X: expected a list of texts, found {type(X).__name__}; give one such as [text]")
    if len(values) == 0:
        raise UserError("X: expected at least one text, found 0 sample(s); give more")
    if values.ndim > 2 or (values.ndim == 2 and values.shape[1] not in (1, 2)):
        raise UserError(
            f"X: expected texts [n] or pairs of texts [n, 2], found {list(values.shape)}; choose one or two columns"
        )
    rows = values.reshape(len(values), -1).tolist()
    for number, row in enumerate(rows):
        for text in row:
            if not isinstance(text, str) or not text.strip():
                raise UserError(
                    f"X: expected texts that are not blank, found {text!r} in row {number}; write numbers and other "
                    "types as text, and leave out rows without any"
                )
    return [tuple(map(str, row)) for row in rows]


def _classes(y: Any, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The labels of y, sorted, and the number of each row's label among them."""
    if y is None:
        raise UserError("CurveClassifier requires y to be passed, but the target y is None")
    y = column_or_1d(y, warn=True)
    if pd.isna(y).any():
        raise UserError("y: Input y contains NaN or another missing value; leave out rows without a label")
    y = check_array(y, ensure_2d=False, dtype=None, input_name="y")
    if len(y) != rows:
        raise UserError(f"y: expected a label for each of the {rows} rows, found {len(y)}")
    try:
        classes, labels = np.unique(y, return_inverse=True)
    except TypeError as error:
        raise UserError("y: expected labels of one type, found several; write them all as text") from error
    check_classification_targets(y)
    if len(classes) < 2:
        raise UserError(f"y: expected at least two classes, found 1 class: {classes[0]!r}")
    return classes, labels


def _names(classes: np.ndarray, given: Mapping[Any, str] | Sequence[str] | None) -> list[str]:
    """The classes' names in their order."""
    if given is None:
        names = [_as_name(c) for c in classes.tolist()]
    elif isinstance(given, Mapping):
        if missing := [c for c in classes.tolist() if c not in given]:
            raise UserError(f"class_names: expected a name for each label in y, found none for {missing[0]!r}")
        names = [given[c] for c in classes.tolist()]
    else:
        names = list(given)
    if isinstance(given, str) or len(names) != len(classes):
        raise UserError(f"class_names: expected {len(classes)} names, one for each label in y, found {given!r}")
    if bad := [n for n in names if not isinstance(n, str) or not n.strip()]:
        raise UserError(f"y: expected labels that can be written, found {bad[0]!r}; give class_names")
    if len(set(names)) < len(names):
        raise UserError(f"class_names: expected different names, found {names}; change one of them")
    return names


def _as_name(label: Any) -> str:
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


def _seed(random_state: Any) -> int:
    if isinstance(random_state, numbers.Integral):
        return int(random_state)
    return int(check_random_state(random_state).randint(2**31 - 1))


def _parts(rows: Sequence[Row], validation: float, test: float, seed: int) -> dict[str, list[int]]:
    """Numbers of the rows for training, validation and calibration (`test`), by class and by the hash of their text.

    Rows of the same text, whatever its case, punctuation and spacing, stay together; a class of fewer than three texts
    is trained only. Where a row goes depends on the texts and labels there are, and not on their order.
    """
    for name, part in (("validation_fraction", validation), ("calibration_fraction", test)):
        if not 0 < part < 1 or validation + test >= 1:
            raise UserError(f"{name}: expected a part between 0 and 1, the two together below 1, found {part}")
    keys, labels = [bare(row)[0] for row in rows], [row.label for row in rows]
    parts = divide(keys, labels, parts={"validation": validation, "test": test}, seed=seed)
    for found in parts.values():
        if not found:
            raise UserError(
                "X: expected at least 3 different texts of some class, for training, validation and calibration, "
                f"found fewer in {len(rows)} sample(s); give more rows"
            )
    return parts


def _rows(texts: Sequence[tuple[str, ...]], labels: np.ndarray | None = None) -> list[Row]:
    """Rows with their numbers in X as ids."""
    rows = []
    for i, (text, *second) in enumerate(texts):
        label = None if labels is None else int(labels[i])
        rows.append(Row(str(i), label, text=text, text2=second[0] if second else None))
    check_rows(rows)
    return rows


def _write(folder: Path, rows: Sequence[Row], names: list[str], parts: Mapping[str, Sequence[int]]) -> None:
    """Write a data set that `read_dataset` reads."""
    for split, chosen in parts.items():
        lines = [
            {k: v for k, v in asdict(rows[i]).items() if k in ("id", "text", "text2", "label") and v is not None}
            for i in chosen
        ]
        atomic_write(
            folder / f"{split}.jsonl",
            partial(Path.write_text, data="".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"),
        )
    notes = "rows of CurveClassifier.fit, divided by class and by the hash of their text; test rows calibrate"
    write_json(folder / "meta.json", {"task": "classification", "labels": names, "notes": notes})


def _scoring(model: str, task: TaskConfig) -> Scoring:
    """How answers are scored where nobody says: by the class names where each is one token, else by letters."""
    if not _is_causal(model):
        return "head"
    tokenizer = load_tokenizer(model)
    listed = task.prompt is None or "{options}" in task.prompt
    for scoring in ("label", *(("letter",) if listed else ())):
        try:
            tried = load_task(replace(task, scoring=scoring), tokenizer)
            tried.encode_rows(tried.dataset.rows("train")[:1])
        except UserError:  # what is wrong with prompt or rows, and not with the answers, the last one says too
            continue
        return scoring
    return "head"


def _is_causal(model: str) -> bool:
    """Whether a checkpoint is of a causal language model, by the class that its config names."""
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError):  # a GGUF file, or what loading the model says
        return True
    declared = config.architectures or []
    return any(name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in declared)
