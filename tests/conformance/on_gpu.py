"""The ways that only a GPU has (captured, packed) against the CPU, for some families; writes a table.

`PYTHONPATH=tests python -m conformance.on_gpu RESULTS.json [cuda]` on a machine with a GPU; with `cpu` it tries itself
out. The CPU's numbers are those that the matrix holds against plain transformers and PEFT.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import peft
import torch
import transformers
from torch import Tensor, nn

from conformance import reference
from conformance.families import FAMILIES
from conformance.made_rows import VOCABULARY, made_tokenizer, write_task
from conformance.ways import POINTS, predictions
from loracurve.curve.spec import CurveSpec
from loracurve.inference.prediction import predict_split
from loracurve.model.curve_model import CurveModel
from loracurve.system.files import write_json
from loracurve.tasks.config import TaskConfig
from loracurve.tasks.encoding import Encoded
from loracurve.tasks.task import Task, load_task
from loracurve.training.config import FitConfig
from loracurve.training.fit import fit

CAUSAL = ["llama", "qwen2", "mistral", "gemma2", "phi3", "gpt2", "gpt_neox", "qwen3_moe"]
CLASSIFIERS = ["roberta", "deberta-v2", "xlnet", "modernbert", "qwen2"]
STEPS = 4
WORKERS = 4


def curve(name: str, dtype: torch.dtype) -> CurveModel:
    """A curve of random control points, the same at each call."""
    family = FAMILIES[name]
    base = family.build(VOCABULARY).to(dtype)
    config: peft.LoraConfig = reference.adapter_config(family, base, "plain")
    model = CurveModel(base, config, CurveSpec(2, 2)).eval()
    draw = torch.Generator().manual_seed(1)
    points = {n: p + 0.1 * torch.randn(p.shape, generator=draw) for n, p in model.control_points().items()}
    model.set_curve(model.spec, points)
    return model


def task_of(name: str, scoring: str, length: str, folder: Path, model: CurveModel) -> Task:
    family = FAMILIES[name]
    pad = family.config(VOCABULARY).get_text_config().pad_token_id
    style = "xlnet" if family.model_type == "xlnet" else "encoder" if family.encoder else "bos"
    data = write_task(folder, scoring, length, family.encoder, 7)
    return load_task(TaskConfig(str(data), scoring), made_tokenizer(style, "right", pad or 0), model.window)  # type: ignore[arg-type]


def captured(model: CurveModel, encoded: Encoded) -> Tensor:
    """The points together until their graphs have been captured, and from these."""
    with torch.inference_mode():
        for _ in range(3):
            found = predictions(model, encoded, "points")
    return found


def merged(model: CurveModel, encoded: Encoded) -> Tensor:
    """Each point often enough that its predictions come from graphs that were captured at another."""
    if encoded.scoring == "lm":
        return predictions(model, encoded, "merged")
    found = predict_split(model, encoded, POINTS.repeat(3), way="merged").point_log_probs
    assert found is not None
    return found[-len(POINTS) :].double()


WAYS: dict[str, Callable[[CurveModel, Encoded], Tensor]] = {
    "captured": captured,
    "rows": lambda model, encoded: predictions(model, encoded, "rows"),
    "tokens": lambda model, encoded: predictions(model, encoded, "tokens"),
    "merged": merged,
}


def trained(name: str, scoring: str, folder: Path, device: str, capture: bool) -> dict[str, Tensor]:
    """Control points after some steps from the same ones, without dropout, whose draws differ in graphs."""
    model = curve(name, torch.float32)
    task = task_of(name, scoring, "short", folder, model)
    for module in model.modules():
        for key, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in key or (isinstance(module, nn.Dropout) and key == "p")):
                setattr(module, key, 0.0)
    options = FitConfig(steps=STEPS, batch_size=4, learning_rate=1e-2, capture=capture, evaluate_every=STEPS)
    fit(model.to(device), task, options, progress=False)
    return model.control_points()


def differences(name: str, device: str) -> dict[str, float | str]:
    """By way and data, the largest difference from the CPU, relative to the size of log-probabilities or weights where
    that is above 1; or what failed."""
    with tempfile.TemporaryDirectory() as folder:
        return _differences(name, device, Path(folder))


def _differences(name: str, device: str, folder: Path) -> dict[str, float | str]:
    out: dict[str, float | str] = {}
    classifier = FAMILIES[name].kind == "classifier"
    for scoring in ["head"] if classifier else ["label", "text", "lm"]:
        for length in ["short", "long"]:
            here = f"{scoring} {length}"
            expected, own = None, folder / here.replace(" ", "-")
            for way, run in WAYS.items():
                if way == "tokens" and classifier:
                    continue
                model = curve(name, torch.float32)
                encoded = task_of(name, scoring, length, own, model).encode("test")
                if expected is None:
                    expected = predictions(model, encoded, "points")
                try:
                    found = run(model.to(device), encoded).cpu()
                except Exception as error:  # the table shall say it
                    out[f"{way} {here}"] = f"{type(error).__name__}: {error}"[:200]
                    continue
                there = expected.isfinite()
                scale = max(1.0, float(expected[there].abs().max()))
                out[f"{way} {here}"] = float((found - expected)[there].abs().max()) / scale
        try:
            eager, graphs = (trained(name, scoring, folder / f"{scoring}-{c}", device, c) for c in (False, True))
            worst = max(float((graphs[n] - p).abs().max() / p.abs().max()) for n, p in eager.items())
            out[f"trained, captured and not, {scoring}"] = worst
        except Exception as error:
            out[f"trained {scoring}"] = f"{type(error).__name__}: {error}"[:200]
    return out


def main(target: str, device: str = "cuda") -> None:
    """Write the differences of all families and print the worst of each."""
    names = [*(f"causal: {n}" for n in CAUSAL), *(f"classifier: {n}" for n in CLASSIFIERS)]
    table: dict[str, dict[str, float | str]] = {}
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as pool:
        for name, found in zip(names, pool.map(differences, names, [device] * len(names)), strict=True):
            table[name] = found
            numbers = [v for v in found.values() if isinstance(v, float)]
            failures = [f"{k}: {v}" for k, v in found.items() if isinstance(v, str)]
            worst = max(numbers, default=float("nan"))
            print(f"{name}: worst {worst:.2g} of {len(numbers)}", *failures, sep="\n  ", flush=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    where = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    record = {"device": where, "versions": versions, "points": POINTS.tolist(), "steps": STEPS}
    write_json(Path(target), {**record, "differences": table})
    print(json.dumps(record))


if __name__ == "__main__":
    main(*sys.argv[1:])
