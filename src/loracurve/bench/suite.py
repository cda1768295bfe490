"""What a suite is: model, tasks, seeds, methods, training, sets. YAML is read into it by `bench.suite_files`."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from loracurve.baselines.base import Method
from loracurve.baselines.ensembles import Ensemble
from loracurve.bench.landscapes import LandscapeConfig
from loracurve.config import LoraOptions, ModelConfig
from loracurve.errors import UserError
from loracurve.loop import LoopConfig
from loracurve.tasks import Scoring, TaskConfig

__all__ = [
    "LANDSCAPE",
    "Cell",
    "Executor",
    "SuiteConfig",
    "SuiteTask",
    "cells_of",
    "full_ensemble",
    "method_of",
    "scans_of",
    "slug",
]

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
    NAME:SPLIT takes another split than test."""
    steps: int | None = None
    """Steps of one fine-tune. Default: the suite's."""
    batch_size: int | None = None
    """Examples in a step. Default: the suite's."""
    learning_rate: float | None = None
    """Peak learning rate. Default: the suite's."""

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
    seeds: list[int] = field(default_factory=lambda: [0])
    """Seeds of initial draws and data order; the data are the same for all."""
    anchors: int = 10
    """Adapters fine-tuned for each task and seed in one pass and shared by the methods; together the deep ensemble that
    deep-ensemble equivalents refer to."""
    samples: int = 10
    """Forward passes that a prediction may take."""
    lora: LoraOptions = field(default_factory=LoraOptions)
    training: LoopConfig = field(default_factory=LoopConfig)
    train_rows: int = 500
    """Training rows that are predicted too, for the diversity on them; 0: none."""
    ood_rows: int = 1000
    """Rows of each further set at most, drawn by the hash of their ids."""
    references: list[str] = field(default_factory=list)
    """Methods that all others are compared with. Default: ensembles of 5 and of all anchors, where they take part."""
    landscape: LandscapeConfig = field(default_factory=LandscapeConfig)
    """Paths between the anchors of every task and seed, scanned after its cells, and figures along trained curves."""

    def __post_init__(self) -> None:
        for name in ("tasks", "methods", "seeds"):
            if not getattr(self, name):
                raise UserError(f"{name}: expected at least one, found none")
        if self.anchors < 1 or self.samples < 1:
            raise UserError(f"expected anchors and samples >= 1, found {self.anchors} and {self.samples}")
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds: expected different ones, found {self.seeds}")
        if self.landscape.pairs >= self.anchors:
            found = f"{self.landscape.pairs} of {self.anchors}"
            raise UserError(f"landscape.pairs: expected fewer pairs than anchors, found {found}")
        slugs = {LANDSCAPE: f"{LANDSCAPE} (the scan of the anchors)"}
        for name in [*self.tasks, *self.methods]:
            if slugs.setdefault(slug(name), name) != name:
                raise UserError(f"names {slugs[slug(name)]!r} and {name!r} are too alike for folders; rename one")
        for name in self.references:
            if name not in self.methods:
                raise UserError(f"references: expected methods of this suite, found {name!r}")

    def training_of(self, task: str, seed: int) -> LoopConfig:
        """One fine-tune on a task."""
        own: SuiteTask = self.tasks[task]
        changes = {k: getattr(own, k) for k in ("steps", "batch_size", "learning_rate")}
        return dataclasses.replace(self.training, seed=seed, **{k: v for k, v in changes.items() if v is not None})


@dataclass(frozen=True)
class Cell:
    """One method on one task with one seed."""

    task: str
    seed: int
    method: str

    def folder(self, out: Path) -> Path:
        return out / "cells" / slug(self.task) / str(self.seed) / slug(self.method)

    def __str__(self) -> str:
        return f"{self.task} / seed {self.seed} / {self.method}"


def cells_of(suite: SuiteConfig) -> list[Cell]:
    """All cells, tasks outermost, then seeds."""
    methods = [*suite.methods]
    if full_ensemble(suite) not in methods:
        methods.append(full_ensemble(suite))
    return [Cell(task, seed, method) for task in suite.tasks for seed in suite.seeds for method in methods]


def scans_of(suite: SuiteConfig) -> list[Cell]:
    """The scans of the anchors, one for each task and seed; none where the suite asks for none."""
    return [Cell(t, s, LANDSCAPE) for t in suite.tasks for s in suite.seeds] if suite.landscape.pairs else []


def full_ensemble(suite: SuiteConfig) -> str:
    """Name of the ensemble of all anchors, which every suite has: its members are what others are measured by."""
    whole = Ensemble(suite.anchors)
    return next((n for n, m in suite.methods.items() if m == whole), f"ensemble {suite.anchors}")


def method_of(suite: SuiteConfig, name: str) -> Any:
    """The method of a cell, or what the scan of the anchors is to do."""
    if name == LANDSCAPE:
        return suite.landscape
    found: Method = suite.methods[name] if name in suite.methods else Ensemble(suite.anchors)
    return found


def slug(name: str) -> str:
    """A name as part of a path: one part, never `.` or `..`, and of a length that file systems take."""
    return re.sub(r"[^A-Za-z0-9.+=-]+|^\.+", "_", name)[:120] or "_"
