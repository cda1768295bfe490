"""The `paper` suite's parts at full size, with random weights: what each costs on one GPU.

    python benchmarks/full_size.py --repeats 2 --dtypes bfloat16 float32 --seconds 340

For every kind of training step that the suite's methods take: time and peak memory of a micro-batch at the suite's
adapter targets, rank, recomputation and number of rows. Also points evaluated in a second, a checkpoint written, read
and gone on from, and an adapter exported and read back. Prompts are random tokens of one length. Figures are written as
they come; what stands in the result file already is not measured again (`--fresh`: it is). `cost.py` makes GPU hours of
them.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import DEVICE, arguments, build, note, peak_memory, report, reset_memory, rounded, synthetic, timed
from plan import setting_of, work_of

from loracurve.baselines.blob import BLoB, GaussianAdapter
from loracurve.baselines.curve import Curve
from loracurve.baselines.flat_lora import FlatLoRA
from loracurve.baselines.ivon import IVON, _Variational
from loracurve.baselines.laplace import Laplace
from loracurve.baselines.mc_dropout import MCDropout, _dropout
from loracurve.baselines.single_adapter_loop import Learner, OneAdapter
from loracurve.baselines.swag import SWAG, _Collecting
from loracurve.bench.config import SuiteConfig
from loracurve.bench.suite import load_suite
from loracurve.curve.lora_space import PREFIX
from loracurve.curve.spec import CurveSpec
from loracurve.model.curve_model import CurveModel
from loracurve.system.errors import UserError
from loracurve.system.tensors import read_tensors
from loracurve.tasks.batching import collate
from loracurve.tasks.encoding import Encoded
from loracurve.training.anchors import AnchorsObjective
from loracurve.training.config import FitConfig, LoopConfig
from loracurve.training.curves import CurveObjective
from loracurve.training.loop import batch_numbers, recomputing, run_loop
from loracurve.training.micro_batches import CAPTURED_LENGTHS, TrainingObjective
from loracurve.training.perturbation import Perturbation
from loracurve.training.step import StepConfig, Stepper

LENGTHS = {"7b": (128, 384), "smollm2": (128, 384), "small": (32, 96)}
WARM_UP = 3  # two eager steps and the one that is captured


class Sized:
    """The suite's model at full size, and what is measured on it."""

    def __init__(self, suite: SuiteConfig, shape: str, dtype: torch.dtype, repeats: int) -> None:
        base = build(shape, dtype)
        self.suite, self.repeats, self.vocabulary = suite, repeats, base.config.vocab_size
        self.short, self.long = LENGTHS[shape]
        config = suite.lora.to_peft("", False)
        self.model = CurveModel(base, config, CurveSpec.slots(1)).to(DEVICE)
        rows = -(-suite.training.batch_size // suite.training.accumulation)
        self.training = replace(suite.training, batch_size=rows, accumulation=1, steps=100)

    def rows(self, tokens: int) -> Encoded:
        return synthetic(16, tokens, self.vocabulary)

    def start(self, spec: CurveSpec) -> None:
        """Adapters whose B is not zero, so that nothing is cheaper than in the middle of training."""
        draw = torch.Generator().manual_seed(3)
        points = self.model.fresh_points(spec)
        for name, value in points.items():
            if name.endswith("lora_B.weight"):
                value.copy_(0.01 * torch.randn(value.shape, generator=draw))
        self.model.set_curve(spec, points)
        self.model.train()

    def step(self, program: TrainingObjective, config: LoopConfig, noise: Perturbation | None = None) -> dict[str, Any]:
        """A step with one micro-batch, captured on a GPU."""
        values = {f: getattr(config, f) for f in StepConfig.__dataclass_fields__}
        ties, mask = self.model.dependences, self.model.spec.mask
        stepper = Stepper(program, self.model.factors, mask, StepConfig(**values), config.capture, noise, ties)
        count = iter(range(10**9))

        def once() -> torch.Tensor:
            number = next(count)
            if noise is not None:
                noise.start(number)
            return stepper(program.parts(number), 1.0)

        with recomputing(self.model.model, config.gradient_checkpointing):
            found = self.clock(once)
        return found | ({"captured": bool(stepper.captured.graphs)} if DEVICE.type == "cuda" else {})

    def clock(self, once: Callable[[], Any]) -> dict[str, Any]:
        reset_memory()
        return {"ms": timed(once, self.repeats, WARM_UP if DEVICE.type == "cuda" else 1), "peak_gib": peak_memory()}

    def adapters(self, count: int, tokens: int, dropout: float = 0.0) -> dict[str, Any]:
        self.start(CurveSpec.slots(count))
        rows = self.rows(tokens)
        with _dropout(self.model, dropout) if dropout else nullcontext():
            return self.step(AnchorsObjective(self.model, rows, rows, self.training, count), self.training)

    def curve(self, spec: CurveSpec, config: FitConfig, tokens: int) -> dict[str, Any]:
        self.start(spec)
        rows = self.rows(tokens)
        noise = Perturbation(config.perturbation, self.model.layers, config.steps, config.seed)
        program = CurveObjective(self.model, rows, rows, config, tau=config.objective.tau or 0.1)
        with noise.attached():
            return self.step(program, config, None if config.perturbation.kind == "none" else noise)

    def own_loop(self, method: Any) -> dict[str, Any]:
        """A step of a method that trains by its own optimiser; these are not captured."""
        model, config = self.model, self.training
        self.start(CurveSpec.slots(1))
        one = OneAdapter(model, model.control_points())
        learner: Learner
        if isinstance(method, SWAG):
            learner = _Collecting(one.values(), config, method)
        elif isinstance(method, IVON):
            learner = _Variational(
                one.values(), replace(method, learning_rate=config.learning_rate / method.clip_radius)
            )
        else:
            learner = GaussianAdapter(one, method, config, 100, 0)
        rows, count = self.rows(self.short), iter(range(10**9))
        model.train()

        def once() -> float:
            number = next(count)
            batch = collate(
                rows, batch_numbers(0, number, len(rows), config.batch_size), 1, model.runner.takes_trees(rows)
            )
            return learner.step(lambda values: one.nll_at(values, [batch]), number, 1.0)

        with recomputing(model.model, config.gradient_checkpointing):
            return self.clock(once)

    def method(self, method: Any) -> dict[str, Any]:
        """A micro-batch of a method's training, at the short length."""
        if isinstance(method, Curve):
            config = replace(
                method.training_of(setting_of(self.training)),
                **{n: getattr(self.training, n) for n in ("batch_size", "accumulation", "steps")},
            )
            return self.curve(method.curve.spec(method.curve.anchors), config, self.short)
        if isinstance(method, MCDropout):
            return self.adapters(1, self.short, method.dropout)
        if isinstance(method, FlatLoRA):
            config = FitConfig(**vars(self.training), points=1, share_points=True, perturbation=method.perturbation)
            return self.curve(CurveSpec.slots(1), config, self.short)
        if isinstance(method, SWAG | IVON | BLoB):
            return self.own_loop(method)
        return self.adapters(work_of(self.suite, next(iter(self.suite.tasks)), method).validated, self.short)

    def evaluation(self) -> dict[str, Any]:
        """Ten points of a curve on a batch of the short length."""
        spec, points = CurveSpec(2, 2), torch.linspace(0, 1, self.suite.samples, dtype=torch.float64)
        self.start(spec)
        self.model.eval()
        rows = self.rows(self.short)
        batch = collate(rows, range(len(rows)), 1, pad_to=CAPTURED_LENGTHS)
        with torch.inference_mode():
            found = self.clock(lambda: self.model.point_log_probs(batch, points))
        seconds = found["ms"] / 1e3
        found["points_per_s"] = len(points) * len(rows) / seconds
        return found | {"tokens_per_s": len(points) * batch.tokens / seconds, "rows": len(rows), "points": len(points)}

    def resume(self, folder: Path) -> dict[str, Any]:
        """Four steps of an anchored curve, at once and interrupted after two: files, times, and how far they differ."""
        config = FitConfig(
            **vars(replace(self.training, steps=4, evaluate_every=2, keep="last")), points=2, share_points=True
        )
        spec, rows, found = CurveSpec(2, 2, (False, True, False, True, False)), self.rows(self.short), {}
        ended = []
        for name, stops in (("whole", [None]), ("parts", [2, None])):
            for stop in stops:
                self.start(spec)
                program = CurveObjective(self.model, rows, rows, config)
                began = time.perf_counter()
                result = run_loop(self.model, program, config, folder / name, progress=False, stop_after=stop)
                found[f"{name}, to step {result.steps}"] = {"s": time.perf_counter() - began}
            ended.append({n: p.detach().cpu().clone() for n, p in self.model.control_points().items()})
        found["bytes"] = sum(f.stat().st_size for f in (folder / "parts").glob("checkpoint*"))
        apart = max(float((ended[0][n] - ended[1][n]).abs().max()) for n in ended[0])
        return found | {
            "largest_difference": apart,
            "largest_value": max(float(p.abs().max()) for p in ended[0].values()),
        }

    def export(self, folder: Path) -> dict[str, Any]:
        """The adapter at t = 0.3 as a PEFT folder, read back."""
        self.start(CurveSpec(2, 2))
        began = time.perf_counter()
        self.model.export(folder, 0.3)
        found = {"s": time.perf_counter() - began, "bytes": sum(f.stat().st_size for f in folder.iterdir())}
        written, expected = read_tensors(folder / "adapter_model.safetensors"), self.model.adapter(0.3)
        assert written.keys() == expected.keys() and all(n.startswith(PREFIX) for n in written)
        return found | {
            "equal": all(torch.equal(written[n], expected[n].cpu().to(p.dtype)) for n, p in written.items())
        }


def measures(sized: Sized) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """What is measured, by name; the most useful first."""
    suite, task = sized.suite, next(iter(sized.suite.tasks))
    yield "step/1 adapter", lambda: sized.adapters(1, sized.short)
    yield f"step/1 adapter, {sized.long} tokens", lambda: sized.adapters(1, sized.long)
    yield "evaluation", sized.evaluation
    kinds = {}
    for method in suite.methods.values():
        if (kind := work_of(suite, task, method).kind) and kind != "1 adapter" and not isinstance(method, Laplace):
            kinds.setdefault(kind, method)
    for kind, method in kinds.items():
        yield f"step/{kind}", lambda method=method: sized.method(method)
    yield f"step/{suite.anchors} adapters", lambda: sized.adapters(suite.anchors, sized.short)
    for name, function in (("resume", sized.resume), ("export", sized.export)):
        yield name, lambda function=function: in_folder(function)


def in_folder(function: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return function(Path(folder) / "out")


@contextmanager
def said(begin: float, name: str) -> Iterator[None]:
    """A measure that cannot be had costs no other one."""
    try:
        yield
    except (UserError, RuntimeError) as error:  # a package that is missing, memory
        note(begin, f"{name}: left out: {str(error).splitlines()[0][:200]}")


def main() -> None:
    options = arguments(
        __doc__,
        suite={"default": "paper"},
        dtypes={"nargs": "*", "default": ["bfloat16", "float32"] if DEVICE.type == "cuda" else ["float32"]},
        seconds={"type": float, "default": 340, "help": "begin no measure after this time"},
        fresh={"action": "store_true", "help": "measure everything again"},
    )
    begin = time.perf_counter()
    command = f"python benchmarks/full_size.py --shape {options.shape} --repeats {options.repeats}"
    suite = load_suite(options.suite)
    kept = options.out / f"full_size-{options.shape}-{DEVICE.type}.json"
    figures: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() and not options.fresh else {}
    figures = {k: v for k, v in figures.items() if k not in ("benchmark", "shape", "environment")}
    figures |= {"suite": options.suite, "tokens": LENGTHS[options.shape][0]}
    for dtype in options.dtypes:
        found = figures.setdefault(dtype, {})
        sized = Sized(suite, options.shape, getattr(torch, dtype), options.repeats)
        note(begin, f"{dtype}: model built, {peak_memory():.1f} GiB")
        for name, measure in measures(sized):
            if name in found:
                continue
            if time.perf_counter() - begin > options.seconds:
                note(begin, f"{dtype}, {name}: left for later, the time is up")
                continue
            with said(begin, f"{dtype}, {name}"):
                found[name] = measure()
                note(begin, f"{dtype}, {name}: {json.dumps(rounded(found[name]))}")
                report("full_size", options, figures, command)
        del sized, measure
        reset_memory()


if __name__ == "__main__":
    main()
