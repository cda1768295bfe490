"""Run directories from one end to the other: what fit writes, resuming, and every command that opens a run."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import peft
import pyarrow.parquet as pq
import pytest
import torch
from made_runs import QUICK, base_folder, command, config_file, data_folder, tree_hash
from safetensors.torch import load_file
from tokenizers_made import bert_style
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from loracurve.cli import main
from loracurve.model.base_model import load_base
from loracurve.model.curve_model import CurveModel
from loracurve.runs.config import load_config
from loracurve.runs.run import Run, open_run

SCORINGS = {"letter": "qwen2", "text": "llama", "head": "encoder", "lm": "llama"}
CASES = list(product(["anchored", "free"], SCORINGS))
COLUMNS = [
    "id", "set", "method", "label", "probs", "point_probs", "weights", "entropy", "expected_entropy",
    "mutual_information",
]  # fmt: skip
MakeRun = Callable[[str, str], Path]


class Maker:
    """Fits each kind of run once for the whole module, when a test first asks for it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.made: dict[str, Path] = {}

    def base(self, architecture: str) -> Path:
        folder = self.root / "bases" / architecture
        return folder if folder.is_dir() else base_folder(folder, architecture)

    def data(self, scoring: str) -> Path:
        folder = self.root / "data" / scoring
        return folder if folder.is_dir() else data_folder(folder, scoring)

    def config(self, scoring: str) -> Path:
        path = self.root / f"{scoring}.yaml"
        return config_file(path, self.base(SCORINGS[scoring]), self.data(scoring), scoring)

    def __call__(self, kind: str, scoring: str) -> Path:
        name = f"{kind}-{scoring}"
        if name not in self.made:
            out = self.root / name
            command("fit", self.config(scoring), "--out", out, f"--curve.kind={kind}", *QUICK)
            self.made[name] = out
        return self.made[name]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    return Maker(tmp_path_factory.mktemp("runs"))


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def figures(metrics: dict[str, Any]) -> dict[str, Any]:
    """What a second run has to repeat: everything but the clock."""
    return {k: v for k, v in metrics.items() if k != "seconds"}


def table(folder: Path, method: str = "curve", split: str = "test") -> dict[str, dict[str, Any]]:
    rows = pq.read_table(folder / "predictions.parquet").to_pylist()
    return {r["id"]: r for r in rows if (r["method"], r["set"]) == (method, split)}


def labels_by_id(data: Path, split: str) -> dict[str, int]:
    rows = [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()]
    return {row["id"]: row["label"] for row in rows}


def entropy(p: Tensor) -> Tensor:
    return -torch.special.xlogy(p, p).sum(-1)


def some_ids() -> Tensor:
    """Tokens that every made tokenizer has."""
    return torch.randint(5, 60, (3, 8), generator=torch.Generator().manual_seed(2))


def logits(model: Any, ids: Tensor, t: float | None = None) -> Tensor:
    with torch.no_grad():
        return (model(input_ids=ids) if t is None else model.eval()(t, input_ids=ids)).logits


def peft_logits(run: Run, folder: Path, ids: Tensor) -> Tensor:
    """Logits of an adapter folder on the run's base, loaded by PEFT alone."""
    base, _ = load_base(run.config.model.name, run.config.task.scoring == "head", num_labels=2)
    return logits(peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval(), ids)


def assert_consistent(row: dict[str, Any]) -> None:
    """Average and uncertainties computed again from the points and their weights."""
    p, w = torch.tensor(row["point_probs"], dtype=torch.float64), torch.tensor(row["weights"], dtype=torch.float64)
    assert p.shape[0] == len(w) and float(w.sum()) == pytest.approx(1, abs=1e-9)
    torch.testing.assert_close(p.sum(1), torch.ones(len(w), dtype=torch.float64), rtol=0, atol=1e-5)
    average = w @ p
    assert sum(row["probs"]) == pytest.approx(1, abs=1e-5)
    assert row["probs"] == pytest.approx(average.tolist(), abs=1e-6)
    assert row["entropy"] == pytest.approx(float(entropy(average)), abs=1e-5)
    assert row["expected_entropy"] == pytest.approx(float(w @ entropy(p)), abs=1e-5)
    assert row["entropy"] == pytest.approx(row["expected_entropy"] + row["mutual_information"], abs=1e-6)
    assert row["mutual_information"] >= -1e-9


