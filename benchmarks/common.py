"""What the benchmarks share: models, timing, the measured matrix rate, results as JSON."""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from loracurve.curve.spec import CurveSpec
from loracurve.model.curve_model import CurveModel
from loracurve.system.environment import environment
from loracurve.tasks.batching import collate
from loracurve.tasks.encoding import Encoded, Example

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ANSWERS = (11, 12, 13, 14)


def arguments(description: str, **more: dict[str, Any]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--shape", choices=["7b", "smollm2", "small"], default="7b" if DEVICE.type == "cuda" else "small"
    )
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    for name, settings in more.items():
        parser.add_argument(f"--{name}", **settings)
    return parser.parse_args()


def build(shape: str, dtype: torch.dtype | None = None) -> nn.Module:
    """A model with random weights: Qwen2.5-7B's or SmolLM2-135M's shapes, or a small one for the CPU."""
    torch.manual_seed(0)
    # CPU cores without bfloat16 units would make a slow reference.
    dtype = dtype or (torch.float32 if shape == "small" or DEVICE.type == "cpu" else torch.bfloat16)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with DEVICE:
            if shape == "7b":
                model: nn.Module = Qwen2ForCausalLM(
                    Qwen2Config(
                        hidden_size=3584,
                        intermediate_size=18944,
                        num_hidden_layers=28,
                        num_attention_heads=28,
                        num_key_value_heads=4,
                        vocab_size=152064,
                        max_position_embeddings=4096,
                    )  # fmt: skip
                )
            else:
                wide = {
                    "hidden_size": 576,
                    "intermediate_size": 1536,
                    "num_attention_heads": 9,
                    "num_key_value_heads": 3,
                }
                narrow = {
                    "hidden_size": 128,
                    "intermediate_size": 384,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                }
                sizes = wide | {"num_hidden_layers": 30, "vocab_size": 49152}
                if shape == "small":
                    sizes = narrow | {"num_hidden_layers": 6, "vocab_size": 2048}
                model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=2048, tie_word_embeddings=True, **sizes))
    finally:
        torch.set_default_dtype(previous)
    return model.eval().requires_grad_(False)


def lora(r: int) -> peft.LoraConfig:
    return peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", task_type="CAUSAL_LM")


def random_adapters(model: CurveModel, count: int) -> list[dict[str, Tensor]]:
    """Adapters with no zero factor, so that a wrong result would show."""
    draw = torch.Generator().manual_seed(1)
    shapes = {n: p.shape[1:] for n, p in model.control_points().items()}
    return [
        {n: torch.randn(s, generator=draw) * (0.3 / s[-1] ** 0.5 if "lora_A" in n else 0.05) for n, s in shapes.items()}
        for _ in range(count)
    ]


