"""The tables' data sets through ``datasets.load_dataset``, converted to the same rows as local folders.

Test sets without public labels are never used: `test` is then the official validation split, and validation rows are
split off train by the task. Each entry's note says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracurve.system.errors import UserError, nearest
from loracurve.system.paths import is_folder
from loracurve.tasks.dataset import Dataset, Kind, Row, parse_row

__all__ = ["HUB", "HubEntry", "load_from_hub"]


Record = Mapping[str, Any]


@dataclass(frozen=True)
class HubEntry:
    """Where a data set lies on the hub and how its records become rows.

    `splits` maps our split names to the hub's; `convert` gives the fields of a local JSONL row.
    """

    repository: str
    config: str | None
    kind: Kind
    labels: tuple[str, ...]
    splits: Mapping[str, str]
    convert: Callable[[Record], dict[str, Any]]
    note: str = ""


def _winogrande(record: Record) -> dict[str, Any]:
    return {
        "question": record["sentence"],
        "choices": [record["option1"], record["option2"]],
        "label": {"1": 0, "2": 1}.get(str(record["answer"])),
    }


def _answer_key(record: Record, question: str) -> dict[str, Any]:
    # Keys are letters in most rows and digits in some: the row's own list of keys decides, not the alphabet.
    keys, key = list(record["choices"]["label"]), record["answerKey"]
    label = keys.index(key) if key in keys else None
    return {"question": record[question], "choices": list(record["choices"]["text"]), "label": label}


def _arc(record: Record) -> dict[str, Any]:
    return _answer_key(record, "question")


def _openbookqa(record: Record) -> dict[str, Any]:
    return _answer_key(record, "question_stem")


def _boolq(record: Record) -> dict[str, Any]:
    # labels are ("no", "yes"): answer True is index 1.
    answer = record["answer"]
    return {
        "question": record["question"],
        "context": record["passage"],
        "choices": ["no", "yes"],
        "label": None if answer is None else int(answer),
    }


def _mmlu(record: Record) -> dict[str, Any]:
    return {"question": record["question"], "choices": list(record["choices"]), "label": _known(record["answer"])}


def _known(label: int | None) -> int | None:
    """The hub writes -1 for a label that is not public."""
    return None if label is None or label < 0 else int(label)


def _single(field: str) -> Callable[[Record], dict[str, Any]]:
    return lambda record: {"text": record[field], "label": _known(record["label"])}


def _pair(record: Record) -> dict[str, Any]:
    return {"text": record["sentence1"], "text2": record["sentence2"], "label": _known(record["label"])}


_ALL = {"train": "train", "validation": "validation", "test": "test"}

_NO_TEST_LABELS = {"train": "train", "test": "validation"}

_NO_TEST_NOTE = "test = the official validation split (the official test has no public labels); validation from train."

_LETTERS = ("A", "B", "C", "D", "E")

_SENTIMENT = ("negative", "positive")

_GLUE = "nyu-mll/glue"

_SUBJECTS = """
    abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry
    college_computer_science college_mathematics college_medicine college_physics computer_security conceptual_physics
    econometrics electrical_engineering elementary_mathematics formal_logic global_facts high_school_biology
    high_school_chemistry high_school_computer_science high_school_european_history high_school_geography
    high_school_government_and_politics high_school_macroeconomics high_school_mathematics high_school_microeconomics
    high_school_physics high_school_psychology high_school_statistics high_school_us_history high_school_world_history
    human_aging human_sexuality international_law jurisprudence logical_fallacies machine_learning management marketing
    medical_genetics miscellaneous moral_disputes moral_scenarios nutrition philosophy prehistory
    professional_accounting professional_law professional_medicine professional_psychology public_relations
    security_studies sociology us_foreign_policy virology world_religions
