"""CurveSFTTrainer: what TRL's own SFTTrainer computes with a PEFT adapter, what is refused, and the example."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.made_runs import base_folder
from helpers.tiny import lora_config, peft_twin, tiny
from helpers.tokenizers_made import llama_style
from helpers.trainers import run_example

from loracurve.curve.lora_space import adapter_at
from loracurve.curve.spec import CurveSpec
from loracurve.inference.config import GenerateConfig
from loracurve.inference.generation import generate
from loracurve.model.curve_model import CurveModel
from loracurve.system.errors import UserError

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from loracurve.training.sft import CurveSFTTrainer  # noqa: E402

TEXTS = ["the film is good and plain", "it was a dull story", "a truly lovely one", "this music feels rather awful"]
ASSISTANT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def rows(kind: str) -> Any:
    """Examples in one of the forms that SFTTrainer takes."""
    if kind in ("text", "packed"):
        return datasets.Dataset.from_list([{"text": t} for t in TEXTS])
    pairs = [t.rsplit(" ", 1) for t in TEXTS]
    if kind == "completion":
        return datasets.Dataset.from_list([{"prompt": a, "completion": f" {b}"} for a, b in pairs])
    turns = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairs]
    return datasets.Dataset.from_list([{"messages": m} for m in turns])


def arguments(folder: Path, **options: Any) -> Any:
    values: dict[str, Any] = {
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    return trl.SFTConfig(str(folder), **(values | options))


def flat_curve() -> tuple[CurveModel, Any, torch.nn.Module]:
    """A curve that stays in one point, so that every position is one adapter: model, tokenizer and its PEFT twin."""
    tokenizer = llama_style()
    tokenizer.chat_template = ASSISTANT
    base, config = tiny("llama", vocabulary=len(tokenizer)), lora_config("llama")
    untouched = tiny("llama", vocabulary=len(tokenizer))
    model = CurveModel(base, config, CurveSpec(1, 2))
    draw = torch.Generator().manual_seed(2)
    points = {n: 0.2 * torch.randn(p[:1].shape, generator=draw) for n, p in model.control_points().items()}
    model.set_curve(model.spec, {n: p.expand(3, *p.shape[1:]) for n, p in points.items()})
    return model, tokenizer, peft_twin(untouched, config, [{n: p[0] for n, p in points.items()}])


@pytest.mark.parametrize("kind", ["text", "completion", "messages", "packed"])
def test_a_curve_in_one_point_moves_as_trl_moves_its_adapter(kind: str, tmp_path: Path) -> None:
    """All control points together move by c_1 + ... + c_K = 1 times the adapter's gradient."""
    model, tokenizer, twin = flat_curve()
    before = model.control_points()
    packed = {"packing": True, "packing_strategy": "wrapped", "max_length": 8} if kind == "packed" else {}
    mine = CurveSFTTrainer(
        model,
        arguments(tmp_path / "curve", **packed),
        points=2,
        train_dataset=rows(kind),
        eval_dataset=rows(kind),
        processing_class=tokenizer,
    )
    twin.set_adapter("p0")
    theirs = trl.SFTTrainer(
        twin,
        arguments(tmp_path / "adapter", **packed),
        train_dataset=rows(kind),
        eval_dataset=rows(kind),
        processing_class=tokenizer,
    )
    assert mine.evaluate()["eval_loss"] == pytest.approx(theirs.evaluate()["eval_loss"], rel=1e-5)
    started = {n: p.detach().clone() for n, p in twin.named_parameters() if "lora_" in n}
    mine.train()
    theirs.train()
    moved = 0.0
    for name, parameter in twin.named_parameters():
        if "lora_" not in name:
            continue
        plain = name.replace(".p0.", ".")
        step = (model.control_points()[plain] - before[plain]).sum(0)
        torch.testing.assert_close(step, parameter.detach() - started[name], rtol=1e-4, atol=1e-6)
        moved += float(step.abs().sum())
    assert moved > 0.01
    labelled = sum(label != -100 for row in mine.train_dataset["labels"] for label in row)
    expected = {"completion": [f" {t.split()[-1]}" for t in TEXTS], "text": TEXTS}.get(kind)
    if expected:  # and the end of each
        assert labelled == sum(len(tokenizer(t, add_special_tokens=kind == "text")["input_ids"]) for t in expected) + 4


def test_the_model_is_as_it_was_when_the_trainer_is_made(tmp_path: Path) -> None:
    model, tokenizer, _ = flat_curve()
    trainer = CurveSFTTrainer(
        model, arguments(tmp_path), train_dataset=rows("text"), eval_dataset=rows("text"), processing_class=tokenizer
    )
    assert "forward" not in vars(model.model) and trainer.model is model
    first = generate(model, tokenizer, "the", GenerateConfig(max_new_tokens=3))
    found = trainer.predict(trainer.eval_dataset)
    assert found.predictions.shape[2] == len(tokenizer)
    trainer.save_model(str(tmp_path / "out"))
    assert not (tmp_path / "README.md").exists()
    loaded = CurveModel.from_pretrained(tmp_path / "out", tiny("llama", vocabulary=len(tokenizer)))
    assert generate(loaded, tokenizer, "the", GenerateConfig(max_new_tokens=3))[0].text == first[0].text
    adapter = adapter_at(loaded.control_points(), torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    assert all(torch.equal(p, model.control_points()[n][0]) for n, p in adapter.items())


def test_options_that_would_do_something_else_are_refused(tmp_path: Path) -> None:
    model, tokenizer, _ = flat_curve()
    for options, message in (
        ({"gradient_checkpointing": True}, "gradient_checkpointing: expected False, found True"),
        ({"loss_type": "dft"}, "loss_type: expected nll, found dft; the loss is the likelihood"),
        ({"padding_free": True}, "padding_free: expected False"),
        ({"packing": True}, "packing_strategy: expected wrapped, found bfd"),
        ({"neftune_noise_alpha": 1.0}, "neftune_noise_alpha: expected None"),
    ):
        with pytest.raises(UserError, match=message):
            CurveSFTTrainer(model, arguments(tmp_path, **options), processing_class=tokenizer)
    with pytest.raises(UserError, match="peft_config: expected none"):
        CurveSFTTrainer(model, arguments(tmp_path), processing_class=tokenizer, peft_config=lora_config("llama"))
    with pytest.raises(UserError, match="processing_class: expected the model's tokenizer"):
        CurveSFTTrainer(model, arguments(tmp_path))
    classifier = CurveModel(tiny("encoder"), lora_config("encoder"), CurveSpec(1, 1))
    with pytest.raises(UserError, match="expected a causal language model"):
        CurveSFTTrainer(classifier, arguments(tmp_path), processing_class=tokenizer)


def test_the_example_and_the_script_that_it_comes_from_run(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", "llama")
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in list(rows("completion")) * 6))
    for name in ("plain_sft", "sft"):
        places = ["--model", base, "--data", data, "--out", tmp_path / name]
        assert "eval_loss" in run_example(f"{name}.py", tmp_path, *places, "--steps", 3)
    assert (tmp_path / "plain_sft" / "trained" / "adapter_model.safetensors").is_file()
    assert not CurveModel.from_pretrained(tmp_path / "sft" / "trained").spec.trainable.count(False)