@pytest.mark.parametrize(("kind", "scoring"), CASES)
def test_fit_writes_a_whole_run_directory(kind: str, scoring: str, run: Maker) -> None:
    out = run(kind, scoring)
    config = load_config(out / "config.yaml")
    assert (config.curve.kind, config.task.scoring, config.lora.r) == (kind, scoring, 2)
    environment = read(out / "environment.json")
    assert environment["packages"].keys() >= {"torch", "transformers", "peft"}
    metrics = read(out / "metrics.json")
    singles = ["adapter 0", "adapter 1", "ensemble", "straight line", "aligned line"] if kind == "anchored" else []
    assert list(metrics["methods"]) == [*singles, "curve"]
    assert [c["second"] for c in metrics["comparisons"]] == singles
    assert metrics["average"]["t"] == [0.0, 0.5, 1.0] and sum(metrics["average"]["w"]) == pytest.approx(1)
    assert metrics["task"]["sizes"] == {"train": 40, "validation": 24, "test": 17}
    assert metrics["training"]["steps"] == 4
    assert all(metrics["methods"][m]["sets"]["test"]["nll"] > 0 for m in metrics["methods"])
    points = load_file(out / "curve" / "control_points.safetensors")
    assert {len(p) for p in points.values()} == {3 if kind == "anchored" else 5}
    if kind == "anchored":
        assert metrics["anchor_distance_delta_w"] > 0
    assert (out / "predictions.parquet").exists() == (scoring != "lm")


@pytest.mark.parametrize(("kind", "scoring"), [case for case in CASES if case[1] != "lm"])
def test_predictions_agree_with_their_points_and_with_the_metrics(kind: str, scoring: str, run: Maker) -> None:
    out = run(kind, scoring)
    assert pq.read_schema(out / "predictions.parquet").names == COLUMNS
    metrics = read(out / "metrics.json")
    labels = labels_by_id(run.data(scoring), "test")
    passes = {"adapter 0": 1, "adapter 1": 1, "ensemble": 2}
    for method, entry in metrics["methods"].items():
        rows = table(out, method)
        assert {name: r["label"] for name, r in rows.items()} == labels, "one row for each example"
        for row in rows.values():
            assert len(row["weights"]) == passes.get(method, 3) == entry["passes"]
            assert_consistent(row)
        right = [r["probs"][r["label"]] for r in rows.values()]
        assert entry["sets"]["test"]["nll"] == pytest.approx(-float(torch.tensor(right).log().mean()), abs=1e-5)
        hits = [max(r["probs"]) == p for r, p in zip(rows.values(), right, strict=True)]
        assert entry["sets"]["test"]["acc"] == pytest.approx(sum(hits) / len(hits))
    if kind == "anchored":
        members = [table(out, f"adapter {m}") for m in range(2)]
        for name, row in table(out, "ensemble").items():
            expected = torch.tensor([m[name]["probs"] for m in members]).mean(0)
            assert row["probs"] == pytest.approx(expected.tolist(), abs=1e-6)
    if scoring in ("letter", "text"):
        assert {len(r["probs"]) for r in table(out).values()} == {2, 3}, "absent choices are not classes"


@pytest.mark.parametrize("scoring", SCORINGS)
def test_anchors_are_peft_folders_and_the_ends_of_the_curve(scoring: str, run: Maker) -> None:
    out = run("anchored", scoring)
    opened, ids = open_run(out), some_ids()
    assert opened.model.spec.trainable == (False, True, False)
    assert opened.model.spec.alignment == "balanced+procrustes"
    for m, t in enumerate((0.0, 1.0)):
        expected = peft_logits(opened, out / "anchors" / str(m), ids)
        torch.testing.assert_close(logits(opened.model, ids, t), expected, rtol=1e-4, atol=1e-4)
    assert not (out / "anchors" / "2").exists()


