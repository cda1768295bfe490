"""How far predictions in bfloat16 lie from those in float32, in PEFT and here: SmolLM2-135M at a point of a curve.

`python benchmarks/half_precision.py DATA` with a data folder that is scored by label (docs/how-to/data.md).
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

import peft
import torch
from torch import Tensor

from loracurve.curve.spec import CurveSpec
from loracurve.inference.prediction import predict_split
from loracurve.model.base_model import load_base, load_tokenizer
from loracurve.model.config import Dtype
from loracurve.model.curve_model import CurveModel
from loracurve.runs.quickstart import smollm2_folder
from loracurve.system.environment import environment
from loracurve.system.files import write_json
from loracurve.tasks.config import TaskConfig
from loracurve.tasks.encoding import Encoded
from loracurve.tasks.task import load_task

T = 0.5


def log_probs(encoded: Encoded, folder: str, dtype: Dtype, out: Path) -> dict[str, Tensor]:
    """[E, C] of the classes in the library and by PEFT, one row at a time, of one random adapter."""
    base, _ = load_base(folder, dtype=dtype)
    twin = copy.deepcopy(base)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type=peft.TaskType.CAUSAL_LM)
    model = CurveModel(base, config, CurveSpec(1, 2)).eval()
    draw = torch.Generator().manual_seed(3)
    points = {n: p + 0.01 * torch.randn(p.shape, generator=draw) for n, p in model.control_points().items()}
    model.set_curve(model.spec, points)
    model.export(out / dtype, T)
    plain = peft.PeftModel.from_pretrained(twin, out / dtype).eval()
    answers = list(encoded.answer_ids or ())
    with torch.no_grad():
        last = [plain(input_ids=torch.tensor([e.prompt])).logits[0, -1, answers] for e in encoded.examples]
    ours = predict_split(model, encoded, torch.tensor([T])).log_probs
    return {"library": ours.double(), "peft": torch.stack(last).double().log_softmax(-1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    asked = parser.parse_args()
    folder = str(smollm2_folder())
    options = TaskConfig(data=asked.data, scoring="label", limit_test=asked.rows)
    encoded = load_task(options, load_tokenizer(folder)).encode("test")
    with tempfile.TemporaryDirectory() as place:
        exact = log_probs(encoded, folder, "float32", Path(place))
        half = log_probs(encoded, folder, "bfloat16", Path(place))
    pairs = {
        "float32, library and peft": (exact["library"], exact["peft"]),
        "library, bfloat16 and float32": (half["library"], exact["peft"]),
        "peft, bfloat16 and float32": (half["peft"], exact["peft"]),
        "bfloat16, library and peft": (half["library"], half["peft"]),
    }
    found = {
        n: {"mean": float((a - b).abs().mean()), "most": float((a - b).abs().max())} for n, (a, b) in pairs.items()
    }
    for name, figures in found.items():
        print(f"{name}: mean {figures['mean']:.2g}, at most {figures['most']:.2g}")
    record = {"data": Path(asked.data).name, "rows": len(encoded), "differences": found, "environment": environment()}
    write_json(asked.out / "half_precision-smollm2-cpu.json", record)


if __name__ == "__main__":
    main()
