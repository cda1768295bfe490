"""Checkpoints: what goes on, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import matrix
from helpers.matrix import QUIET, build

from loracurve.curve.spec import CurveSpec
from loracurve.model.curve_model import CurveModel
from loracurve.system.errors import CheckpointError, UserError
from loracurve.system.files import read_json, write_json
from loracurve.tasks.task import Task
from loracurve.training import loop
from loracurve.training.checkpoint import Checkpoint, LoopState, checksum, load_checkpoint, save_checkpoint
from loracurve.training.config import FitConfig, PerturbationConfig
from loracurve.training.fit import fit
from loracurve.training.loop import learning_rate_factor

CONFIG = FitConfig(steps=4, batch_size=4, learning_rate=1e-2, checkpoint_every=1, evaluation_points=4, keep="last")


def test_a_checkpoint_comes_back_onto_the_device_of_the_factors(tmp_path: Path) -> None:
    """Moments and counts of steps too: a kernel that reads another device's memory ends the process."""
    factors = [torch.ones(2, 3, requires_grad=True)]
    optimizer = torch.optim.AdamW(factors, fused=True)
    factors[0].grad = torch.ones(2, 3)
    optimizer.step()
    state = LoopState(1, [torch.zeros(2, 3)], [0.5], [1], [0], [{"step": 1, "nll": 0.5}])
    save_checkpoint(tmp_path, factors, optimizer, state)
    elsewhere = [torch.ones(2, 3, device="meta", requires_grad=True)]
    other = torch.optim.AdamW(elsewhere, fused=True)
    found = LoopState(0, [torch.zeros(2, 3, device="meta")], [math.inf], [0], [0], [])
    load_checkpoint(tmp_path, elsewhere, other, found)
    assert found.step == 1 and found.best_nll == [0.5]
    assert {k: v.device.type for k, v in other.state[elsewhere[0]].items()} == dict.fromkeys(
        ("step", "exp_avg", "exp_avg_sq"), "meta"
    )