class Interrupted(KeyboardInterrupt):
    """What pressing Ctrl-C does."""


@pytest.mark.parametrize("phase", ["anchors", "curve", "evaluation"])
def test_an_interrupted_run_resumes_to_the_same_result(
    phase: str, run: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = run("anchored", "letter"), tmp_path / "cut"
    arguments = ["fit", str(run.config("letter")), "--out", str(out), "--curve.kind=anchored", *QUICK]
    steps = 0
    take_step = torch.optim.AdamW.step

    def step(*args: Any, **options: Any) -> Any:
        nonlocal steps
        steps += 1
        # The seventh step is the third of the curve's four.
        if steps == {"anchors": 3, "curve": 7}.get(phase):
            raise Interrupted
        return take_step(*args, **options)

    def write_predictions(*args: Any) -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        if phase == "evaluation":
            patch.setattr("loracurve.runs.evaluate.write_predictions", write_predictions)
        assert main(arguments) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not (out / "metrics.json").exists()
    command(*arguments, "--resume")
    assert figures(read(out / "metrics.json")) == figures(read(whole / "metrics.json"))
    assert pq.read_table(out / "predictions.parquet").equals(pq.read_table(whole / "predictions.parquet"))
    for name in ("curve/control_points.safetensors", "anchors/1/adapter_model.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    finished = figures(read(out / "metrics.json"))
    command(*arguments, "--resume")
    assert figures(read(out / "metrics.json")) == finished, "resuming what is done changes nothing"


@pytest.mark.parametrize("scoring", ["letter", "head"])
def test_anchors_that_exist_give_the_curve_that_training_them_gave(scoring: str, run: Maker, tmp_path: Path) -> None:
    whole, out = run("anchored", scoring), tmp_path / "again"
    before = tree_hash(whole)
    folders = json.dumps([str(whole / "anchors" / str(m)) for m in range(2)])
    command("fit", run.config(scoring), "--out", out, f"--adapters={folders}", *QUICK)
    mine, theirs = (load_file(x / "curve" / "control_points.safetensors") for x in (out, whole))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)
    metrics, expected = (read(x / "metrics.json") for x in (out, whole))
    for method, entry in expected["methods"].items():
        assert metrics["methods"][method]["sets"]["test"]["nll"] == pytest.approx(
            entry["sets"]["test"]["nll"], abs=1e-5
        )
    assert "anchors" not in metrics["seconds"]
    assert tree_hash(whole) == before


def test_ood_sets_are_judged_by_how_well_uncertainty_tells_them_apart(run: Maker, tmp_path: Path) -> None:
    other = data_folder(tmp_path / "elsewhere", "lm", {"train": 2, "validation": 2, "test": 11})
    data = data_folder(tmp_path / "here", "label")
    out, config = tmp_path / "run", config_file(tmp_path / "c.yaml", run.base("qwen2"), data, "label")
    command("fit", config, "--out", out, f"--evaluation.ood=[{other}]", *QUICK)
    entry = read(out / "metrics.json")["methods"]["curve"]
    rows = table(out, split="ood:elsewhere")
    assert len(rows) == 11 and all(r["label"] is None for r in rows.values())
    assert entry["sets"]["ood:elsewhere"]["entropy"] == pytest.approx(
        sum(r["entropy"] for r in rows.values()) / 11, abs=1e-6
    )
    inside, outside = ([r["entropy"] for r in x.values()] for x in (table(out), rows))
    wins = sum((b > a) + 0.5 * (b == a) for a in inside for b in outside) / (len(inside) * len(outside))
    assert entry["detection"]["ood:elsewhere"]["auroc_entropy"] == pytest.approx(wins, abs=1e-6)


def test_weights_that_no_checkpoint_holds_are_the_same_when_a_run_is_opened_again(tmp_path: Path) -> None:
    # A masked language model has no pooler: like the head, transformers draws it when the classifier is loaded.
    tokenizer, base = bert_style(), tmp_path / "base"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    data, out = data_folder(tmp_path / "data", "head"), tmp_path / "run"
    command("fit", config_file(tmp_path / "c.yaml", base, data, "head"), "--out", out, "--curve.kind=free", *QUICK)
    torch.manual_seed(12345)
    command("evaluate", out, "--out", tmp_path / "evaluated")
    for name, row in table(tmp_path / "evaluated").items():
        assert row["probs"] == pytest.approx(table(out)[name]["probs"], abs=1e-5)


# ---- evaluate


@pytest.mark.parametrize(("kind", "scoring"), CASES)
def test_evaluating_a_run_again_gives_what_fit_reported(kind: str, scoring: str, run: Maker, tmp_path: Path) -> None:
    out = run(kind, scoring)
    before = tree_hash(out)
    command("evaluate", out, "--out", tmp_path / "e")
    found = read(tmp_path / "e" / "metrics.json")["methods"]["curve"]["sets"]["test"]
    expected = read(out / "metrics.json")["methods"]["curve"]["sets"]["test"]
    assert found.keys() == expected.keys()
    for key in ("nll", "acc", "entropy", "mutual_information"):
        assert found[key] == pytest.approx(expected[key], abs=1e-5)
    if scoring != "lm":
        for name, row in table(tmp_path / "e").items():
            assert row["probs"] == pytest.approx(table(out)[name]["probs"], abs=1e-5)
    assert tree_hash(out) == before


def test_evaluate_names_its_own_folder_and_never_writes_over_it(run: Maker, tmp_path: Path) -> None:
    out = run("free", "letter")
    command("evaluate", out, "--points=2", "--split=validation")
    folder = out / "evaluations" / "letter-validation-2-uniform"
    assert len(table(folder, split="validation")) == 24
    before = tree_hash(folder)
    assert main(["evaluate", str(out), "--points=2", "--split=validation"]) == 2
    assert tree_hash(folder) == before


def point_nll(rows: dict[str, dict[str, Any]]) -> Tensor:
    """[n, E] NLL of each example at each point, from the Parquet rows."""
    return torch.tensor([[-q[r["label"]] for q in r["point_probs"]] for r in rows.values()], dtype=torch.float64).T


def log_point_nll(rows: dict[str, dict[str, Any]]) -> Tensor:
    return -(-point_nll(rows)).log()


def test_likelihood_weights_are_the_tempered_posterior_on_validation_rows(run: Maker, tmp_path: Path) -> None:
    out = run("anchored", "letter")
    command("evaluate", out, "--points=4", "--split=validation", "--out", tmp_path / "v")
    command("evaluate", out, "--points=4", "--weights=likelihood", "--out", tmp_path / "l")
    record = read(tmp_path / "l" / "metrics.json")["average"]
    total = log_point_nll(table(tmp_path / "v", split="validation")).sum(1)
    expected = (-total / record["temperature"]).softmax(0).tolist()
    assert record["rows"] == 24 and record["t"] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert record["w"] == pytest.approx(expected, abs=1e-4)
    for row in table(tmp_path / "l").values():
        assert row["weights"] == pytest.approx(record["w"])
        assert_consistent(row)


def test_arc_length_weights_are_the_speed_of_the_control_points(run: Maker, tmp_path: Path) -> None:
    out = run("anchored", "letter")
    command("evaluate", out, "--points=5", "--weights=arc-length", "--out", tmp_path / "a")
    points = load_file(out / "curve" / "control_points.safetensors")
    p0, p1, p2 = (torch.cat([p[k].double().flatten() for p in points.values()]) for k in range(3))
    speeds = torch.stack([2 * (1 - t) * (p1 - p0) + 2 * t * (p2 - p1) for t in (0, 0.25, 0.5, 0.75, 1)]).norm(dim=1)
    assert speeds.max() > 1.05 * speeds.min(), "or uniform weights would pass too"
    assert read(tmp_path / "a" / "metrics.json")["average"]["w"] == pytest.approx(
        (speeds / speeds.sum()).tolist(), abs=1e-6
    )


def test_another_task_is_put_into_the_same_prompt(run: Maker, tmp_path: Path) -> None:
    out = run("anchored", "letter")
    other = data_folder(tmp_path / "other", "letter", {"train": 3, "validation": 4, "test": 29})
    command("evaluate", out, f"--task={other}", "--out", tmp_path / "e")
    rows = table(tmp_path / "e")
    assert {name: r["label"] for name, r in rows.items()} == labels_by_id(other, "test")
    # The made rows are drawn in one order: the validation rows of the run's own data are other texts.
    nll = float(log_point_nll({n: {**r, "point_probs": [r["probs"]]} for n, r in rows.items()}).mean())
    assert read(tmp_path / "e" / "metrics.json")["methods"]["curve"]["sets"]["test"]["nll"] == pytest.approx(
        nll, abs=1e-5
    )


# ---- predict and calibrate


def unlabelled(data: Path, path: Path) -> Path:
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "label"}) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("scoring", ["letter", "text", "head"])
def test_predict_needs_no_labels_and_gives_what_the_run_recorded(
    scoring: str, run: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, rows = run("anchored", scoring), unlabelled(run.data(scoring), tmp_path / "rows.jsonl")
    capsys.readouterr()
    command("predict", out, rows)
    printed = capsys.readouterr().out
    records = [json.loads(line) for line in printed.splitlines()]
    command("predict", out, rows, "--out", tmp_path / "p.jsonl")
    assert (tmp_path / "p.jsonl").read_text() == printed
    expected = table(out)
    assert [r["id"] for r in records] == [json.loads(line)["id"] for line in rows.read_text().splitlines()]
    texts = {json.loads(line)["id"]: json.loads(line) for line in rows.read_text().splitlines()}
    for r in records:
        assert r.keys() == {
            "id", "label", "prediction", "probs", "entropy", "expected_entropy", "mutual_information",
        }  # fmt: skip
        assert r["probs"] == pytest.approx(expected[r["id"]]["probs"], abs=1e-5)
        for key in ("entropy", "expected_entropy", "mutual_information"):
            assert r[key] == pytest.approx(expected[r["id"]][key], abs=1e-5)
        names = texts[r["id"]].get("choices", ["negative", "positive"])
        assert r["label"] == r["probs"].index(max(r["probs"])) and r["prediction"] == names[r["label"]]


@pytest.mark.parametrize("given", [False, True])
def test_calibration_is_what_predict_uses(
    given: bool, run: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    out = Path(shutil.copytree(run("anchored", "letter"), tmp_path / "run"))
    rows = run.data("letter") / "test.jsonl"
    command("predict", out, rows, "--out", tmp_path / "raw.jsonl")
    fresh = data_folder(tmp_path / "fresh", "letter", {"train": 1, "validation": 1, "test": 60}) / "test.jsonl"
    capsys.readouterr()
    command("calibrate", out, "--risk=0.6", "--alpha=0.3", *([f"--input={fresh}"] if given else []))
    said = capsys.readouterr().out
    saved = read(out / "calibration.json")
    assert saved["rows"] == (60 if given else 24) and f"temperature {saved['temperature']:.3f}" in said
    assert ("guarantees" in said) == (not given), "the validation split has chosen the trained state"
    assert saved["selective"]["risk"] == 0.6 and saved["conformal"]["alpha"] == 0.3
    command("predict", out, rows, "--out", tmp_path / "calibrated.jsonl")
    before, after = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("raw", "calibrated")
    )
    threshold = saved["selective"]["threshold"]
    for raw, r in zip(before, after, strict=True):
        tempered = (torch.tensor(raw["probs"], dtype=torch.float64).log() / saved["temperature"]).softmax(0)
        assert r["probs"] == pytest.approx(tempered.tolist(), abs=1e-3)
        assert r["entropy"] == raw["entropy"], "uncertainties stay untempered"
        assert r["abstain"] == (threshold is None or r["entropy"] >= threshold)
        choices = ["negative", "positive", "no it is"][: len(r["probs"])]
        inside = [c for c, p in zip(choices, r["probs"], strict=True) if 1 - p <= saved["conformal"]["quantile"] + 1e-5]
        assert r["set"] == inside
    if given:
        # Prediction sets cover the fresh rows' second half by construction; over all rows about as often.
        command("predict", out, fresh, "--out", tmp_path / "fresh.jsonl")
        labels = [json.loads(line) for line in fresh.read_text().splitlines()]
        found = [json.loads(line) for line in (tmp_path / "fresh.jsonl").read_text().splitlines()]
        covered = [row["choices"][row["label"]] in r["set"] for row, r in zip(labels, found, strict=True)]
        assert sum(covered) / 60 > 0.5


def test_a_new_calibration_replaces_the_old_one(run: Maker, tmp_path: Path) -> None:
    import shutil

    out = Path(shutil.copytree(run("anchored", "head"), tmp_path / "run"))
    command("calibrate", out, "--measure=entropy")
    command("calibrate", out, "--measure=mutual_information")
    assert read(out / "calibration.json")["measure"] == "mutual_information"


# ---- export


@pytest.mark.parametrize(("kind", "scoring"), [("anchored", "letter"), ("free", "text"), ("anchored", "head")])
def test_exported_points_are_adapters_that_peft_loads(kind: str, scoring: str, run: Maker, tmp_path: Path) -> None:
    out, ids = run(kind, scoring), some_ids()
    opened = open_run(out)
    command("export", out, "--points=3", "--out", tmp_path / "points")
    command("export", out, "--t=0.3", "--out", tmp_path / "one")
    command("export", out, "--out", tmp_path / "own")
    index = read(tmp_path / "points" / "index.json")
    assert [entry["t"] for entry in index] == [0.0, 0.5, 1.0]
    assert [entry["weight"] for entry in index] == pytest.approx([1 / 3] * 3)
    assert len(read(tmp_path / "own" / "index.json")) == 3, "by default the run's own points"
    assert read(tmp_path / "one" / "index.json") == [{"folder": "point-00", "t": 0.3, "weight": 1.0}]
    for folder, t in [*((tmp_path / "points" / e["folder"], e["t"]) for e in index), (tmp_path / "one/point-00", 0.3)]:
        expected = logits(opened.model, ids, t)
        torch.testing.assert_close(peft_logits(opened, folder, ids), expected, rtol=1e-4, atol=1e-5)


def test_the_best_point_has_the_lowest_validation_nll(run: Maker, tmp_path: Path) -> None:
    out = run("anchored", "letter")
    command("evaluate", out, "--points=21", "--split=validation", "--out", tmp_path / "v")
    nll = log_point_nll(table(tmp_path / "v", split="validation")).mean(1)
    command("export", out, "--best", "--out", tmp_path / "best")
    (entry,) = read(tmp_path / "best" / "index.json")
    assert nll[round(entry["t"] * 20)] == pytest.approx(float(nll.min()), abs=1e-6)
    assert float(nll.max() - nll.min()) > 1e-3, "or any point would do"


def test_exported_points_are_anchors_of_another_run(run: Maker, tmp_path: Path) -> None:
    out = run("free", "letter")
    command("export", out, "--points=2", "--out", tmp_path / "ends")
    base, _ = load_base(str(run.base("qwen2")))
    model = CurveModel.from_adapters(base, [tmp_path / "ends" / f"point-{i:02d}" for i in range(2)])
    ids = some_ids()
    ends = open_run(out).model
    for t in (0.0, 1.0):
        torch.testing.assert_close(logits(model, ids, t), logits(ends, ids, t), rtol=1e-4, atol=1e-5)


# ---- shipped configs

CONFIGS = sorted((Path(__file__).parents[1] / "src" / "loracurve" / "configs").glob("*.yaml"))


def test_anchors_of_a_free_curve_are_said_to_have_no_effect(
    run: Maker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command("fit", run.config("letter"), "--out", tmp_path / "run", "--curve.kind=free", *QUICK)
    assert "curve.anchors: a free curve has none" in caplog.text
    caplog.clear()
    command("fit", run.config("letter"), "--out", tmp_path / "other", *QUICK)
    assert "curve.anchors" not in caplog.text


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_run(path: Path, run: Maker, tmp_path: Path) -> None:
    config = load_config(path)
    scoring = config.task.scoring
    architecture = "encoder" if scoring == "head" else "llama" if scoring == "text" else "qwen2"
    data = data_folder(tmp_path / "data", scoring if scoring == "text" else "label")
    ood = data_folder(tmp_path / "other", "label", {"train": 1, "validation": 1, "test": 5})
    # Only what stands for the real thing is replaced; everything else is the file's.
    small = [f"--{part}_training.{option}" for part in ("anchor", "curve") for option in ("steps=2", "batch_size=3")]
    command(
        *("fit", path, "--out", tmp_path / "run", f"--model.name={run.base(architecture)}", f"--task.data={data}"),
        *("--model.dtype=float32", "--task.limit_train=20", "--evaluation.points=4", *small),
        *([f"--evaluation.ood=[{ood}]"] if config.evaluation.ood else []),
    )
    metrics = read(tmp_path / "run" / "metrics.json")
    curve = metrics["methods"]["curve"]
    assert curve["passes"] == 4 and curve["sets"]["test"]["nll"] > 0
    assert metrics["average"]["weights"] == config.evaluation.weights
    points = load_file(tmp_path / "run" / "curve" / "control_points.safetensors")
    anchored = config.curve.kind == "anchored"
    segments = config.curve.anchors - 1 if anchored else config.curve.segments
    assert {len(p) for p in points.values()} == {segments * config.curve.degree + 1}
    assert load_config(tmp_path / "run" / "config.yaml").lora == config.lora


def test_losses_are_logged_where_the_tracker_says(run: Maker, tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event

    out = tmp_path / "run"
    command("fit", run.config("letter"), "--out", out, "--tracker=tensorboard", *QUICK)
    logged: dict[str, dict[int, float]] = {}
    for file in out.rglob("events.out.tfevents.*"):
        data, place = file.read_bytes(), 0
        while place < len(data):  # length, its checksum, record, its checksum
            length = int.from_bytes(data[place : place + 8], "little")
            event = Event.FromString(data[place + 12 : place + 12 + length])
            place += length + 16
            for value in event.summary.value:
                logged.setdefault(value.tag, {})[event.step] = value.simple_value
    for folder, label in (("anchors", "anchors"), ("training", "curve")):
        history = json.loads((out / folder / "history.json").read_text())
        assert logged[f"{label}/loss"] == pytest.approx({entry["step"]: entry["loss"] for entry in history})


def test_figures_of_a_run_show_loss_reliability_uncertainty_and_selection(run: Maker, tmp_path: Path) -> None:
    from loracurve.report.page import write_figures

    out = tmp_path / "run"
    shutil.copytree(run("anchored", "letter"), out)
    written = write_figures(out)
    assert [p.stem for p in written] == ["loss_along_path", "reliability", "uncertainty", "selective_prediction"]
    assert all(p.stat().st_size > 1000 and p.with_suffix(".pdf").stat().st_size > 1000 for p in written)


def test_a_tracker_that_is_not_installed(run: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["fit", str(run.config("letter")), "--out", str(out), "--tracker=wandb", *QUICK]) == 2
    assert "pip install wandb" in capsys.readouterr().err
    assert not out.exists()
