"""Files that are damaged or mean harm: read or refused in one line, within time and memory."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from fuzz.limits import in_time, little_memory, read_or_refused
from fuzz.mutations import mutated, spoiled
from fuzz.targets import TARGETS, shared_world
from helpers.kills import ended, forked
from helpers.made_runs import command, tree_hash
from helpers.suites import little
from helpers.tiny import tiny
from helpers.tokenizers_made import qwen_style
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save_file

from loracurve.baselines.single import Single
from loracurve.bench.config import SuiteTask, slug
from loracurve.bench.runner import run_suite
from loracurve.bench.store import read_predictions
from loracurve.bench.suite import load_suite
from loracurve.cli import main
from loracurve.curve.files import load_adapter, load_curve
from loracurve.model.base_model import load_base
from loracurve.model.config import ModelConfig
from loracurve.model.curve_model import CurveModel
from loracurve.runs.config import load_config
from loracurve.runs.identity import IDENTITY, read_identity
from loracurve.runs.run import open_run
from loracurve.system import consent
from loracurve.system.errors import UserError
from loracurve.system.files import read_json
from loracurve.system.tables import read_table
from loracurve.system.tensors import read_tensors
from loracurve.tasks.classes import RecordedTask
from loracurve.tasks.dataset import read_dataset, read_rows
from loracurve.tasks.task import settled_dataset
from loracurve.training.checkpoint import checksum

FUZZ = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
DRAWS = st.randoms(use_true_random=False)


@pytest.fixture(autouse=True)
def within_limits() -> Iterator[None]:
    with little_memory():
        yield


@pytest.fixture(scope="module")
def made() -> Path:
    return shared_world()


@pytest.fixture
def world(made: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(made, tmp_path / "world"))


def curve_model(folder: Path) -> CurveModel:
    return CurveModel.from_pretrained(folder, tiny("qwen2", vocabulary=len(qwen_style())))


def test_curve_configs(world: Path) -> None:
    folder = world / "run" / "curve"
    file = folder / "curve_config.json"
    original = json.loads(file.read_text())
    assert read_or_refused(lambda: curve_model(folder)) is None
    outcomes = set()

    @settings(FUZZ, max_examples=40)
    @given(DRAWS)
    def check(draw: random.Random) -> None:
        value = mutated(original, draw)
        file.write_text(json.dumps(value))
        outcomes.add(read_or_refused(lambda: curve_model(folder)) is None)

    check()
    assert outcomes == {True, False}, "some changes matter and some do not"
    for changes in ({"segments": 10**9}, {"degree": 10**9}, {"segments": 2.5}, {"segments": -1}):
        file.write_text(json.dumps(original | {"curve": original["curve"] | changes, "trainable": []}))
        assert "control points" in str(read_or_refused(lambda: load_curve(folder)))


def test_identities(world: Path) -> None:
    run = world / "run"
    file, config = run / IDENTITY, load_config(run / "config.yaml")
    original = json.loads(file.read_text())
    base, tokenizer = load_base(str(world / "base"))
    rows = read_rows(world / "data" / "test.jsonl", "multiple_choice")[:2]

    def load() -> None:
        identity = read_identity(run)
        assert identity is not None
        identity.check_base(base, tokenizer, str(run))
        task = RecordedTask(identity.task, config.task, tokenizer, 512, identity.data["name"], lambda: dataset)
        task.encode_rows(rows)
        identity.check_rows(task.dataset, str(run))

    dataset, _ = settled_dataset(config.task)
    assert read_or_refused(load) is None
    outcomes = set()

    @FUZZ
    @given(DRAWS)
    def check(draw: random.Random) -> None:
        value = mutated(original, draw)
        file.write_text(json.dumps(value))
        outcomes.add(read_or_refused(load) is None)

    check()
    assert outcomes == {True, False}, "some changes matter and some do not"
    for part, changes in [("task", {"window": 1}), ("task", {"kind": "x"}), ("base", {"weights": {"a": {}}})]:
        file.write_text(json.dumps(original | {part: original[part] | changes}))
        assert read_or_refused(load), changes


def test_adapter_configs(world: Path) -> None:
    folders = [world / "run" / "anchors" / str(m) for m in (0, 1)]
    file = folders[1] / "adapter_config.json"
    original = json.loads(file.read_text())

    def load() -> None:
        load_adapter(folders[1])
        CurveModel.from_adapters(tiny("qwen2", vocabulary=len(qwen_style())), [folders[1], folders[1]])

    assert read_or_refused(load) is None

    @FUZZ
    @given(DRAWS)
    def check(draw: random.Random) -> None:
        value = mutated(original, draw)
        file.write_text(json.dumps(value))
        read_or_refused(load)

    check()
    for changes in ({"r": 10**9}, {"r": True}, {"lora_alpha": 1e999}, {"peft_type": "../x"}, {"target_modules": ["("]}):
        file.write_text(json.dumps(original | changes))
        assert read_or_refused(load), changes
    file.write_text(json.dumps(original | {"target_modules": r"((\w+\.?)+)+!"}))
    assert "regular expression" in str(read_or_refused(load)), "this one would be matched for ever"
    for pattern in (r".*\.(q_proj|v_proj)", r"model\.layers\.[0-9]+\..*(q|k)_proj$"):
        file.write_text(json.dumps(original | {"target_modules": pattern}))
        assert "regular expression" not in str(read_or_refused(load))


def header(**tensors: Any) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


def test_tensor_files(world: Path) -> None:
    folder = world / "run" / "curve"
    file = folder / "control_points.safetensors"
    content = file.read_bytes()
    tensors = load(content)  # copies: the file is not mapped while it is spoiled
    draw = random.Random(0)
    for _ in range(150):
        file.write_bytes(spoiled(content, draw))
        read_or_refused(lambda: curve_model(folder) if draw.random() < 0.1 else load_curve(folder))
    huge = {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}
    for bad in (
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 90 * 2**20) + b"{" * 100,
        header(a=huge) + b"\0" * 8,
        header(a=huge | {"shape": [2**62], "data_offsets": [0, 2**64 - 1]}),
        header(a=huge | {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}) + b"\0",
        header(a=huge | {"dtype": "X", "shape": [2]}) + b"\0" * 8,
        b"",
    ):
        file.write_bytes(bad)
        assert read_or_refused(lambda: load_curve(folder))
        read_or_refused(lambda: read_tensors(file))
    name = min(tensors)
    for wrong in (tensors[name].long(), tensors[name].bool(), tensors[name] * torch.nan, tensors[name] / 0):
        save_file(tensors | {name: wrong}, file)
        assert f"finite floating-point numbers, found others in {name}" in str(
            read_or_refused(lambda: load_curve(folder))
        )
    file.unlink()
    file.mkdir()
    assert read_or_refused(lambda: load_curve(folder))


def test_rows_and_their_description(world: Path) -> None:
    file, meta = world / "data" / "test.jsonl", world / "data" / "meta.json"
    lines = file.read_text().splitlines()
    about = json.loads(meta.read_text())

    @FUZZ
    @given(DRAWS)
    def check_row(draw: random.Random) -> None:
        value = mutated(json.loads(lines[3]), draw)
        file.write_text(
            "\n".join([*lines[:3], json.dumps(value), *lines[4:]]), encoding="utf-8", errors="surrogatepass"
        )
        read_or_refused(lambda: read_rows(file, "multiple_choice", ("A", "B", "C")))

    check_row()
    draw = random.Random(1)
    for _ in range(100):
        file.write_bytes(spoiled("\n".join(lines).encode(), draw))
        read_or_refused(lambda: read_rows(file, "multiple_choice", ("A", "B", "C")))
    for bad in (
        "[" * 100_000,
        '{"a":' * 100_000,
        "9" * 10_000,
        '{"id": ' + "9" * 10_000 + "}",
        "x" * (2**24 + 1),
        "\0" * 99,
    ):
        file.write_text(bad)
        assert "line 1: " in str(read_or_refused(lambda: read_rows(file, "multiple_choice")))
    file.write_text("\n".join(lines))

    @FUZZ
    @given(DRAWS)
    def check_meta(draw: random.Random) -> None:
        value = mutated(about, draw)
        meta.write_text(json.dumps(value))
        read_or_refused(lambda: read_dataset(world / "data"))

    check_meta()


def test_configs(world: Path, tmp_path: Path) -> None:
    file = world / "run" / "config.yaml"
    original = yaml.safe_load(file.read_text())

    @settings(FUZZ, max_examples=25)
    @given(DRAWS)
    def check(draw: random.Random) -> None:
        value = mutated(original, draw)
        file.write_text(json.dumps(value))
        read_or_refused(lambda: load_config(file))

    check()
    draw = random.Random(2)
    content = yaml.safe_dump(original).encode()
    for _ in range(15):
        file.write_bytes(spoiled(content, draw))
        read_or_refused(lambda: load_config(file))


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS,
        LAUGHS + "task: {data: *a11}\n",
        "a: &a [*a]\n",
        "a: &a {b: *a}\n",
        "model: " + "[" * 5000,
        "model: " + "{a: " * 5000,
        "[" * 10 + "]" * 10,
        "- " * 5000 + "x",
        "model: !!python/object/apply:os.system ['touch MARK']\n",
        "!!python/object/new:subprocess.Popen [[touch, MARK]]\n",
        "model: !!python/name:os.system\n",
        "lora: {r: " + "9" * 10_000 + "}",
        "curve: {anchors: 999999999}",
        "curve: {kind: free, segments: 999999999}",
        "curve: {degree: 999999999}",
        "evaluation: {points: 99999999999}",
        "curve_training: {batch_size: 99999999999999999999}",
        "curve_training: {seed: 1" + "0" * 40 + "}",
        "lora: {lora_alpha: .nan}\ncurve: {degree: .inf}",
        "x" * (2**20 + 1),
        "? [a, b]\n: c\n",
        "\0",
        "%YAML 9.9\n---\na: b",
        "a: b\n---\nc: d",
    ],
    ids=lambda text: text[:20].strip(),
)
def test_yaml_that_means_harm(text: str, made: Path, tmp_path: Path) -> None:
    mark, file = tmp_path / "MARK", tmp_path / "config.yaml"
    needed = f"model: {{name: {made / 'base'}}}\ntask: {{data: {made / 'data'}, scoring: letter}}\n"
    file.write_text(text.replace("MARK", str(mark)) if "model" in text or text[0] in "![%\0?-x" else needed + text)
    for read in (lambda: load_config(file), lambda: load_suite(file)):
        assert read_or_refused(read)
    if "MARK" in text or text == LAUGHS:
        assert main(["fit", str(file), "--out", str(tmp_path / "out")]) == 2
    assert not mark.exists() and not (tmp_path / "out").exists()


def test_reasonable_aliases_stay(made: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        f"model: {{name: {made / 'base'}}}\ntask: {{data: {made / 'data'}, scoring: letter}}\n"
        "anchor_training: &steps {steps: 7}\ncurve_training: *steps\n"
    )
    config = load_config(file)
    assert (config.anchor_training.steps, config.curve_training.steps) == (7, 7)


@pytest.mark.parametrize("what", ["calibration", "index", "checkpoint", "cell"])
def test_json_files(what: str, world: Path) -> None:
    target = TARGETS[what](world)
    file, read = target.file, target.read
    text = file.read_text()
    assert read_or_refused(read) is None
    outside = tree_hash(world / "base")

    @settings(FUZZ, max_examples=20 if what == "cell" else 100)
    @given(DRAWS)
    def check(draw: random.Random) -> None:
        value = mutated(json.loads(text), draw)
        file.write_text(json.dumps(value))
        read_or_refused(read)

    check()
    draw = random.Random(3)
    for _ in range(10 if what == "cell" else 60):
        file.write_bytes(spoiled(text.encode(), draw))
        read_or_refused(read)
    for bad in (
        "[" * 200_000,
        "9" * 10_000,
        '{"step": NaN}',
        "\ud800".encode("utf-8", "surrogatepass"),
        b"\xff",
        b"null",
    ):
        file.write_bytes(bad if isinstance(bad, bytes) else bad.encode())
        assert read_or_refused(read)
    with file.open("wb") as sparse:
        sparse.truncate(2**29)
    assert "at most 256 MiB" in str(read_or_refused(read))
    assert tree_hash(world / "base") == outside


def test_checkpoints_read_nothing_outside_their_folder(world: Path) -> None:
    target = TARGETS["checkpoint"](world)
    values = json.loads(target.file.read_text())
    shutil.copy(target.file.parent / values["tensors"], world / values["tensors"])
    for name in (f"../../{values['tensors']}", str(world / values["tensors"]), "", ".", 7):
        other = values | {"tensors": name}
        target.file.write_text(json.dumps(other | {"sha256": checksum(other)}))
        assert f"with tensors {name!r}" in str(read_or_refused(target.read))


def test_tables(world: Path) -> None:
    file = next((world / "bench").rglob("predictions.parquet"))
    content = file.read_bytes()
    draw = random.Random(4)
    for _ in range(150):
        file.write_bytes(spoiled(content, draw))
        read_or_refused(lambda: read_predictions(file))
    table = pq.read_table(pa.BufferReader(content))
    about = json.loads(table.schema.metadata[b"loracurve"])
    for changes in ({"points": 10**9}, {"classes": -1}, {"weights": "x"}, {"weights": [2.0] * 50}, {"points": None}):
        pq.write_table(table.replace_schema_metadata({"loracurve": json.dumps(about | changes)}), file)
        assert "not readable as predictions" in str(read_or_refused(lambda: read_predictions(file))), changes
    # A table of 400 MB in a few kB.
    pq.write_table(pa.table({"x": pa.array(bytes(50_000_000)[:0] or [0] * 1_000_000).cast(pa.int64())}), file)
    assert "do not fit into" in str(read_or_refused(lambda: read_table(file)))


@pytest.mark.parametrize("name", ["metrics.json", "environment.json", "config.yaml", "predictions.parquet"])
def test_reports_of_spoiled_runs(name: str, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(world / "run" / "scan")  # whose figures take long
    file = world / "run" / name
    content, draw = file.read_bytes(), random.Random(5)
    bad = [b"[]", b"{}", spoiled(content, draw)]
    if name == "metrics.json":
        values = json.loads(content)
        bad = [json.dumps(values | c).encode() for c in ({"methods": 3}, {"task": []})]
    for i, text in enumerate(bad):
        file.write_bytes(text)
        with in_time(30):
            code = main(["report", str(world / "run"), "--out", str(world / f"{i}.html")])
        said = capsys.readouterr().err
        assert code == 0 or (code == 2 and said.count("\n") == 1 and said.startswith("loracurve: ")), said


def test_names_of_tasks_and_methods_stay_inside_the_suite(tmp_path: Path) -> None:
    for name in ("..", ".", "../../x", "/etc/passwd", "a/../../b", "...", "", "\0", "x" * 5000):
        part = slug(name)
        assert part not in ("", ".", "..") and "/" not in part and "\0" not in part and len(part) < 200
    assert slug("anchored, flat and JSD") == "anchored_flat_and_JSD" and slug("mmlu.v2") == "mmlu.v2"
    made = {"made": SuiteTask(scoring="label")}
    suite = little(tmp_path / "sets", tasks=made, methods={"../../../up": Single(), "..": Single(keep="last")})
    before = tree_hash(tmp_path / "sets")
    run_suite(suite, tmp_path / "out", jobs=1, say=lambda _: None)
    assert {p.name for p in tmp_path.iterdir()} == {"sets", "out"} and tree_hash(tmp_path / "sets") == before
    assert len(list((tmp_path / "out" / "cells").rglob("cell.json"))) == 3


def test_rows_name_no_files(world: Path) -> None:
    file, out = world / "rows.jsonl", world / "out.jsonl"
    rows = [json.loads(line) for line in (world / "data" / "test.jsonl").read_text().splitlines()[:3]]
    for row, name in zip(rows, ("../../../x", "/etc/passwd", "\x1b[2J<script>"), strict=True):
        row["id"] = name
    file.write_text("\n".join(map(json.dumps, rows)))
    before = {p for p in world.parent.rglob("*")}
    command("predict", world / "run", file, "--out", out)
    assert {p for p in world.parent.rglob("*")} - before == {out}
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == [row["id"] for row in rows]


def test_code_of_a_model_runs_only_when_asked(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark = tmp_path / "MARK"
    folder = Path(shutil.copytree(made / "base", tmp_path / "base"))
    (folder / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(mark)!r}).touch()\nfrom transformers import Qwen2Config as C\n"
        "from transformers import Qwen2ForCausalLM as M\n"
    )
    config = read_json(folder / "config.json") | {"model_type": "evil"}
    config |= {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert ModelConfig(str(folder)).trust_remote_code is False
    assert "cannot load model" in str(read_or_refused(lambda: load_base(str(folder))))
    assert main(["fit", str(made / "config.yaml"), f"--model.name={folder}", "--out", str(tmp_path / "out")]) == 2
    assert not mark.exists()
    # Nor does a run that says so in its own config.yaml; the consent is a person's.
    run = Path(shutil.copytree(made / "run", tmp_path / "run"))
    values = yaml.safe_load((run / "config.yaml").read_text())
    values["model"] |= {"name": str(folder), "trust_remote_code": True}
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    rows = next((made / "data").glob("test.jsonl"))
    commands = (
        ["predict", run, rows],
        ["evaluate", run],
        ["calibrate", run],
        ["export", run, "--t=0.5", "--out", tmp_path / "adapter"],
        ["scan", run, "--out", tmp_path / "scan"],
        ["generate", run, "--prompt", "x"],
        ["fit", run / "config.yaml", "--out", tmp_path / "again"],
    )
    capsys.readouterr()
    for words in commands:
        assert main([str(word) for word in words]) == 2
        assert "give --trust-remote-code" in capsys.readouterr().err
    with pytest.raises(UserError, match="trust_remote_code=True"):
        open_run(run)
    assert not mark.exists()
    # In a process of its own: transformers marks the classes that such code names.
    ended(forked(lambda: main(["predict", str(run), str(rows), "--trust-remote-code"])))
    assert mark.exists(), "this is what the flag is for"
    with consent.remote_code(True):
        assert consent.consented(True, "a run")
    assert consent.VARIABLE not in os.environ