@pytest.mark.parametrize(
    ("seconds", "every", "saved"), [(0.0, 0, [2, 4, 6]), (math.inf, 0, [6]), (math.inf, 1, [*range(1, 7)])]
)
def test_by_default_a_checkpoint_is_written_at_a_validation_and_not_sooner_than_a_minute_after_the_last(
    seconds: float, every: int, saved: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    write = Checkpoint.save
    monkeypatch.setattr(loop, "BETWEEN_CHECKPOINTS", seconds)
    monkeypatch.setattr(Checkpoint, "save", lambda self, state: (steps.append(state.step), write(self, state)))
    model, _, task = build("qwen2", tmp_path / "data", CurveSpec(1, 2), r=2)
    fit(model, task, replace(CONFIG, steps=6, evaluate_every=2, checkpoint_every=every), tmp_path / "kept", **QUIET)
    assert steps == saved


class Begun:
    """A curve of which two steps of four were trained, and its checkpoint."""

    def __init__(self, folder: Path, spec: CurveSpec, **options: Any) -> None:
        self.model, _, self.task = build("qwen2", folder / "data", spec, r=2)
        self.start = self.model.control_points()
        self.kept = folder / "kept"
        self.config = replace(CONFIG, **options)
        fit(self.model, self.task, self.config, self.kept, stop_after=2, **QUIET)

    def again(
        self, folder: Path, model: CurveModel | None = None, task: Task | None = None, **options: Any
    ) -> dict[str, Any]:
        """What the result says, once the training has gone on in `folder` with other options."""
        model = model or self.model
        model.set_curve(model.spec, self.start if model is self.model else model.control_points())
        return vars(fit(model, task or self.task, replace(self.config, **options), folder, **QUIET))

    def refused(self, folder: Path, *words: str, **options: Any) -> str:
        """The one line that refuses it; nothing in the folder or in the model has changed by it."""
        before = {p.name: p.read_bytes() for p in folder.iterdir()}
        with pytest.raises(CheckpointError) as error:
            self.again(folder, **options)
        said = str(error.value)
        assert "\n" not in said and all(word in said for word in words), said
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
        model = options.get("model") or self.model
        if model is self.model:
            assert all(torch.equal(p, self.start[n]) for n, p in model.control_points().items())
        return said


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Begun:
    return Begun(tmp_path_factory.mktemp("begun"), CurveSpec(1, 2))


@pytest.fixture
def copy(begun: Begun, tmp_path: Path) -> Path:
    return Path(shutil.copytree(begun.kept, tmp_path / "copy"))


def tensors_of(folder: Path) -> Path:
    return folder / str(read_json(folder / "checkpoint.json")["tensors"])


def test_every_bit_of_the_tensors_counts(begun: Begun, copy: Path) -> None:
    file = tensors_of(copy)
    content = file.read_bytes()
    places = [0, 7, 8, 100, len(content) // 3, len(content) // 2, len(content) - 1]
    for place in places:
        spoilt = bytearray(content)
        spoilt[place] ^= 1 << place % 8
        file.write_bytes(spoilt)
        begun.refused(copy, f"{file.name} does not have its checksum", f"{copy}: ", "delete the folder")
    for size in (0, 8, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:size])
        begun.refused(copy, "does not have its checksum", "delete the folder to train again from the first step")
    file.unlink()
    begun.refused(copy, "found none", "delete the folder")
    file.write_bytes(content)
    assert begun.again(copy)["steps"] == 4


def nll(values: dict[str, Any]) -> None:
    values["history"][1]["nll"] += 1e-12


def later(values: dict[str, Any]) -> None:
    values["step"] = 3


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a loss": nll,
    "the step": later,
    "the best NLL": lambda v: v.update(best_nll=[0.0]),
    "seconds": lambda v: v.update(seconds=1.5),
    "an option": lambda v: v["origin"]["options"].update(seed=1),
    "one that came in": lambda v: v.update(more=1),
    "one that is gone": lambda v: v.pop("seconds"),
    "the checksum": lambda v: v.update(sha256="0" * 64),
    "the checksum's kind": lambda v: v.update(sha256=7),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_every_value_counts(edit: Callable[[dict[str, Any]], object], begun: Begun, copy: Path) -> None:
    values = read_json(copy / "checkpoint.json")
    edit(values)
    write_json(copy / "checkpoint.json", values)
    begun.refused(copy, "checkpoint.json does not have its checksum", "delete the folder")


def test_what_is_no_json_is_told_with_what_to_do(begun: Begun, copy: Path) -> None:
    for text in ("", "{", "[]", "null", '{"format": 2}', "\0"):
        (copy / "checkpoint.json").write_text(text)
        begun.refused(copy, "found a damaged one", "delete the folder to train again from the first step")


def test_the_layout_of_the_json_does_not_count(begun: Begun, copy: Path) -> None:
    values = read_json(copy / "checkpoint.json")
    (copy / "checkpoint.json").write_text(json.dumps(dict(sorted(values.items(), reverse=True))))
    assert begun.again(copy)["steps"] == 4


def test_counts_that_cannot_be_are_refused_with_the_right_checksum_too(begun: Begun, copy: Path) -> None:
    original = read_json(copy / "checkpoint.json")
    tensors_of(copy).rename(copy / "checkpoint-8.safetensors")
    history = original["history"] * 4
    far = {"step": 8, "tensors": "checkpoint-8.safetensors", "history": history}
    for change, word in (
        (far, "step 8 of 4"),
        ({"step": -1, "tensors": "checkpoint--1.safetensors", "history": []}, "step -1"),
        ({"history": original["history"][:1]}, "counts that cannot be"),
        ({"best_nll": [0.0, 0.0]}, "expected figures of 1 groups"),
        ({"tensors": "../kept/checkpoint-2.safetensors"}, "with tensors '../kept"),
        ({"origin": None}, "damaged"),
        ({"origin": {}}, "no 'options'"),
    ):
        values = original | change
        write_json(copy / "checkpoint.json", values | {"sha256": checksum(values)})
        begun.refused(copy, word)


@pytest.mark.parametrize(("change", "word"), [({}, "an earlier version"), ({"format": 3}, "a newer version")])
def test_other_formats(change: dict[str, Any], word: str, begun: Begun, copy: Path) -> None:
    values = read_json(copy / "checkpoint.json")
    for name in ("format", "sha256", "tensors_sha256", "origin"):
        del values[name]
    write_json(copy / "checkpoint.json", values | change)
    begun.refused(copy, "expected a checkpoint of format 2", word)


OTHER = [
    ({"seed": 1}, "seed: expected 0, as it was so far, found 1"),
    ({"steps": 8}, "steps: expected 4, as it was so far, found 8"),
    ({"steps": 1}, "steps: expected 4, as it was so far, found 1"),
    ({"batch_size": 8}, "batch_size: expected 4, as it was so far, found 8"),
    ({"betas": (0.9, 0.99)}, "betas: expected [0.9, 0.999], as it was so far, found [0.9, 0.99]"),
    ({"learning_rate": 0.02}, "learning_rate: expected at most 0.01, as it was so far, found 0.02"),
    ({"max_grad_norm": 0.0}, "max_grad_norm: expected at most 1.0, as it was so far, found 0.0"),
    ({"keep": "best"}, "keep: expected 'last', as it was so far, found 'best'"),
    ({"seed": 1, "batch_size": 8}, "batch_size: expected 4, as it was so far, found 8 (2 options differ)"),
    (
        {"perturbation": PerturbationConfig("lora_space"), "share_points": True},
        "share_points: expected False, as it was so far, found True (2 options differ)",
    ),
]


@pytest.mark.parametrize(("options", "word"), OTHER, ids=lambda o: ",".join(o) if isinstance(o, dict) else "")
def test_other_options_are_named_with_both_values(options: dict[str, Any], word: str, begun: Begun) -> None:
    begun.refused(begun.kept, word, "go on with the same options, or begin anew in another folder", **options)


def test_options_that_change_no_number_may_change_and_are_recorded(begun: Begun, copy: Path, tmp_path: Path) -> None:
    begun.model.set_curve(begun.model.spec, begun.start)
    fit(begun.model, begun.task, begun.config, tmp_path / "whole", **QUIET)
    expected = begun.model.control_points()
    found = begun.again(copy, checkpoint_every=3, gradient_checkpointing=True)
    assert found["changes"] == [
        {"step": 2, "option": "gradient_checkpointing", "before": False, "now": True},
        {"step": 2, "option": "checkpoint_every", "before": 1, "now": 3},
    ]
    assert read_json(copy / "checkpoint.json")["changes"] == found["changes"]
    for name, tensor in begun.model.control_points().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-7)
    # What is finished takes no step, so that nothing changes any more.
    assert begun.again(copy, checkpoint_every=1, gradient_checkpointing=True)["changes"] == found["changes"]


