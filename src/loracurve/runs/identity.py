"""What a run is, written into its folder before it is trained: what is opened later is compared with it, not trusted.

identity.json holds the task (classes by name, prompt, answers), the base and its tokenizer as numbers and hashes, the
rows that were trained on as hashes, and versions.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from loracurve.model.fingerprint import (
    base_fingerprint,
    check_fingerprint,
    compare_fingerprint,
    compare_tokenizers,
    tokenizer_fingerprint,
)
from loracurve.runs.config import RunConfig
from loracurve.system.environment import environment
from loracurve.system.errors import UserError, one_line
from loracurve.system.files import read_json, write_json
from loracurve.system.paths import exists
from loracurve.tasks.classes import TaskIdentity, rows_hash
from loracurve.tasks.config import Columns
from loracurve.tasks.dataset import Dataset
from loracurve.tasks.task import Task

__all__ = ["IDENTITY", "Identity", "identity_of", "read_identity", "write_identity"]


logger = logging.getLogger("loracurve")

IDENTITY = "identity.json"

FORMAT = 1


@dataclass(frozen=True)
class Identity:
    """What a run is: `task`; fingerprints of `base` and `tokenizer` (`model.fingerprint`); `data`: name, place, sizes
    and hashes of the rows that it was trained on, and the columns of their table; `made_with`: seed and versions of
    packages."""

    task: TaskIdentity
    base: dict[str, Any]
    tokenizer: dict[str, Any]
    data: dict[str, Any]
    made_with: dict[str, Any]

    def columns(self, asked: Columns) -> Columns:
        """Which column of a table is what, as the fit found it; as asked for where it was no table or before this was
        recorded."""
        known = self.data.get("columns")
        return Columns(**known) if known else asked

    def revision(self, name: str) -> str | None:
        """The commit on the hub that a base of this name had at the fit; None for folders and other names."""
        found = self.base.get("revision")
        return found if isinstance(found, str) and name == self.base["name"] and not os.path.exists(name) else None

    def check_base(self, base: nn.Module, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
        """Raise UserError, which `where` (the run) begins, for another base or tokenizer than the run was made with."""
        name = getattr(base, "name_or_path", "") or "the base"
        if difference := compare_fingerprint(self.base, base):
            raise UserError(
                f"{where}: expected the base that it was made with, found another in {name}: {difference}; give the "
                "right one with --base"
            )
        if difference := compare_tokenizers(self.tokenizer, tokenizer):
            raise UserError(
                f"{where}: expected the tokenizer that it was made with, found another in {name}: {difference}; give "
                "the right base with --base"
            )

    def check_same(self, now: Identity, base: nn.Module, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
        """Raise UserError where a run that goes on finds another base, tokenizer, prompt or rows than it began with."""
        self.check_base(base, tokenizer, where)
        for what, mine, found in (
            ("prompt and classes", self.task, now.task),
            ("rows", self.data["hashes"], now.data["hashes"]),
        ):
            if mine != found:
                raise UserError(
                    f"{where}: expected the {what} that the run began with, found others; put the data in "
                    f"{now.data['place']} back, or begin anew in another --out"
                )

    def check_rows(self, dataset: Dataset, where: str) -> None:
        """Warn where the run's data hold other rows than it was trained on."""
        changed = [s for s, known in self.data["hashes"].items() if known != _hashes(dataset, (s,)).get(s)]
        if changed:
            logger.warning(
                "%s: the %s rows of %s are not those that it was trained on", where, " and ".join(changed), dataset.name
            )


def identity_of(
    config: RunConfig, base: nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, brought: Collection[str] = ()
) -> Identity:
    """The identity of a run about to be trained, or of a curve: then the names of the base's weights that it brought
    along are given, and it may be in the base already."""
    place = Path(config.task.data)
    data = {
        "name": task.dataset.name,
        "place": str(place.resolve()) if exists(place) else config.task.data,
        "columns": dict(task.dataset.columns),
        "sizes": {split: len(rows) for split, rows in task.dataset.splits.items()},
        "hashes": _hashes(task.dataset, ("train", "validation")),
    }
    recorded = TaskIdentity.of(task, task.encode("train").answer_ids)
    made_with = {"seed": config.curve_training.seed, "packages": environment()["packages"]}
    return Identity(recorded, base_fingerprint(base, brought), tokenizer_fingerprint(tokenizer), data, made_with)


def _hashes(dataset: Dataset, splits: Sequence[str]) -> dict[str, str]:
    return {split: rows_hash(dataset, split) for split in splits if split in dataset.splits}


def write_identity(identity: Identity, folder: Path) -> None:
    """Write identity.json into a run folder, atomically."""
    parts = {name: getattr(identity, name) for name in ("base", "tokenizer", "data", "made_with")}
    write_json(folder / IDENTITY, {"format": FORMAT, "task": identity.task.record(), **parts})


def read_identity(folder: Path) -> Identity | None:
    """What `write_identity` wrote; None in runs that were made before there was one.

    Raises:
        UserError: a newer format, or something else.
    """
    path = folder / IDENTITY
    if not exists(path):
        return None
    values = read_json(path)
    version = values.get("format") if isinstance(values, dict) else None
    if type(version) is int and version > FORMAT:
        raise UserError(
            f"{path}: expected format {FORMAT}, found {version}; a newer version of loracurve wrote it: "
            "pip install -U loracurve"
        )
    try:
        if version != FORMAT:
            raise ValueError(f"format {version!r}")
        identity = Identity(TaskIdentity.read(values["task"]), *(values[n] for n in _PARTS))
        for part, keys in _PARTS.items():
            if missing := set(keys) - values[part].keys():
                raise KeyError(f"{part}.{sorted(missing)[0]}")
        names = identity.data["name"], identity.data["place"], *identity.data["hashes"].values()
        if not all(isinstance(name, str) for name in (*names, *identity.data.get("columns", {}).values())):
            raise TypeError("data")
        identity.columns(Columns())
        check_fingerprint(identity.base)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = one_line(repr(error) if isinstance(error, KeyError) else error, 200)
        raise UserError(f"{path}: expected what loracurve fit wrote, found something else ({reason})") from error
    return identity


_PARTS = {
    "base": ("name", "config", "weights"),
    "tokenizer": ("vocabulary", "merges", "special", "texts"),
    "data": ("name", "place", "sizes", "hashes"),
    "made_with": ("packages",),
}
