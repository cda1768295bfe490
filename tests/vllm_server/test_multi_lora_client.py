"""The multi-LoRA client against a real vLLM, which `make test-vllm` installs: it averages what the library does."""

from __future__ import annotations

import os
import socket
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
from helpers.processes import started
from helpers.tiny import random_points
from helpers.waiting import SECONDS, until
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loracurve.curve.quadrature import quadrature
from loracurve.inference.config import GenerateConfig
from loracurve.inference.generation import generate
from loracurve.inference.predictive import Predictive
from loracurve.model.base_model import load_base
from loracurve.model.curve_model import CurveModel
from loracurve.runs.quickstart import smollm2_folder
from loracurve.serving.multi_lora_client import ServedCurve

SERVER = os.environ.get("LORACURVE_VLLM")
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(SERVER is None, reason="LORACURVE_VLLM names no Python that has vLLM"),
]

POINTS = 3
WHOLE = {"atol": 5e-5, "rtol": 0.0}
"""Float32 in two engines: ten times what was seen."""

TEXTS = ("I loved it", "a waste of time", "fine, I suppose", "the worst film of the year, and I have seen them all")
PROMPTS = [f"Review {i}: {TEXTS[i % len(TEXTS)]}\nThe review is" for i in range(16)]
STORY = "Once upon a time there was a little"
"""Goes on without a blank line, which is tokenised in another way when it comes back as the end of a text."""


@dataclass
class Curve:
    """The library's side: random control points on SmolLM2-135M, and three points of the curve."""

    model: CurveModel
    tokenizer: PreTrainedTokenizerBase
    t: Tensor
    weights: Tensor

    @torch.no_grad()
    def log_probs(self, text: str) -> tuple[list[int], Tensor]:
        """The text's L tokens, and [n, L, V] log-probabilities of what follows on each."""
        ids = self.tokenizer(text)["input_ids"]
        return ids, self.model(self.t, input_ids=torch.tensor([ids])).logits.double().log_softmax(-1)

    def choices(self, prompts: Sequence[str], answers: Sequence[str]) -> Predictive:
        def score(text: str) -> Tensor:
            ids, log_probs = self.log_probs(text)
            return log_probs[:, torch.arange(len(ids) - 1), ids[1:]].sum(-1)

        scores = torch.stack([torch.stack([score(p + a) for a in answers], dim=-1) for p in prompts], dim=1)
        return Predictive.from_log_probs(scores.log_softmax(-1), self.weights)


@pytest.fixture(scope="module")
def curve() -> Curve:
    base, tokenizer = load_base(str(smollm2_folder()), dtype="float32")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    model = CurveModel.from_config(base, config, segments=1)
    model.set_curve(model.spec, random_points(model, scale=0.02))
    return Curve(model, tokenizer, *quadrature("gauss-legendre", POINTS, model.spec.segments))


@pytest.fixture(scope="module")
def points(curve: Curve, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm") / "points"
    curve.model.export_points(folder, curve.t, curve.weights)
    return folder


@pytest.fixture(scope="module")
def served(points: Path) -> Iterator[ServedCurve]:
    """The client of a server that puts many sequences into one batch."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    adapters = [f"{folder.name}={folder}" for folder in sorted(points.glob("point-*"))]
    command = [str(SERVER), "-m", "vllm.entrypoints.openai.api_server", "--model", smollm2_folder(), "--enable-lora"]
    command += ["--max-loras", POINTS, "--max-lora-rank", 8, "--lora-modules", *adapters, "--dtype", "float32"]
    command += ["--max-num-seqs", 16, "--max-model-len", 512, "--enforce-eager", "--host", "127.0.0.1", "--port", port]
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}  # GiB
    log = points.parent / "vllm.log"
    with log.open("w") as out, started(command, stdout=out, stderr=out, env={**os.environ, **own}) as process:

        def healthy() -> bool:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=SECONDS) as answer:
                    return bool(answer.status == 200)
            except OSError:
                return False

        def runs() -> bool:
            assert process.poll() is None, log.read_text()[-4000:]
            return True

        until(healthy, "vLLM is healthy", runs)
        yield ServedCurve(f"http://127.0.0.1:{port}", points, timeout=SECONDS)


@pytest.mark.parametrize("answers", [(" good", " bad"), (" very good", " bad")], ids=["one token", "several"])
def test_choices_are_the_librarys(curve: Curve, served: ServedCurve, answers: tuple[str, ...]) -> None:
    found, expected = served.choices(PROMPTS, answers), curve.choices(PROMPTS, answers)
    torch.testing.assert_close(found.point_probs, expected.point_probs, **WHOLE)
    for name in ("probs", "entropy", "expected_entropy", "mutual_information"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), **WHOLE)
    assert float(found.point_probs.std(0).max()) > 20 * WHOLE["atol"], "the points differ, or nothing was tested"


def test_the_next_token_is_the_librarys(curve: Curve, served: ServedCurve) -> None:
    found = served.next_token(STORY)
    mixture = curve.weights @ curve.log_probs(STORY)[1][:, -1].exp()
    assert curve.tokenizer(found.tokens[0])["input_ids"] == [int(mixture.argmax())] and found.certain
    of_tokens = [float(mixture[curve.tokenizer(token)["input_ids"]]) for token in found.tokens]
    assert found.probs == pytest.approx(of_tokens, abs=WHOLE["atol"])
    assert found.rest == pytest.approx(1 - sum(of_tokens), abs=WHOLE["atol"] * len(of_tokens))


def test_text_is_the_librarys(curve: Curve, served: ServedCurve) -> None:
    found = served.generate(STORY, max_new_tokens=8)
    (expected,) = generate(
        curve.model, curve.tokenizer, STORY, GenerateConfig(max_new_tokens=8), curve.t, curve.weights
    )
    assert found.text == expected.text and found.finish == expected.finish
    assert [step.probs[0] for step in found.steps] == pytest.approx(
        [float(torch.tensor(x).exp()) for x in expected.log_probs], abs=WHOLE["atol"]
    )