def test_a_lowered_learning_rate_is_that_of_the_steps_that_follow(begun: Begun, copy: Path) -> None:
    found = begun.again(copy, learning_rate=1e-3, max_grad_norm=0.5)
    assert found["changes"] == [
        {"step": 2, "option": "learning_rate", "before": 1e-2, "now": 1e-3},
        {"step": 2, "option": "max_grad_norm", "before": 1.0, "now": 0.5},
    ]
    peaks = [1e-2, 1e-2, 1e-3, 1e-3]
    rates = [peak * learning_rate_factor(begun.config, step) for step, peak in enumerate(peaks)]
    assert [entry["learning_rate"] for entry in found["history"]] == rates
    begun.refused(copy, "learning_rate: expected at most 0.001, as it was so far, found 0.01", max_grad_norm=0.5)
    lower = {"learning_rate": 1e-4, "max_grad_norm": 0.5}
    begun_with = "learning_rate: expected 0.001, with which all 4 steps were taken, found 0.0001"
    with pytest.raises(CheckpointError, match=begun_with):
        begun.again(copy, **lower)


def test_noise_may_be_lowered(tmp_path: Path) -> None:
    noise = PerturbationConfig("lora_space", 0.1)
    begun = Begun(tmp_path, CurveSpec(1, 2), share_points=True, perturbation=noise)
    found = begun.again(begun.kept, perturbation=replace(noise, rho=0.01))
    assert found["changes"] == [{"step": 2, "option": "perturbation.rho", "before": 0.1, "now": 0.01}]


