"""What is fuzzed: a file of each kind in a small world of real ones, how it is changed, and what reads it."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import pandas as pd
import torch
from helpers.made_runs import QUICK, SCAN, base_folder, command, config_file, data_folder
from helpers.served import LIMITS
from helpers.suites import little
from helpers.tiny import tiny
from helpers.tokenizers_made import qwen_style
from PIL import Image

from fuzz import mutations
from fuzz.mutations import Mutation
from loracurve.baselines.single import Single
from loracurve.bench.config import SuiteTask
from loracurve.bench.runner import run_suite
from loracurve.bench.store import read_predictions, record_of
from loracurve.bench.suite import cells_of, load_suite
from loracurve.bench.suite_files import shipped
from loracurve.bench.tables.write import write_tables
from loracurve.curve.files import load_adapter
from loracurve.inference.unknowns import read_unknowns
from loracurve.model.base_model import load_base
from loracurve.model.curve_model import CurveModel
from loracurve.model.states import States
from loracurve.report.page import write_page
from loracurve.runs.calibration import read_calibration
from loracurve.runs.carried import open_average
from loracurve.runs.config import load_config
from loracurve.runs.identity import read_identity
from loracurve.runs.init import config_for
from loracurve.runs.run import open_run
from loracurve.runs.share import share_run
from loracurve.serving.multi_lora_client import ServedCurve
from loracurve.system.errors import UserError
from loracurve.system.files import read_json
from loracurve.system.tensors import read_tensors
from loracurve.tasks.classes import RecordedTask
from loracurve.tasks.config import Columns
from loracurve.tasks.dataset import read_dataset, read_rows
from loracurve.tasks.own_data import rows_from_table
from loracurve.tasks.task import settled_dataset
from loracurve.training.checkpoint import LoopState, checksum, load_checkpoint
from loracurve.training.corruption import unlabelled

__all__ = ["TARGETS", "Target", "make_world", "seen", "shared_world"]


@dataclass(frozen=True)
class Target:
    """One file in a world.

    Attributes: `file` that is changed; `mutation`; `read`, which may raise UserError; `written`, files and folders that
    reading may write; `seconds` that it may take.
    """

    file: Path
    mutation: Mutation
    read: Callable[[], object]
    written: tuple[Path, ...] = ()
    seconds: float = 10
    close: ExitStack = field(default_factory=ExitStack)


def make_world(folder: Path) -> Path:
    """base, data, config.yaml, run (calibrated, scanned), bench, suite.yaml and index.json in one folder."""
    base, data = base_folder(folder / "base", "qwen2"), data_folder(folder / "data", "letter")
    config_file(folder / "config.yaml", base, data, "letter")
    command("fit", folder / "config.yaml", "--out", folder / "run", *QUICK)
    command("calibrate", folder / "run")
    command("scan", folder / "run", *SCAN)
    run_suite(suite_of(folder), folder / "bench", jobs=1, say=lambda _: None)
    shutil.copy(shipped("suites")["smoke"], folder / "suite.yaml")
    points = [{"folder": f"point-{i}", "t": i / 1, "weight": 0.5} for i in (0, 1)]
    (folder / "index.json").write_text(json.dumps(points))
    (folder / "text.txt").write_text("it is what it is\n\nand so on\n")
    (folder / "predict.json").write_text(json.dumps({"rows": [{"question": "it is", "choices": ["a", "b", "c"]}] * 2}))
    (folder / "generate.json").write_text(
        json.dumps({"prompts": ["it is"], "max_new_tokens": 2, "temperature": 0.5, "top_p": 0.9, "seed": 1})
    )
    return folder


@cache
def shared_world() -> Path:
    """One for all tests of a process, to be copied."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return make_world(folder)


def suite_of(world: Path) -> Any:
    return little(world / "sets", tasks={"made": SuiteTask(scoring="label")}, methods={"one": Single()})


def curve(world: Path, name: str, mutation: Mutation) -> Target:
    folder = world / "run" / "curve"

    def read() -> None:
        CurveModel.from_pretrained(folder, tiny("qwen2", vocabulary=len(qwen_style())))

    return Target(folder / name, mutation, read)


def adapter(world: Path, name: str, mutation: Mutation) -> Target:
    folder = world / "run" / "anchors" / "1"

    def read() -> None:
        load_adapter(folder)
        CurveModel.from_adapters(tiny("qwen2", vocabulary=len(qwen_style())), [folder, folder])

    return Target(folder / name, mutation, read)


def rows(world: Path) -> Target:
    file = world / "data" / "test.jsonl"
    return Target(file, mutations.json_lines, lambda: read_rows(file, "multiple_choice", ("A", "B", "C")))