"""

MMLU_SUBJECTS = tuple(_SUBJECTS.split())

HUB: dict[str, HubEntry] = {
    **{
        f"winogrande_{size}": HubEntry(
            "allenai/winogrande",
            f"winogrande_{size}",
            "multiple_choice",
            ("option1", "option2"),
            _NO_TEST_LABELS,
            _winogrande,
            _NO_TEST_NOTE,
        )
        for size in ("s", "m")
    },
    "arc_challenge": HubEntry("allenai/ai2_arc", "ARC-Challenge", "multiple_choice", _LETTERS, _ALL, _arc),
    "arc_easy": HubEntry("allenai/ai2_arc", "ARC-Easy", "multiple_choice", _LETTERS, _ALL, _arc),
    "openbookqa": HubEntry("allenai/openbookqa", "main", "multiple_choice", _LETTERS[:4], _ALL, _openbookqa),
    "boolq": HubEntry("google/boolq", None, "multiple_choice", ("no", "yes"), _NO_TEST_LABELS, _boolq, _NO_TEST_NOTE),
    "sst2": HubEntry(
        "stanfordnlp/sst2",
        None,
        "classification",
        _SENTIMENT,
        _NO_TEST_LABELS,
        _single("sentence"),
        _NO_TEST_NOTE + " train has phrases as well as sentences.",
    ),
    "ag_news": HubEntry(
        "fancyzhx/ag_news",
        None,
        "classification",
        ("World", "Sports", "Business", "Sci/Tech"),
        {"train": "train", "test": "test"},
        _single("text"),
        "The official data have no validation split; validation from train.",
    ),
    "mrpc": HubEntry(_GLUE, "mrpc", "classification", ("not_equivalent", "equivalent"), _ALL, _pair),
    "rte": HubEntry(
        _GLUE, "rte", "classification", ("entailment", "not_entailment"), _NO_TEST_LABELS, _pair, _NO_TEST_NOTE
    ),
    "cola": HubEntry(
        _GLUE,
        "cola",
        "classification",
        ("unacceptable", "acceptable"),
        _NO_TEST_LABELS,
        _single("sentence"),
        _NO_TEST_NOTE,
    ),
    **{
        f"mmlu_{subject}": HubEntry(
            "cais/mmlu",
            subject,
            "multiple_choice",
            _LETTERS[:4],
            {"train": "dev", "validation": "validation", "test": "test"},
            _mmlu,
            "train = the 5 official few-shot examples ('dev'), not meant for training.",
        )
        for subject in MMLU_SUBJECTS
    },
}


def load_from_hub(name: str, path: str | Path | None = None, cache_dir: str | Path | None = None) -> Dataset:
    """Load a data set of `HUB` with ``datasets``.

    `path` is a local folder with the hub's files in place of the repository (a clone, or one file for each split);
    nothing is downloaded then. `cache_dir` is where ``datasets`` keeps its Arrow files (default: its own).

    Raises UserError for an unknown name, an unreachable repository, missing splits or rows without a label.
    """
    if name not in HUB:
        raise UserError(f"expected a data folder or a hub data set, found {name!r}{nearest(name, HUB)}")
    entry = HUB[name]
    raw = _load(entry, path, cache_dir)
    splits: dict[str, list[Row]] = {}
    for split, source in entry.splits.items():
        if source not in raw:
            raise UserError(f"{path or entry.repository}: expected a split {source!r}, found {', '.join(raw)}")
        splits[split] = []
        places: dict[str, int] = {}
        for index, record in enumerate(raw[source]):
            where = f"{path or entry.repository} ({name}), split {source}, row {index}"
            try:
                fields = entry.convert(record)
            except (KeyError, TypeError) as error:
                raise UserError(f"{where}: not in the hub's format, {type(error).__name__}: {error}") from None
            # idx and row numbers start anew in each split, so the split is part of the id.
            fields["id"] = str(record.get("id") or f"{source}-{record.get('idx', index)}")
            row = parse_row(fields, entry.kind, entry.labels, where)
            if places.setdefault(row.id, index) != index:
                raise UserError(f"{where}: id {row.id!r} was used by row {places[row.id]} already")
            splits[split].append(row)
        if not splits[split]:
            raise UserError(f"{path or entry.repository}: split {source!r} is empty")
    place = f"hub:{entry.repository}" if path is None else f"local copy of hub:{entry.repository}"
    place += f" ({entry.config})" if entry.config else ""
    return Dataset(name, entry.kind, entry.labels, splits, entry.note, place)


def _load(entry: HubEntry, path: str | Path | None, cache_dir: str | Path | None) -> Any:
    # Imported here: it takes a second, and local data don't need it.
    import datasets

    if path is not None and not is_folder(path):
        raise UserError(f"expected a local folder in place of {entry.repository}, found no folder {path}")
    where = entry.repository if path is None else str(path)
    options: dict[str, Any] = {"cache_dir": None if cache_dir is None else str(cache_dir)}
    try:
        if path is None or (entry.config is not None and entry.config in datasets.get_dataset_config_names(where)):
            return datasets.load_dataset(where, entry.config, **options)
        # A folder whose README.md names no configurations. The split names are given, for `datasets` would guess them
        # from the files' names and put "dev" and "validation" into one.
        files = {source: f"**/{source}*" for source in entry.splits.values()}
        return datasets.load_dataset(where, data_files=files, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"cannot load {where}: {reason}; check the connection, or give a local data folder") from error
