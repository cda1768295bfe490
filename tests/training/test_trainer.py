"""CurveTrainer: the loss and its gradient by hand, what stays frozen, saving and resuming, and the example."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.made_runs import base_folder
from helpers.tiny import adapters_on, lora_config, peft_twin, random_points, tiny
from helpers.tokenizers_made import qwen_style
from helpers.trainers import arguments, rows, run_example

from loracurve.curve.sampling import sample_points
from loracurve.curve.spec import CurveSpec
from loracurve.model.curve_model import CurveModel
from loracurve.system.errors import UserError
from loracurve.system.randomness import generator
from loracurve.training.config import ObjectiveConfig
from loracurve.training.trainer import CurveTrainer


def built(architecture: str = "qwen2", spec: CurveSpec | None = None) -> tuple[CurveModel, torch.nn.Module]:
    base = tiny(architecture)
    untouched = copy.deepcopy(base)
    model = CurveModel(base, lora_config(architecture), spec or CurveSpec(2, 2))
    model.set_curve(model.spec, random_points(model))
    return model, untouched


def batch(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in examples]) for name in examples[0]}


@pytest.mark.parametrize("architecture", ["llama", "encoder"])
def test_loss_and_evaluation_are_those_of_peft_adapters(architecture: str, tmp_path: Path) -> None:
    classifier = architecture == "encoder"
    model, base = built(architecture)
    examples = rows(7, classifier)
    trainer = CurveTrainer(model, arguments(tmp_path), points=3, evaluation_points=4, eval_dataset=examples)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):  # BERT's own
            module.p = 0.0
    inputs = batch(examples)
    t = sample_points((3,), "stratified", generator(5, "trainer", 0, 0, 0))
    grid = torch.linspace(0, 1, 4, dtype=torch.float64)

    def at(points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities [n, E, C] and labels [E] by a loop over PEFT adapters."""
        twin, out = peft_twin(base, model.config, adapters_on(model, points)), []
        for i in range(len(points)):
            twin.set_adapter(f"p{i}")
            with torch.no_grad():
                out.append(twin(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits)
        probs = torch.stack(out).double().softmax(-1)
        if classifier:
            return probs, inputs["labels"]
        known = inputs["labels"][:, 1:].flatten() != -100
        return probs[:, :, :-1].flatten(1, 2)[:, known], inputs["labels"][:, 1:].flatten()[known]

    probs, labels = at(t)
    expected = -probs[:, torch.arange(len(labels)), labels].log().mean()
    model.train()
    assert trainer.compute_loss(model, inputs).item() == pytest.approx(float(expected), rel=1e-5)
    probs, labels = at(grid)
    average = -probs.mean(0)[torch.arange(len(labels)), labels].log()
    if classifier:
        # Trainer's batches are of 5 and 2, and it weighs them by size.
        assert trainer.evaluate()["eval_loss"] == pytest.approx(float(average.mean()), rel=1e-5)
        found = trainer.predict(examples)
        assert torch.allclose(torch.tensor(found.predictions).double(), probs.mean(0).log(), atol=1e-5)
        unlabelled = [{k: v for k, v in row.items() if k != "labels"} for row in examples]
        assert (trainer.predict(unlabelled).predictions == found.predictions).all()
    else:
        model.eval()
        assert trainer.compute_loss(model, inputs).item() == pytest.approx(float(average.mean()), rel=1e-5)


def test_one_step_moves_the_control_points_along_their_gradient(tmp_path: Path) -> None:
    """SGD on two micro-batches: P - rate * mean over them of c(t)'s gradient, computed by the model itself."""
    model, _ = built()
    twin = copy.deepcopy(model).train()
    examples = rows(8)
    options = {
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
    }
    args = arguments(tmp_path, gradient_accumulation_steps=2, train_sampling_strategy="sequential", **options)
    CurveTrainer(model, args, points=2, train_dataset=examples).train()
    for micro in range(2):
        inputs = batch(examples[4 * micro : 4 * micro + 4])
        t = sample_points((2,), "stratified", generator(5, "trainer", 0, micro, 0))
        labels = inputs["labels"].repeat(2, 1)
        logits = twin(t=t, input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        shifted = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        (torch.nn.functional.cross_entropy(*shifted) / 2).backward()
    for moved, before in zip(model.factors, twin.factors, strict=True):
        assert torch.allclose(moved, before - 0.1 * before.grad, atol=1e-6)  # type: ignore[operator]
        assert not torch.equal(moved, before)


def test_anchors_stay_and_the_curve_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    model, _ = built(spec=CurveSpec.anchored(2))
    before = {n: p.clone() for n, p in model.control_points().items()}
    examples = rows(4)
    tracked = {"report_to": "tensorboard", "logging_strategy": "steps", "logging_steps": 5}
    args = arguments(tmp_path, max_steps=15, learning_rate=3e-2, **tracked)
    trainer = CurveTrainer(model, args, train_dataset=examples, eval_dataset=examples)
    started = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.9 * started and list((tmp_path / "events").iterdir())
    for name, after in model.control_points().items():
        assert torch.equal(after[[0, 2]], before[name][[0, 2]]) and not torch.equal(after[1], before[name][1])


def test_a_resumed_run_equals_one_in_one_piece(tmp_path: Path) -> None:
    examples, tokenizer = rows(), qwen_style()

    def run(folder: Path, resume: bool = False, **options: Any) -> CurveModel:
        model, _ = built(spec=CurveSpec.anchored(2))
        args = arguments(folder, save_strategy="steps", save_steps=2, **options)
        trainer = CurveTrainer(model, args, points=2, train_dataset=examples, processing_class=tokenizer)
        trainer.train(resume_from_checkpoint=resume or None)
        return model

    whole = run(tmp_path / "whole")
    files = sorted(p.name for p in (tmp_path / "whole" / "checkpoint-2").iterdir())
    assert {"curve_config.json", "control_points.safetensors", "tokenizer.json"} <= set(
        files
    ) and "model.safetensors" not in files
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    resumed = run(tmp_path / "again", resume=True)
    for a, b in zip(whole.factors, resumed.factors, strict=True):
        assert torch.equal(a, b)
    loaded = CurveModel.from_pretrained(tmp_path / "again" / "checkpoint-4", tiny("qwen2"))
    assert all(torch.equal(a, b) for a, b in zip(loaded.factors, whole.factors, strict=True))


def test_the_best_state_comes_back(tmp_path: Path) -> None:
    model, _ = built("encoder")
    examples = rows(4, True)
    otherwise = [row | {"labels": (row["labels"] + 1) % 3} for row in examples]  # what is learnt is wrong of these
    args = arguments(
        tmp_path,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
    )
    trainer = CurveTrainer(model, args, train_dataset=examples, eval_dataset=otherwise)
    trainer.train()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert losses[-1] > losses[0] == min(losses)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


def test_options_that_would_do_something_else_are_refused(tmp_path: Path) -> None:
    model, _ = built()
    for options, message in (
        ({"weight_decay": 0.1}, "weight_decay: expected 0.0, found 0.1; .* use loracurve.fit"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: expected 0.0"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing: expected False"),
        ({"bf16": True}, "bf16: expected False, found True; load the base in bfloat16"),
    ):
        args = arguments(tmp_path)
        for name, value in options.items():
            setattr(args, name, value)
        with pytest.raises(UserError, match=message):
            CurveTrainer(model, args)
    with pytest.raises(UserError, match="compute_loss_func: expected none"):
        CurveTrainer(model, arguments(tmp_path), compute_loss_func=lambda *a: 0)
    with pytest.raises(UserError, match="an even number with sampling half-period"):
        CurveTrainer(model, arguments(tmp_path), points=3, sampling="half-period")
    with pytest.raises(UserError, match="objective.tau"):
        CurveTrainer(model, arguments(tmp_path), points=2, objective=ObjectiveConfig("hinge", 1.0))
    with pytest.raises(UserError, match="found closed.* or shared ones"):
        CurveTrainer(built(spec=CurveSpec(2, 2, closed=True))[0], arguments(tmp_path))
    with pytest.raises(UserError, match="expected labels in every batch"):
        CurveTrainer(model, arguments(tmp_path)).compute_loss(model, {"input_ids": torch.ones(1, 3).long()})


def test_the_example_and_the_script_that_it_comes_from_run(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", "qwen2")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(["the film is good and plain", "it was a dull story", ""] * 12))
    for name in ("plain_trainer", "trainer"):
        places = ["--model", base, "--text", text, "--out", tmp_path / name]
        assert "eval_loss" in run_example(f"{name}.py", tmp_path, *places, "--steps", 3)
    assert (tmp_path / "plain_trainer" / "trained" / "adapter_model.safetensors").is_file()
    assert not CurveModel.from_pretrained(tmp_path / "trainer" / "trained").spec.trainable.count(False)


def test_eval_loss_of_unequal_rows_is_the_mean_of_batches_weighted_by_rows(tmp_path: Path) -> None:
    """As docs/trainer.md has it: of the averaged probabilities, and not the NLL per token."""
    model, base = built("llama")
    examples = rows(5)
    for row, hidden in zip(examples, (3, 8, 5, 3, 7), strict=True):
        row["labels"] = [-100] * hidden + row["input_ids"][hidden:]
    grid = torch.linspace(0, 1, 3, dtype=torch.float64)
    twin = peft_twin(base, model.config, adapters_on(model, grid))

    def nll(part: list[dict[str, Any]]) -> torch.Tensor:
        """Of each label token of some rows, by a loop over PEFT adapters."""
        inputs, probs = batch(part), []
        for i in range(len(grid)):
            twin.set_adapter(f"p{i}")
            with torch.no_grad():
                probs.append(twin(input_ids=inputs["input_ids"]).logits[:, :-1].double().softmax(-1))
        labels = inputs["labels"][:, 1:]
        known = labels != -100
        return -torch.stack(probs).mean(0)[known].gather(-1, labels[known][:, None]).log()[:, 0]

    for size, batches in ((2, ([0, 1], [2, 3], [4])), (1, ([0], [1], [2], [3], [4]))):
        args = arguments(tmp_path, per_device_eval_batch_size=size)
        found = CurveTrainer(model, args, evaluation_points=3, eval_dataset=examples).evaluate()["eval_loss"]
        parts = [[examples[i] for i in numbers] for numbers in batches]
        expected = sum(len(part) * float(nll(part).mean()) for part in parts) / len(examples)
        assert found == pytest.approx(expected, rel=1e-5)
        assert found != pytest.approx(float(nll(examples).mean()), rel=1e-3)