def meta(world: Path) -> Target:
    return Target(world / "data" / "meta.json", mutations.json_text, lambda: read_dataset(world / "data"))


def unlabelled_text(world: Path) -> Target:
    """Inputs without labels, here rows: those of a plain text are lines."""
    opened = open_run(world / "run")
    file = world / "data" / "validation.jsonl"
    return Target(file, mutations.json_lines, lambda: unlabelled(opened.task, file))


def table(world: Path, ending: str, mutation: Mutation) -> Target:
    """A table of people's own rows, and what init makes of it."""
    file = world / f"table.{ending}"
    texts = [f"this is the text number {i}, and it is what it is" for i in range(24)]
    frame = pd.DataFrame({"text": texts, "label": [("yes", "no")[i % 2] for i in range(24)], "n": range(24)})
    if ending == "csv":
        frame.to_csv(file, index=False)
    elif ending == "parquet":
        frame.to_parquet(file)
    else:
        frame.to_json(file, orient="records", lines=True)

    def read() -> None:
        config_for(str(file))
        rows_from_table(file, Columns(text="text", label="label"), labelled=False)

    return Target(file, mutation, read)


def config(world: Path) -> Target:
    file = world / "run" / "config.yaml"
    return Target(file, mutations.yaml_text, lambda: load_config(file))


def suite(world: Path) -> Target:
    file = world / "suite.yaml"
    return Target(file, mutations.yaml_text, lambda: load_suite(file))


def identity(world: Path) -> Target:
    run = world / "run"
    options = load_config(run / "config.yaml")
    base, tokenizer = load_base(str(world / "base"))
    few = read_rows(world / "data" / "test.jsonl", "multiple_choice")[:2]
    dataset, _ = settled_dataset(options.task)

    def read() -> None:
        known = read_identity(run)
        assert known is not None
        known.check_base(base, tokenizer, str(run))
        task = RecordedTask(known.task, options.task, tokenizer, 512, known.data["name"], lambda: dataset)
        task.encode_rows(few)
        known.check_rows(task.dataset, str(run))

    return Target(run / "identity.json", mutations.json_text, read)


def calibration(world: Path) -> Target:
    run = world / "run"
    return Target(run / "calibration.json", mutations.json_text, lambda: read_calibration(run))


def unknowns(world: Path, name: str, mutation: Mutation) -> Target:
    """Read, and used once: tensors that are taken have to fit each other."""
    run = world / "run"

    def read() -> None:
        found = read_unknowns(run)
        assert found is not None
        known = found[0].gaussians
        if known is not None:
            size = known.vectors.shape[1] // (known.classes - 1) - known.bias
            states = States(torch.ones(len(known.values), 2, size))
            known.averaged(torch.zeros(len(known.values), 2, known.classes).log_softmax(-1), states)

    return Target(run / name, mutation, read)


def carried(world: Path) -> Target:
    """Unknowns beside a shared curve, half of them signed."""
    folder = world / "carried"
    share_run(world / "run", folder, base="some/base")

    def read() -> None:
        model, average = open_average(folder, tiny("qwen2", vocabulary=len(qwen_style())))
        if average.coefficients is None:
            model.coefficients(average.t)

    return Target(folder / "unknowns.json", signed_json, read)


def signed_json(content: bytes, draw: Random) -> bytes:
    """Half of the files have the checksum of what they say, as somebody could write them."""
    changed = mutations.json_text(content, draw)
    try:
        values = json.loads(changed)
        if draw.randrange(2) and isinstance(values, dict):
            changed = mutations.json_bytes({**values, "sha256": checksum(values)})
    except ValueError:
        pass
    return changed