def stacked(adapters: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {n: torch.stack([a[n] for a in adapters]) for n in adapters[0]}


def peft_model(
    base: nn.Module, config: peft.LoraConfig, adapters: list[dict[str, Tensor]], cast: bool
) -> peft.PeftModel:
    """PEFT on the same base; `cast` is its default of keeping adapters in float32."""
    names = [f"p{i}" for i in range(len(adapters))]
    model = peft.get_peft_model(base, copy.deepcopy(config), names[0], autocast_adapter_dtype=cast)
    for name in names[1:]:
        model.add_adapter(name, copy.deepcopy(config), autocast_adapter_dtype=cast)
    for name, adapter in zip(names, adapters, strict=True):
        peft.set_peft_model_state_dict(model, adapter, name)
    return model


def synthetic(rows: int, tokens: int, vocabulary: int) -> Encoded:
    """A split of `rows` random prompts of one length, answered by one of four tokens."""
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(20, vocabulary, (rows, tokens), generator=draw).tolist()
    examples = [Example(str(i), tuple(x), (), i % 4, 4) for i, x in enumerate(ids)]
    return Encoded(examples, "answer", ANSWERS, ("a", "b", "c", "d"), "sum", 0)


def curve_model(base: nn.Module, r: int, spec: CurveSpec) -> CurveModel:
    return CurveModel(base, lora(r), spec).to(DEVICE)


CHECKED = "LORACURVE_BENCHMARKS_CHECKED"


def check() -> dict[str, float]:
    """Before any time is taken: every way to run against a loop over PEFT adapters, in float32 on this device.

    Returns:
        Relative errors of the log-probabilities; a wrong result ends the benchmark.
    """
    if CHECKED in os.environ:  # by all.py, on this device with this code
        return dict(json.loads(os.environ[CHECKED]))
    base = build("small", torch.float32)
    twin = copy.deepcopy(base)
    model = curve_model(base, 4, CurveSpec(1, 2)).eval()
    model.set_curve(model.spec, stacked(random_adapters(model, 3)))
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    adapters = [model.adapter(float(x)) for x in t]
    other = peft_model(twin, lora(4), adapters, cast=False).to(DEVICE).eval()
    encoded = synthetic(4, 24, base.config.vocab_size)
    batch = collate(encoded, range(4), 1)
    ids = batch.input_ids.to(DEVICE)
    answers = torch.tensor(ANSWERS, device=DEVICE)
    with torch.inference_mode():
        found = []
        for i in range(3):
            other.set_adapter(f"p{i}")
            found.append(other(input_ids=ids, use_cache=False).logits[:, -1].index_select(-1, answers).log_softmax(-1))
        expected = torch.stack(found)
        rows = model.coefficients(t[:, None].expand(3, 4))
        ways = {
            "points": model.point_log_probs(batch, t),
            "rows": model.runner.scores(batch.to(DEVICE), rows.to(DEVICE)).log_softmax(-1),
        }
        with model.merger.points() as fold:
            merged = []
            for x in t:
                fold(x)
                merged.append(model.merger.log_probs(batch))
            ways["merged"] = torch.cat(merged)
    errors = {name: float((x - expected).norm() / expected.norm()) for name, x in ways.items()}
    if max(errors.values()) > 1e-5:
        raise SystemExit(f"the results differ from PEFT's: {errors}")
    return errors


def timed(function: Callable[[], Any], repeats: int, warm_up: int = 4) -> float:
    """Median milliseconds of a call, by device events on a GPU."""
    for _ in range(warm_up):
        function()
    found = []
    for _ in range(repeats):
        if DEVICE.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            stop.record()
            torch.cuda.synchronize()
            found.append(start.elapsed_time(stop))
        else:
            begin = time.perf_counter()
            function()
            found.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(found)


def matrix_rate(dtype: torch.dtype) -> float:
    """TFLOP/s of a large matrix product on random data, measured here and now."""
    size = 8192 if DEVICE.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    return 2 * size**3 / timed(lambda: a @ b, 10) / 1e9


def layer_weights(base: nn.Module) -> int:
    """Weights of the decoder layers' linear maps: what 2 (forward) or 4 (with gradients) FLOP per token count."""
    layers = base.get_decoder().layers
    return sum(m.weight.numel() for n, m in layers.named_modules() if type(m) is nn.Linear)


def peak_memory() -> float:
    """GiB, 0 on the CPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else 0.0


def allocated() -> float:
    return torch.cuda.memory_allocated() / 2**30 if DEVICE.type == "cuda" else 0.0


def reset_memory() -> None:
    if DEVICE.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def report(name: str, options: argparse.Namespace, figures: dict[str, Any], command: str = "") -> None:
    """Write the figures with versions and device; called as often as there are new ones."""
    options.out.mkdir(parents=True, exist_ok=True)
    env = environment()
    if not command:
        command = f"python benchmarks/{name}.py --shape {options.shape} --repeats {options.repeats}"
    env["command"] = command
    path = options.out / f"{name}-{options.shape}-{DEVICE.type}.json"
    path.write_text(
        json.dumps({"benchmark": name, "shape": options.shape, **figures, "environment": env}, indent=2) + "\n"
    )


def rounded(value: Any) -> Any:
    """Figures short enough for the end of a log."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def show(name: str, figures: dict[str, Any]) -> None:
    print(f"{name}: {json.dumps(rounded(figures))}", flush=True)


def note(started: float, text: str) -> None:
    """A line on progress, so that a run that was cut off says how far it came."""
    print(f"[{time.perf_counter() - started:5.0f} s] {text}", flush=True)