@pytest.mark.parametrize(("at", "kept"), [(6, 4), (2, 0)])
def test_after_a_divergence_a_lower_rate_goes_on(at: int, kept: int, tmp_path: Path) -> None:
    """As the message advises: from a state that was good, and the record says from which step on."""
    model, _, task = build("qwen2", tmp_path, CurveSpec(1, 2), r=2)
    start = model.control_points()
    config = replace(CONFIG, steps=8, evaluate_every=2, checkpoint_every=2)
    lower = replace(config, learning_rate=1e-3)
    if kept:
        fit(model, task, config, tmp_path / "stopped", stop_after=kept, **QUIET)
    model.set_curve(model.spec, start)
    expected = fit(model, task, lower, tmp_path / "stopped", **QUIET)
    points = model.control_points()
    model.set_curve(model.spec, start)
    calls = 0

    def run_away(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return gradient * math.nan if calls == at else gradient

    hook = model.factors[0].register_hook(run_away)
    with pytest.raises(UserError) as error:
        fit(model, task, config, tmp_path / "run", **QUIET)
    hook.remove()
    where = f"the last good state, of step {kept}, is in {tmp_path / 'run'}" if kept else "no step is kept"
    advice = "lower learning_rate and go on (fit: --resume), or begin anew"
    assert str(error.value) == f"the gradient of the loss is not finite at step {at}; {where}; {advice}"
    assert (tmp_path / "run" / "checkpoint.json").exists() == bool(kept)
    model.set_curve(model.spec, start)
    found = fit(model, task, lower, tmp_path / "run", **QUIET)
    change = {"step": kept, "option": "learning_rate", "before": 1e-2, "now": 1e-3}
    assert found.changes == expected.changes == ([change] if kept else [])
    assert found.history == expected.history and len(found.history) == 8
    assert all(torch.equal(p, points[n]) for n, p in model.control_points().items())


def test_rows_base_adapters_and_curve_are_compared(begun: Begun, tmp_path: Path) -> None:
    kept = begun.kept
    _, _, task = build("qwen2", tmp_path / "rows", CurveSpec(1, 2), r=2)
    train = task.encode("train")
    others = {
        "train rows": lambda: train.examples.reverse(),
        "validation rows": lambda: task.encode("validation").examples.pop(),
    }
    for name, edit in others.items():
        edit()
        begun.refused(kept, f"expected the {name} that it began with, found others", task=task)
        if name == "train rows":
            train.examples.reverse()
    for shape, word in (
        (CurveSpec(2, 1), "curve.segments: expected 1, as it was so far, found 2"),
        (
            CurveSpec(1, 2, (True, False, True)),
            "curve.trainable: expected [], as it was so far, found [True, False, True]",
        ),
    ):
        other, _, _ = build("qwen2", tmp_path / f"{shape.segments}", shape, r=2)
        begun.refused(kept, word, model=other)
    other, _, _ = build("qwen2", tmp_path / "alpha", CurveSpec(1, 2), r=2, lora_alpha=5)
    begun.refused(kept, "lora.lora_alpha: expected 8, as it was so far, found 5", model=other)
    other, _, _ = build("qwen2", tmp_path / "dtype", CurveSpec(1, 2), torch.bfloat16, r=2)
    begun.refused(kept, "model.dtype: expected 'float32', as it was so far, found 'bfloat16'", model=other)
    other, _, _ = build("qwen2", tmp_path / "base", CurveSpec(1, 2), r=2)
    with torch.no_grad():
        other.model.get_input_embeddings().weight.mul_(1.5)
    begun.refused(kept, "expected the base that it began with, found another", model=other)


def test_checkpoints_of_two_trainings_are_not_exchanged(begun: Begun, copy: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    begun.model.set_curve(begun.model.spec, begun.start)
    fit(begun.model, begun.task, replace(begun.config, seed=1), other, stop_after=2, **QUIET)
    assert tensors_of(copy).name == tensors_of(other).name
    content = tensors_of(copy).read_bytes()
    tensors_of(copy).write_bytes(tensors_of(other).read_bytes())
    begun.refused(copy, "does not have its checksum")
    shutil.copy(other / "checkpoint.json", copy)
    begun.refused(copy, "seed: expected 1, as it was so far, found 0")
    tensors_of(copy).write_bytes(content)
    begun.refused(copy, "seed: expected 1")


def test_other_anchors_are_another_training(tmp_path: Path) -> None:
    begun = Begun(tmp_path, matrix.curve_of("anchored", 1))
    changed = {n: p.clone() for n, p in begun.start.items()}
    name = max(changed, key=lambda n: float(changed[n][0].norm()))
    changed[name][0] *= 1.01
    right, begun.start = begun.start, changed
    begun.refused(begun.kept, "expected the anchors that it began with, found others")
    begun.start = right
    assert begun.again(begun.kept)["steps"] == 4
