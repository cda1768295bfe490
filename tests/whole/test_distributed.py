"""Several processes: training, evaluation and commands equal those of one process."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.made import made_task, shared_points, vocabulary
from helpers.made_runs import QUICK, base_folder, config_file, data_folder
from helpers.processes import ran
from helpers.ranks import together
from helpers.tiny import lora_config, random_points, tiny
from torch import Tensor

from loracurve.cli import main
from loracurve.curve.spec import CurveSpec
from loracurve.inference.prediction import predict_base, predict_splits
from loracurve.inference.predictive import Predictive
from loracurve.model.curve_model import CurveModel
from loracurve.model.fsdp import asked_to_shard, shard_base
from loracurve.system.errors import UserError
from loracurve.system.files import read_json
from loracurve.tasks.batching import evaluation_batches
from loracurve.tasks.task import Task
from loracurve.training.config import CorruptionConfig, LoopConfig, ObjectiveConfig, PerturbationConfig
from loracurve.training.fit import fit, fit_anchors
from loracurve.training.loop import FitResult

QUIET = {"progress": False}
QUICKLY = {"steps": 4, "batch_size": 5, "learning_rate": 3e-3, "evaluate_every": 2, "row_tokens": 1, "eps": 1e-3}
HINGE = ObjectiveConfig("hinge", 5.0, tau=0.02)
Found = tuple[FitResult, dict[str, Tensor]]


def task_of(tmp_path: Path, scoring: str = "letter") -> Task:
    """An odd number of rows in every split."""
    return made_task(tmp_path, "qwen2", scoring, {"train": 41, "validation": 13, "test": 17})


def model_of(task: Task, spec: CurveSpec) -> CurveModel:
    model = CurveModel(tiny("qwen2", torch.float64, vocabulary(task)), lora_config("qwen2"), spec)
    model.set_curve(spec, spec.tie(random_points(model, scale=0.1)))
    return model


def anchors(task: Task, shard: bool, folder: Path | None, rank: int = 0, **options: Any) -> Found:
    model = model_of(task, CurveSpec.slots(2))
    if shard:
        shard_base(model)
    config = LoopConfig(**{**QUICKLY, "row_tokens": 64, "weight_decay": 0.1, **options})
    return fit_anchors(model, task, config, folder, **QUIET), model.control_points()


def curve(
    task: Task, spec: CurveSpec, shard: bool, folder: Path | None, rank: int = 0, stop_after: int | None = None,
    **options: Any,
) -> Found:  # fmt: skip
    model = model_of(task, spec)
    if shard:
        shard_base(model)
    config = shared_points(**{**QUICKLY, **options})  # type: ignore[arg-type]
    return fit(model, task, config, folder, stop_after=stop_after, **QUIET), model.control_points()


def check_same(one: Found, several: list[Found], rtol: float = 1e-5, atol: float = 1e-7) -> None:
    """Losses, norms, validation and control points of one process, within rounding; bit-equal between processes."""
    for result, points in several:
        assert all(torch.equal(p, several[0][1][n]) for n, p in points.items())
        assert result.history == several[0][0].history
    result, points = several[0]
    for mine, other in zip(one[0].history, result.history, strict=True):
        assert mine.keys() == other.keys()
        for key, value in mine.items():
            assert other[key] == pytest.approx(value, rel=rtol, abs=atol), key
    assert result.best_step == one[0].best_step
    for name, expected in one[1].items():
        torch.testing.assert_close(points[name], expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("accumulation", "shard"), [(1, False), (2, True)])
def test_anchors_of_two_processes_are_those_of_one(accumulation: int, shard: bool, tmp_path: Path) -> None:
    task = task_of(tmp_path)
    work = partial(anchors, task, shard, None, accumulation=accumulation)
    several = together(work, tmp_path / "ranks")
    check_same(work(), several)
    # 5 are 3 + 2; of the micro-batches 3 and 2 the first is 2 + 1, the second 1 + 1.
    expected = {"count": 2, "examples": [3, 2], "backend": "gloo", "base": "sharded" if shard else "whole"}
    assert several[1][0].processes == expected


CURVES: dict[str, tuple[CurveSpec, dict[str, Any]]] = {
    "free": (CurveSpec(2, 2), {"weight_decay": 0.01, "row_tokens": 64}),
    "anchored": (CurveSpec.anchored(3, 2), {"accumulation": 2}),
    "bonus": (CurveSpec(2, 2, closed=True), {"objective": ObjectiveConfig("bonus", 0.5)}),
    "hinge": (CurveSpec.anchored(2, 2), {"objective": ObjectiveConfig("hinge", 5.0)}),
    "own points": (CurveSpec(2, 2), {"share_points": False, "accumulation": 2}),
    "layerwise": (CurveSpec(1, 2), {"layerwise": True}),
    "tokens": (CurveSpec(1, 2), {"objective": HINGE, "corruption": CorruptionConfig("tokens", 0.05)}),
    "attention": (CurveSpec(1, 2), {"objective": HINGE, "corruption": CorruptionConfig("attention", 0.05)}),
    "flat_lora": (CurveSpec(1, 2), {"perturbation": PerturbationConfig("flat_lora")}),
    "sam": (CurveSpec(1, 2), {"perturbation": PerturbationConfig("sam"), "points": 1}),
}


@pytest.mark.parametrize("kind", list(CURVES))
def test_a_curve_of_two_processes_is_that_of_one(kind: str, tmp_path: Path) -> None:
    task = task_of(tmp_path)
    spec, options = CURVES[kind]
    work = partial(curve, task, spec, False, None, **options)
    check_same(work(), together(work, tmp_path / "ranks"))


@pytest.mark.parametrize("scoring", ["text", "lm"])
def test_texts_and_tokens_count_as_in_one_process(scoring: str, tmp_path: Path) -> None:
    task = task_of(tmp_path, scoring)
    work = partial(curve, task, CurveSpec(2, 2), False, None, points=2, share_points=False)
    check_same(work(), together(work, tmp_path / "ranks"))


def test_three_processes_and_a_sharded_base(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    work = partial(curve, task, CurveSpec(2, 2), True, None, objective=HINGE, gradient_checkpointing=True)
    check_same(work(), together(work, tmp_path / "ranks", 3))


def test_dropout_is_not_the_same_in_both(tmp_path: Path) -> None:
    task = task_of(tmp_path)

    def masks(rank: int) -> Tensor:
        model = CurveModel(tiny("qwen2", vocabulary=vocabulary(task)), lora_config("qwen2", lora_dropout=0.5))
        fit(model, task, shared_points(steps=1, batch_size=4), **QUIET)
        return torch.rand(4)  # where the global generator stands

    first, second = together(masks, tmp_path / "ranks")
    assert not torch.equal(first, second)


def counted(task: Task, split: str, shard: bool, rank: int = 0) -> tuple[Predictive, list[int]]:
    """Predictions of a split, and the numbers of the examples that this process ran."""
    model = model_of(task, CurveSpec(2, 2))
    if shard:
        shard_base(model)
    encoded = task.encode(split)
    seen: list[int] = []
    for runs, name in ((model, "point_log_probs"), (model.merger, "log_probs")):
        inner = getattr(runs, name)

        def noted(batch: Any, *rest: Any, inner: Any = inner, name: str = name) -> Tensor:
            if name == "point_log_probs" or len(seen) < len(encoded):
                seen.extend(batch.index.tolist())
            return inner(batch, *rest)

        object.__setattr__(runs, name, noted)
    way = "points" if shard else "auto"
    return predict_splits(model, {split: encoded}, torch.linspace(0, 1, 3, dtype=torch.float64), way=way)[split], seen


@pytest.mark.parametrize("shard", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("scoring", ["letter", "lm"])
def test_every_example_is_predicted_once(scoring: str, shard: bool, tmp_path: Path) -> None:
    task = task_of(tmp_path, scoring)
    expected, alone = counted(task, "test", False)
    several = together(partial(counted, task, "test", shard), tmp_path / "ranks")
    ran = [sorted(set(seen)) for _, seen in several]
    assert sorted(ran[0] + ran[1]) == sorted(set(alone)), "each in one process"
    assert all(ran)
    for found, _ in several:
        assert found.label_log_probs is None or torch.equal(found.label_log_probs, several[0][0].label_log_probs)
        for name in ("entropy", "mutual_information", "confidence"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-7)
        if scoring == "letter":
            torch.testing.assert_close(found.point_log_probs, expected.point_log_probs, rtol=1e-5, atol=1e-6)


def of_base(task: Task, shard: bool, rank: int = 0) -> Predictive:
    model = model_of(task, CurveSpec(2, 2))
    if shard:
        shard_base(model)
    return predict_base(model, task.encode("test"))


@pytest.mark.parametrize("shard", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("scoring", ["letter", "lm"])
def test_the_base_is_predicted_by_all_processes(scoring: str, shard: bool, tmp_path: Path) -> None:
    task = made_task(tmp_path, "qwen2", scoring, {"train": 8, "validation": 1, "test": 3})  # one process has two
    expected = of_base(task, False)
    for found in together(partial(of_base, task, shard), tmp_path / "ranks"):
        torch.testing.assert_close(found.entropy, expected.entropy, rtol=1e-5, atol=1e-7)
        known = None if scoring == "lm" else task.encode("test").labels
        nll = [p.negative_log_likelihood(known) for p in (found, expected)]
        torch.testing.assert_close(*nll, rtol=1e-5, atol=1e-6)


def test_fewer_examples_than_processes(tmp_path: Path) -> None:
    task = made_task(tmp_path, "qwen2", "letter", {"train": 8, "validation": 1, "test": 2})
    expected, _ = counted(task, "test", False)
    for shard in (False, True):
        for found, _ in together(partial(counted, task, "test", shard), tmp_path / f"ranks{shard}", 3):
            torch.testing.assert_close(found.point_log_probs, expected.point_log_probs, rtol=1e-5, atol=1e-6)


def test_shares_of_evaluation_have_like_lengths(tmp_path: Path) -> None:
    encoded = task_of(tmp_path).encode("train")

    def tokens(rank: int) -> tuple[list[int], int]:
        batches = [*evaluation_batches(encoded, shared=True)]
        numbers = [i for b in batches for i in b.index.tolist()]
        return numbers, sum(len(encoded.examples[i].prompt) for i in numbers)

    (first, a), (second, b) = together(tokens, tmp_path / "ranks")
    assert sorted(first + second) == list(range(41)) and len(first) == 21
    assert abs(a - b) <= max(len(e.prompt) for e in encoded.examples)


def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    whole = curve(task, CurveSpec(2, 2), False, None)
    work = partial(curve, task, CurveSpec(2, 2))
    together(partial(work, False, tmp_path / "a", stop_after=2), tmp_path / "ranks")
    check_same(whole, [work(False, tmp_path / "a")])
    work(False, tmp_path / "b", stop_after=2)
    check_same(whole, together(partial(work, True, tmp_path / "b"), tmp_path / "ranks"))


def test_a_micro_batch_has_an_example_for_each_process(tmp_path: Path) -> None:
    task = task_of(tmp_path)

    def refused(rank: int) -> str:
        with pytest.raises(UserError) as error:
            curve(task, CurveSpec(1, 2), False, None, accumulation=3)
        return str(error.value)

    for text in together(refused, tmp_path / "ranks"):
        assert text.startswith(
            "batch_size: expected micro-batches of at least 2 examples for 2 processes, found 5 in 3"
        )


def test_a_loss_that_is_not_finite_stops_all(tmp_path: Path) -> None:
    task = task_of(tmp_path)

    def stopped(rank: int) -> str:
        with pytest.raises(UserError) as error:
            curve(task, CurveSpec(1, 2), False, tmp_path / "run", steps=50, learning_rate=1e30, max_grad_norm=0)
        return str(error.value)

    first, second = together(stopped, tmp_path / "ranks")
    assert first == second and "lower learning_rate" in first


def test_the_launcher_may_ask_for_fsdp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not asked_to_shard()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="fsdp_version: expected 2, found 1"):
        asked_to_shard()
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert asked_to_shard()
    task = task_of(tmp_path)
    model = model_of(task, CurveSpec(1, 2))
    shard_base(model)
    assert not model.runner.sharded, "one process has it whole"

    def held(rank: int) -> tuple[int, str]:
        shard_base(model)
        layer = model.model.get_submodule("model.layers.0.mlp.up_proj.base_layer")
        with pytest.raises(UserError) as error:
            fit(model, task, shared_points(perturbation=PerturbationConfig("flat_lora")), **QUIET)
        return layer.weight.to_local().numel(), str(error.value)

    (first, said), (second, _) = together(held, tmp_path / "ranks")
    assert first == second == 32 * 64 // 2
    assert said.startswith("perturbation.kind: expected none, lora_space or sam")


def said_by(arguments: list[str], rank: int) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    model, data = base_folder(folder / "base", "qwen2"), data_folder(folder / "data", "letter")
    return [str(config_file(folder / "config.yaml", model, data, "letter")), *QUICK]


def test_commands_write_and_speak_once(inputs: list[str], tmp_path: Path) -> None:
    run = tmp_path / "two"
    run_fit = ["fit", *inputs, "--out", str(run)]
    (code, out, _), other = together(partial(said_by, run_fit), tmp_path / "ranks", join=False)
    assert code == 0 and f"The run is in {run}" in out and other == (0, "", "")
    assert main(["fit", *inputs, "--out", str(tmp_path / "one")]) == 0
    two, one = read_json(run / "metrics.json"), read_json(tmp_path / "one" / "metrics.json")
    assert two["training"]["processes"] == {"count": 2, "examples": [2, 2], "backend": "gloo", "base": "whole"}
    assert one["training"]["processes"] == {"count": 1, "examples": [4], "backend": None, "base": "whole"}
    assert two["methods"].keys() == one["methods"].keys()
    for name, method in one["methods"].items():
        for key in ("nll", "acc", "brier"):
            assert two["methods"][name]["sets"]["test"][key] == pytest.approx(method["sets"]["test"][key], abs=2e-4)
    assert not list(run.rglob(".*"))
    # Evaluation, spread over three, of a run that is sharded by its config.
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("shard: false", "shard: true"))
    for result in together(partial(said_by, ["evaluate", str(run)]), tmp_path / "ranks", 3, join=False):
        assert result[0] == 0, result
    (metrics,) = (run / "evaluations").glob("*/metrics.json")
    again = read_json(metrics)["methods"]["curve"]["sets"]["test"]
    assert again["nll"] == pytest.approx(two["methods"]["curve"]["sets"]["test"]["nll"], abs=1e-5)
    rows = Path(json.loads(Path(inputs[0]).read_text())["task"]["data"]) / "test.jsonl"
    results = together(partial(said_by, ["predict", str(run), str(rows)]), tmp_path / "ranks", join=False)
    lines = [json.loads(line) for line in results[0][1].splitlines()]
    assert [line["id"] for line in lines] == [json.loads(r)["id"] for r in rows.read_text().splitlines()]
    assert results[1] == (0, "", "")


def test_faults_are_told_once(inputs: list[str], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    full = ["fit", *inputs, "--out", str(tmp_path / "full")]
    unknown = ["fit", *inputs, "--curve.anchor", "3", "--out", str(tmp_path / "new")]
    for arguments, words in (
        (full, "exists already"),
        (unknown, "unknown option"),
        (["bench", "smoke"], "one process"),
    ):
        results = together(partial(said_by, arguments), tmp_path / "ranks", join=False)
        said = [err for _, _, err in results if err]
        assert [code for code, _, _ in results] == [2, 2]
        assert len(said) == 1 and words in said[0] and said[0].count("\n") == 1, said


def test_a_fault_of_one_process_ends_the_launcher(inputs: list[str], tmp_path: Path) -> None:
    """Through torchrun: the second process alone finds no configuration."""
    script = tmp_path / "one_fails.py"
    script.write_text(
        "import os, sys\n"
        "from loracurve.cli import main\n"
        "config = sys.argv[1] if os.environ['RANK'] == '0' else sys.argv[1] + '.missing'\n"
        "sys.exit(main(['fit', config, *sys.argv[2:]]))\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [*launch, script, *inputs, "--out", tmp_path / "run"]
    found = ran(words, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert found.returncode != 0
    said = [line for line in found.stderr.splitlines() if line.startswith("loracurve: ")]
    assert len(said) == 1 and ".missing" in said[0]
    assert "exitcode  : 2" in found.stderr and "cli.py" not in found.stderr