def checkpoint(world: Path, tensors: bool = False) -> Target:
    folder = world / "run" / "training"
    file = folder / str(read_json(folder / "checkpoint.json")["tensors"])
    whole = {n: p for n, p in read_tensors(file).items() if n.endswith(".point")}
    factors = [torch.zeros_like(whole[f"{i}.point"]).requires_grad_() for i in range(len(whole))]

    def read() -> None:
        state = LoopState(0, [p.detach().clone() for p in factors], [0.0], [0], [0], [])
        if tensors:  # as somebody could write it who knows how
            values = read_json(folder / "checkpoint.json")
            values["tensors_sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
            (folder / "checkpoint.json").write_text(json.dumps(values | {"sha256": checksum(values)}))
        load_checkpoint(folder, factors, torch.optim.AdamW(factors), state)

    if tensors:
        return Target(file, mutations.tensors, read, (folder / "checkpoint.json",))
    return Target(folder / "checkpoint.json", signed_json, read)


def cell(world: Path) -> Target:
    options = suite_of(world)
    first, out = cells_of(options)[0], world / "bench"

    def read() -> None:
        if record_of(options, first, out) is not None:
            write_tables(options, out)

    written = (out / "tables", out / "tables.md", out / "metrics.parquet", out / "figures")
    return Target(first.folder(out) / "cell.json", mutations.json_text, read, written, 20)


def predictions(world: Path) -> Target:
    file = next((world / "bench").rglob("predictions.parquet"))
    return Target(file, mutations.parquet, lambda: read_predictions(file))


def index(world: Path) -> Target:
    file = world / "index.json"
    return Target(file, mutations.json_text, lambda: ServedCurve("http://localhost:1", file))


def report(world: Path, name: str, mutation: Mutation = mutations.json_text) -> Target:
    """The page with its figures laid out, but not drawn, which takes most of the time and looks at no file."""
    out = world / "page"
    if not name.startswith("scan"):
        shutil.rmtree(world / "run" / "scan")

    def read() -> None:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        with patch("matplotlib.figure.Figure.savefig", lambda self, to, **_: Image.new("RGB", (1, 1)).save(to, "png")):
            write_page([world / "run"], out / "page.html")

    return Target(world / "run" / name, mutation, read, (out,), 20)


def share(world: Path, name: str) -> Target:
    out = world / "shared"

    def read() -> None:
        shutil.rmtree(out, ignore_errors=True)
        share_run(world / "run", out, base="some/base")

    return Target(world / "run" / name, mutations.json_text, read, (out,))


def request(world: Path, name: str) -> Target:
    """The body of a request; an answer is JSON, and no fault of the server."""
    from fastapi.testclient import TestClient

    from loracurve.serving.app import make_app

    stack, file = ExitStack(), world / f"{name}.json"
    client = stack.enter_context(TestClient(make_app(open_run(world / "run"), LIMITS), base_url="http://127.0.0.1"))

    def read() -> None:
        answer = client.post(f"/{name}", content=file.read_bytes(), headers={"content-type": "application/json"})
        assert answer.status_code in (200, 400, 413, 422), answer.text
        if answer.status_code != 200:
            raise UserError(answer.json()["error"])

    return Target(file, mutations.json_text, read, (), 10, stack)


TARGETS: dict[str, Callable[[Path], Target]] = {
    "curve_config": partial(curve, name="curve_config.json", mutation=mutations.json_text),
    "curve_tensors": partial(curve, name="control_points.safetensors", mutation=mutations.tensors),
    "adapter_config": partial(adapter, name="adapter_config.json", mutation=mutations.json_text),
    "adapter_tensors": partial(adapter, name="adapter_model.safetensors", mutation=mutations.tensors),
    "rows": rows,
    "meta": meta,
    "unlabelled": unlabelled_text,
    "table_csv": partial(table, ending="csv", mutation=mutations.csv_text),
    "table_json": partial(table, ending="jsonl", mutation=mutations.json_lines),
    "table_parquet": partial(table, ending="parquet", mutation=mutations.parquet),
    "config": config,
    "suite": suite,
    "identity": identity,
    "calibration": calibration,
    "unknowns": partial(unknowns, name="unknowns.json", mutation=mutations.json_text),
    "unknowns_tensors": partial(unknowns, name="unknowns.safetensors", mutation=mutations.tensors),
    "carried": carried,
    "checkpoint": checkpoint,
    "checkpoint_tensors": partial(checkpoint, tensors=True),
    "cell": cell,
    "predictions": predictions,
    "index": index,
    "share_metrics": partial(share, name="metrics.json"),
    "share_unknowns": partial(share, name="unknowns.json"),
    "share_environment": partial(share, name="environment.json"),
    "report_metrics": partial(report, name="metrics.json"),
    "report_scan": partial(report, name="scan/scan.json"),
    "report_predictions": partial(report, name="predictions.parquet", mutation=mutations.parquet),
    "request_predict": partial(request, name="predict"),
    "request_generate": partial(request, name="generate"),
}


def seen(world: Path, target: Target) -> dict[str, tuple[int, int]]:
    """Size and time of every file in a world, but for those that are changed here or that reading may write."""
    found = {}
    for folder, _, names in os.walk(world):
        for path in (Path(folder) / name for name in names):
            if path != target.file and not any(path.is_relative_to(own) for own in target.written):
                about = path.lstat()
                found[str(path)] = (about.st_size, about.st_mtime_ns)
    return found
