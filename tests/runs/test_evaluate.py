"""What a run says of its test sets, and evaluating it again."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from helpers.made_runs import CASES, QUICK, Maker, base_folder, command, config_file, data_folder, tree_hash
from helpers.read_runs import assert_consistent, labels_by_id, log_point_nll, read, table
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from loracurve.cli import main
from loracurve.curve.files import load_adapter
from loracurve.curve.gauge import align
from loracurve.curve.lora_space import stack_adapters
from loracurve.curve.spec import CurveSpec
from loracurve.inference.calibration import fit_temperature
from loracurve.inference.prediction import predict_base, predict_split
from loracurve.model.injection import base_parameters
from loracurve.runs.evaluate import evaluate_methods
from loracurve.runs.run import open_run


def test_a_run_with_every_form_of_inference(tmp_path: Path) -> None:
    base, data = base_folder(tmp_path / "base", "qwen2"), data_folder(tmp_path / "data", "letter")
    config = config_file(tmp_path / "c.yaml", base, data, "letter")
    out = tmp_path / "run"
    tunnel = ["--evaluation.inference=tunnel", "--evaluation.tunnel.warm_up=1", "--evaluation.tunnel.thin=1"]
    command("fit", config, "--out", out, *QUICK, "--evaluation.weights=likelihood", *tunnel)
    metrics = json.loads((out / "metrics.json").read_text())
    assert list(metrics["methods"]) == [
        *("base model", "adapter 0", "adapter 1", "ensemble", "tunnel", "straight line", "aligned line", "curve")
    ]
    assert metrics["average"]["effective"] == pytest.approx(1 / sum(w * w for w in metrics["average"]["w"]))
    assert metrics["average"]["prior"] == pytest.approx([1 / 3] * 3)
    assert (out / "figures" / "posterior_over_t.png").stat().st_size > 1000
    assert metrics["tunnel"]["evaluations"] >= 4 and len(metrics["tunnel"]["xi"]) == 3
    run = open_run(out)
    validation = run.task.encode("validation")
    table = pq.read_table(out / "predictions.parquet").to_pylist()
    for name, entry in metrics["methods"].items():
        if name.endswith("line"):  # shows a barrier; nobody is going to predict with it
            assert "tempered" not in entry
            continue
        tempered = entry["tempered"]
        assert tempered["rows"] == 24 and tempered["temperature"] > 0
        rows = [r for r in table if (r["method"], r["set"]) == (name, "test")]
        scaled = [torch.tensor(r["probs"], dtype=torch.float64).log() / tempered["temperature"] for r in rows]
        nll = [-float(p.log_softmax(0)[r["label"]]) for p, r in zip(scaled, rows, strict=True)]
        assert tempered["sets"]["test"]["nll"] == pytest.approx(sum(nll) / len(nll), rel=1e-4)
    average = run.average()
    assert average.coefficients is not None, "what predict uses"
    assert average.unknowns is not None and average.unknowns.gaussians is not None
    predicted = average.predict(run.model, validation)
    assert predicted.within_points.mean() > 0
    expected = fit_temperature(predicted.log_probs, validation.labels)
    tempered = metrics["methods"]["tunnel"]["tempered"]
    assert tempered["temperature"] == pytest.approx(expected, rel=1e-3)
    nll = -predicted.probs[torch.arange(24), validation.labels].log()
    assert tempered["validation_nll"] == pytest.approx(float(nll.mean()), rel=1e-4)
    command("evaluate", out, "--inference=tunnel", "--points=2")
    assert (out / "evaluations" / "data-test-2-likelihood-tunnel" / "metrics.json").exists()


COLUMNS = [
    "id", "set", "method", "label", "probs", "point_probs", "weights", "entropy", "expected_entropy",
    "mutual_information", "within_points", "between_points", "distance",
]  # fmt: skip


@pytest.mark.parametrize(("kind", "scoring"), [case for case in CASES if case[1] != "lm"])
def test_predictions_agree_with_their_points_and_with_the_metrics(kind: str, scoring: str, fitted: Maker) -> None:
    out = fitted(kind, scoring)
    assert pq.read_schema(out / "predictions.parquet").names == COLUMNS
    metrics = read(out / "metrics.json")
    labels = labels_by_id(fitted.data(scoring), "test")
    passes = {"base model": 1, "best point": 1, "adapter 0": 1, "adapter 1": 1, "ensemble": 2}
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


@pytest.mark.parametrize("scoring", ["letter", "text", "lm"])
@pytest.mark.parametrize("kind", ["free", "anchored"])
def test_the_base_model_is_the_one_of_transformers(kind: str, scoring: str, fitted: Maker) -> None:
    out = fitted(kind, scoring)
    run = open_run(out)
    plain = AutoModelForCausalLM.from_pretrained(run.config.model.name).eval()
    encoded = run.task.encode("test")

    def scores(read: tuple[int, ...], tokens: tuple[int, ...]) -> Tensor:
        """Log-probability of each of the tokens that follow what was read."""
        ids = torch.tensor([[*read, *tokens]])
        with torch.no_grad():
            found = plain(input_ids=ids).logits[0].log_softmax(-1)
        return found[len(read) - 1 : -1].gather(1, ids[0, len(read) :, None])[:, 0]

    expected = {}
    for e in encoded.examples:
        if scoring == "letter":
            assert encoded.answer_ids is not None
            classes = torch.cat([scores(e.prompt, (token,)) for token in encoded.answer_ids[: e.n_choices]])
        else:
            classes = torch.stack([scores(e.prompt, choice).sum() for choice in e.choices])
        expected[e.id] = classes.softmax(0).tolist()
    found = read(out / "metrics.json")["methods"]["base model"]["sets"]["test"]
    if scoring == "lm":
        nll = -torch.cat([scores(e.prompt, e.choices[0]) for e in encoded.examples])
        assert found["nll"] == pytest.approx(nll.mean().item(), abs=1e-5)
        return
    rows = table(out, "base model")
    for name, probs in expected.items():
        assert rows[name]["probs"] == pytest.approx(probs, abs=1e-5)
    right = [expected[name][row["label"]] for name, row in rows.items()]
    assert found["nll"] == pytest.approx(-torch.tensor(right).log().mean().item(), abs=1e-5)


@pytest.mark.parametrize("scoring", ["letter", "head"])
def test_the_best_point_is_chosen_on_validation_rows(scoring: str, fitted: Maker, tmp_path: Path) -> None:
    out = fitted("free", scoring)
    command("evaluate", out, "--split=validation", "--out", tmp_path / "v")
    nll = log_point_nll(table(tmp_path / "v", split="validation")).mean(1)
    best = int(nll.argmin())
    metrics = read(out / "metrics.json")
    found, curve = metrics["methods"]["best point"], metrics["methods"]["curve"]
    assert found["t"] == [curve["t"][best]] and found["passes"] == 1
    rows = table(out)
    for name, row in table(out, "best point").items():
        assert row["probs"] == pytest.approx(rows[name]["point_probs"][best], abs=1e-6)
    (comparison,) = [c for c in metrics["comparisons"] if c["second"] == "best point"]
    paired = -torch.tensor([r["probs"][r["label"]] for r in rows.values()]).log()
    paired += torch.tensor([r["point_probs"][best][r["label"]] for r in rows.values()]).log()
    assert comparison["nll"]["estimate"] == pytest.approx(paired.mean().item(), abs=1e-5)


def test_adapters_that_bring_weights_of_the_base_are_not_compared_with_it(fitted: Maker, tmp_path: Path) -> None:
    run = open_run(fitted("free", "letter"))
    sets = {"test": run.task.encode("test")}
    arguments = run.task, run.config.evaluation, sets, None, tmp_path
    report = evaluate_methods(run.model, *arguments, run.average())
    assert list(report["methods"]) == ["base model", "best point", "curve"]
    name = "model.norm.weight"
    run.model.bring({name: base_parameters(run.model.model)[name] * 1.5}, "adapter")
    report = evaluate_methods(run.model, *arguments, run.average())
    assert list(report["methods"]) == ["best point", "curve"]


def test_ood_sets_are_judged_by_how_well_uncertainty_tells_them_apart(fitted: Maker, tmp_path: Path) -> None:
    other = data_folder(tmp_path / "elsewhere", "lm", {"train": 2, "validation": 2, "test": 11})
    data = data_folder(tmp_path / "here", "label")
    out, config = tmp_path / "run", config_file(tmp_path / "c.yaml", fitted.base("qwen2"), data, "label")
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


@pytest.mark.parametrize(("kind", "scoring"), CASES)
def test_evaluating_a_run_again_gives_what_fit_reported(kind: str, scoring: str, fitted: Maker, tmp_path: Path) -> None:
    out = fitted(kind, scoring)
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


def test_evaluate_names_its_own_folder_and_never_writes_over_it(fitted: Maker, tmp_path: Path) -> None:
    out = fitted("free", "letter")
    command("evaluate", out, "--points=2", "--split=validation")
    folder = out / "evaluations" / "letter-validation-2-uniform"
    assert len(table(folder, split="validation")) == 24
    before = tree_hash(folder)
    assert main(["evaluate", str(out), "--points=2", "--split=validation"]) == 2
    assert tree_hash(folder) == before


def test_likelihood_weights_are_the_tempered_posterior_on_validation_rows(fitted: Maker, tmp_path: Path) -> None:
    out = fitted("anchored", "letter")
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


def test_arc_length_weights_are_the_speed_of_the_control_points(fitted: Maker, tmp_path: Path) -> None:
    out = fitted("anchored", "letter")
    command("evaluate", out, "--points=5", "--weights=arc-length", "--out", tmp_path / "a")
    points = load_file(out / "curve" / "control_points.safetensors")
    p0, p1, p2 = (torch.cat([p[k].double().flatten() for p in points.values()]) for k in range(3))
    speeds = torch.stack([2 * (1 - t) * (p1 - p0) + 2 * t * (p2 - p1) for t in (0, 0.25, 0.5, 0.75, 1)]).norm(dim=1)
    assert speeds.max() > 1.05 * speeds.min(), "or uniform weights would pass too"
    assert read(tmp_path / "a" / "metrics.json")["average"]["w"] == pytest.approx(
        (speeds / speeds.sum()).tolist(), abs=1e-6
    )


def test_another_task_is_put_into_the_same_prompt(fitted: Maker, tmp_path: Path) -> None:
    out = fitted("anchored", "letter")
    other = data_folder(tmp_path / "other", "letter", {"train": 3, "validation": 4, "test": 29})
    command("evaluate", out, f"--task={other}", "--out", tmp_path / "e")
    rows = table(tmp_path / "e")
    assert {name: r["label"] for name, r in rows.items()} == labels_by_id(other, "test")
    # The made rows are drawn in one order: the validation rows of the run's own data are other texts.
    nll = float(log_point_nll({n: {**r, "point_probs": [r["probs"]]} for n, r in rows.items()}).mean())
    assert read(tmp_path / "e" / "metrics.json")["methods"]["curve"]["sets"]["test"]["nll"] == pytest.approx(
        nll, abs=1e-5
    )


@pytest.mark.parametrize(("name", "alignment"), [("straight line", "none"), ("aligned line", "balanced+procrustes")])
def test_lines_predict_at_anchors_what_the_anchors_do(name: str, alignment: str, fitted: Maker) -> None:
    """Their own points alone are predicted; the anchors were, for the ensemble."""
    out = fitted("anchored", "letter")
    run = open_run(out)
    metrics, rows = read(out / "metrics.json")["methods"], table(out, name)
    t = torch.tensor(metrics[name]["t"], dtype=torch.float64)
    assert metrics[name]["passes"] == len(t) > 2 and {0.0, 1.0} < {*t.tolist()}
    folders = [out / "anchors" / str(m) for m in (0, 1)]
    anchors = stack_adapters([load_adapter(folder)[1] for folder in folders])
    control = anchors if alignment == "none" else align(anchors, alignment)
    run.model.set_curve(CurveSpec.slots(2), control)
    test = run.task.encode("test")
    wanted = predict_split(run.model, test, t).point_log_probs
    assert wanted is not None
    for example, expected in zip(test.examples, wanted.exp().transpose(0, 1), strict=True):
        found = torch.tensor(rows[example.id]["point_probs"])  # of the choices that the row has
        assert (found - expected[:, : found.shape[1]]).abs().max() < 1e-5


def test_the_base_beside_the_curve_is_the_base(fitted: Maker) -> None:
    """Its states were read for the familiarity, in the curve's own passes."""
    out = fitted("anchored", "letter")
    run = open_run(out)
    test, rows = run.task.encode("test"), table(out, "base model")
    average = run.average()
    assert average.unknowns is not None and average.unknowns.on_base
    wanted = predict_base(run.model, test).point_log_probs
    found = average.predict(run.model, test).base_log_probs
    assert wanted is not None and found is not None and found.shape == wanted.shape
    assert (found.exp() - wanted.exp()).abs().max() < 1e-5
    for example, expected in zip(test.examples, wanted[0].exp(), strict=True):
        (p,) = torch.tensor(rows[example.id]["point_probs"])
        assert (p - expected[: len(p)]).abs().max() < 1e-5
