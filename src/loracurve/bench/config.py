"""Options of a suite: model, tasks, seeds, methods, training, sets. YAML is read into them by `bench.suite_files`."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from loracurve.curve.config import LoraOptions
from loracurve.landscape.config import PATHS, PathName, PathPoints
from loracurve.model.config import Dtype, ModelConfig
from loracurve.system.errors import UserError
from loracurve.system.ranges import (
    Amount,
    Count,
    NonNegative,
    Points,
    PointsOrNone,
    Positive,
    Rows,
    Seed,
    Slots,
    check_ranges,
)
from loracurve.tasks.config import Scoring, TaskConfig
from loracurve.training.config import LoopConfig

__all__ = ["LANDSCAPE", "Executor", "LandscapeConfig", "SuiteConfig", "SuiteTask", "slug"]


def _default_paths() -> list[PathName]:
    return ["straight", "delta_w", "balanced+procrustes"]


@dataclass(frozen=True)
class LandscapeConfig:
    """What is scanned for every task and seed of a suite."""

    pairs: Amount = 0
    """Pairs of neighbouring anchors (first and second, second and third, ...) between which paths are scanned; 0: no
    scan, and no figures along curves."""
    paths: list[PathName] = field(default_factory=_default_paths)
    """Which paths: straight (in A and B), delta_w, balanced, procrustes, balanced+procrustes, norm_matched."""
    points: PathPoints = 11
    """Points on each path between two anchors, both ends included."""
    rows: Amount = 200
    """Use at most this many validation and as many test rows, the same ones for all seeds; 0: all."""
    dtype: Dtype = "float32"
    """Dtype of the base weights during the scan (on a GPU products are rounded to TF32). `auto` keeps the model's;
    merged bfloat16 weights move the loss by rounding."""
    sharpness: PointsOrNone = 5
    """Points of each trained curve at which the loss under noise is computed, both ends included; 0: none."""
    noise: NonNegative = 0.1
    """That noise, relative to the rows of A and the columns of B, once norm is split evenly between A and B."""
    local_rows: Count = 64
    """Training rows for the loss under noise."""

    def __post_init__(self) -> None:
        check_ranges(self, "landscape")
        wrong = [p for p in self.paths if p == "curve" or p not in PATHS]
        if wrong or not self.paths:
            untrained = ", ".join(p for p in PATHS if p != "curve")
            raise UserError(f"landscape.paths: expected some of {untrained}, found {', '.join(wrong) or 'none'}")


Executor = Literal["processes", "ray"]
"""What runs cells side by side: processes of this machine, or the workers of a Ray cluster."""

LANDSCAPE = "landscape"  # stands for a method's name in the cell of a scan


@dataclass(frozen=True)
class SuiteTask(TaskConfig):
    """A task of a suite: data and scoring, sets to compare with, and how long one fine-tune takes."""

    data: str = ""
    """A name in the suite's data folder or on the hub, or a folder. Default: the task's name in the suite."""
    scoring: Scoring = "letter"
    """letter: options are listed and their letters scored; label: the class's word, one token; text: log-likelihood of
    each choice's text; head: a sequence classification head."""
    shift: list[str] = field(default_factory=list)
    """Data sets of the same label space, put into the same prompt: accuracy and calibration under shift."""
    ood: list[str] = field(default_factory=list)
    """Data sets of another label space, put into the same prompt: detection. A pattern such as mmlu_* joins several;
    NAME:SPLIT takes another split than test; held_out: the classes that `held_out` leaves out."""
    steps: Count | None = None
    """Steps of one fine-tune. Default: the suite's."""
    batch_size: Rows | None = None
    """Examples in a step. Default: the suite's."""
    learning_rate: Positive | None = None
    """Peak learning rate. Default: the suite's."""
    curve_learning_rate: Positive | None = None
    """Peak learning rate of curves whose `training` names none. Default: that of a fine-tune."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scoring == "lm":
            raise UserError("scoring: a suite compares predictions of classes, found lm; choose another scoring")

    def to_task(self, data: str) -> TaskConfig:
        """The plain task, with its data found."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(TaskConfig)}
        return TaskConfig(**values | {"data": data})


@dataclass(frozen=True)
class SuiteConfig:
    """A benchmark: every method on every task with every seed."""

    model: ModelConfig
    tasks: dict[str, Any]
    """The tasks by name, each with its options (a `SuiteTask`)."""
    methods: dict[str, Any]
    """The methods by the names that tables give them: `method`, its name in the library (default: the same), and its
    options (in Python: the method's dataclass)."""
    profile: str = "default"
    """Shipped or own YAML file of defaults for all that follows: default, blob, laplace_lora, authors."""
    data_folder: str | None = None
    """Folder of data sets; names that are not in it are looked up on the hub."""
    seeds: list[Seed] = field(default_factory=lambda: [0])
    """Seeds of initial draws and data order; the data are the same for all."""
    anchors: Slots = 10
    """Adapters fine-tuned for each task and seed in one pass and shared by the methods; together the deep ensemble that
    deep-ensemble equivalents refer to."""
    samples: Points = 10
    """Forward passes that a prediction may take."""
    lora: LoraOptions = field(default_factory=LoraOptions)
    training: LoopConfig = field(default_factory=LoopConfig)
    train_rows: Amount = 500
    """Training rows that are predicted too, for the diversity on them; 0: none."""
    ood_rows: Count = 1000
    """Rows of each further set at most, drawn by the hash of their ids."""
    references: list[str] = field(default_factory=list)
    """Methods that all others are compared with. Default: ensembles of 5 and of all anchors, where they take part."""
    landscape: LandscapeConfig = field(default_factory=LandscapeConfig)
    """Paths between the anchors of every task and seed, scanned after its cells, and figures along trained curves."""
    commit: str | None = None
    """Commit of the code, recorded with every cell. Default: that of the git checkout the code lies in, which then must
    have no changes; none for an installed package. Any name is taken as it is."""

    def __post_init__(self) -> None:
        check_ranges(self)
        for name in ("tasks", "methods", "seeds"):
            if not getattr(self, name):
                raise UserError(f"{name}: expected at least one, found none")
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds: expected different ones, found {self.seeds}")
        if self.landscape.pairs >= self.anchors:
            found = f"{self.landscape.pairs} of {self.anchors}"
            raise UserError(f"landscape.pairs: expected fewer pairs than anchors, found {found}")
        if (share := self.training.validation_share) not in (None, LoopConfig.validation_share):
            raise UserError(f"training.validation_share: expected none in a suite, found {share}; set evaluate_every")
        slugs = {LANDSCAPE: f"{LANDSCAPE} (the scan of the anchors)"}
        for name in [*self.tasks, *self.methods]:
            if slugs.setdefault(slug(name), name) != name:
                raise UserError(f"names {slugs[slug(name)]!r} and {name!r} are too alike for folders; rename one")
        for name in self.references:
            if name not in self.methods:
                raise UserError(f"references: expected methods of this suite, found {name!r}")

    def training_of(self, task: str, seed: int) -> LoopConfig:
        """One fine-tune on a task; validations look at all rows, for every method alike."""
        own: SuiteTask = self.tasks[task]
        changes = {k: getattr(own, k) for k in ("steps", "batch_size", "learning_rate")}
        changes = {k: v for k, v in changes.items() if v is not None}
        return dataclasses.replace(self.training, seed=seed, validation_share=None, **changes)


def slug(name: str) -> str:
    """A name as part of a path: one part, never `.` or `..`, and of a length that file systems take."""
    return re.sub(r"[^A-Za-z0-9.+=-]+|^\.+", "_", name)[:120] or "_"
