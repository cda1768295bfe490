"""Last hidden states are what PEFT's own model gives the head, at every point, in packed rows and folded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.made import made_task, vocabulary
from helpers.matrix import SCORING
from helpers.tiny import adapters_on, lora_config, peft_twin, random_points, tiny
from peft import LoraConfig
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from loracurve.curve.spec import CurveSpec
from loracurve.model.curve_model import CurveModel
from loracurve.model.states import States
from loracurve.system.errors import UserError
from loracurve.tasks.batching import collate
from loracurve.tasks.encoding import Encoded, Example

T = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)


def build(architecture: str, tmp_path: Path, scoring: str | None = None) -> tuple[CurveModel, Any, Any]:
    task = made_task(tmp_path, architecture, scoring or SCORING[architecture])
    base = tiny(architecture, torch.float32, vocabulary(task), labels=2)
    config = lora_config(architecture)
    model = CurveModel(tiny(architecture, torch.float32, vocabulary(task), labels=2), config, CurveSpec(2, 2))
    model.set_curve(model.spec, random_points(model))
    return model.eval(), peft_twin(base, config, adapters_on(model, T)), task


def seen_by_head(twin: Any, adapter: int, ids: list[int], types: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, d] or [d] inputs of the last linear map, and the logits."""
    twin.set_adapter(f"p{adapter}")
    base, inputs = twin.get_base_model(), []
    head = base.classifier if hasattr(base, "classifier") else base.lm_head
    hook = head.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        given = {} if types is None else {"token_type_ids": torch.tensor([types])}
        logits = twin(input_ids=torch.tensor([ids]), **given).logits[0]
    hook.remove()
    return inputs[0][0], logits


@pytest.mark.parametrize("way", ["points", "merged"])
@pytest.mark.parametrize(
    ("architecture", "scoring"), [("qwen2", "letter"), ("llama", "text"), ("encoder", "head"), ("qwen2", "lm")]
)
def test_states_are_those_of_plain_models(architecture: str, scoring: str, way: str, tmp_path: Path) -> None:
    model, twin, task = build(architecture, tmp_path, scoring)
    encoded = task.encode("test")
    packing = model.runner.takes_trees(encoded)
    batch = collate(encoded, [3, 0, 7, 9], packing=packing, whole=True)
    with torch.no_grad():
        if way == "points":
            log_probs, states = model.runner.point_states(batch, T)
            torch.testing.assert_close(log_probs, model.point_log_probs(collate(encoded, [3, 0, 7, 9]), T))
        else:
            parts = []
            with model.merger.points() as fold:
                for t in T:
                    fold(t)
                    parts.append(model.merger.states(batch)[1])
            states = States.cat(parts)
    place = 0
    for e, number in enumerate([3, 0, 7, 9]):
        example = encoded.examples[number]
        for i in range(len(T)):
            if scoring == "lm":
                ids = [*example.prompt, *example.choices[0]]
                seen, _ = seen_by_head(twin, i, ids)
                start, count = len(example.prompt) - 1, len(example.choices[0])
                torch.testing.assert_close(
                    states.read[i, place : place + count], seen[start : start + count], rtol=1e-4, atol=1e-4
                )
                continue
            seen, _ = seen_by_head(twin, i, [*example.prompt], example.token_types)
            expected = seen if seen.dim() == 1 else seen[-1]
            torch.testing.assert_close(states.read[i, e], expected, rtol=1e-4, atol=1e-4)
            for c, choice in enumerate(example.choices if scoring == "text" else ()):
                seen, _ = seen_by_head(twin, i, [*example.prompt, *choice])
                assert states.choices is not None
                torch.testing.assert_close(states.choices[i, e, c], seen[-len(choice) :].mean(0), rtol=1e-4, atol=1e-4)
        place += len(example.choices[0]) if scoring == "lm" else 0
    assert (states.choices is None) == (scoring != "text")


@pytest.mark.parametrize(("architecture", "scoring"), [("qwen2", "letter"), ("encoder", "head")])
def test_rows_of_the_last_map_give_the_scores(architecture: str, scoring: str, tmp_path: Path) -> None:
    model, _, task = build(architecture, tmp_path, scoring)
    encoded = task.encode("test")
    batch = collate(encoded, [0, 1, 2, 3])
    with torch.no_grad():
        log_probs, states = model.runner.point_states(batch, T)
    rows = model.runner.last_rows(T, encoded.answer_ids, states.read.shape[-1])
    h = torch.cat([states.read.double(), torch.ones(*states.read.shape[:2], 1)], -1)
    logits = torch.einsum("ned,ncd->nec", h, rows)
    if batch.choice_mask is not None:
        logits = logits.masked_fill(~batch.choice_mask, -torch.inf)
    torch.testing.assert_close(logits.log_softmax(-1).float(), log_probs, rtol=1e-4, atol=1e-4)
    assert model.runner.route.kind == "base"


SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


def test_scaled_logits_and_soft_capped_ones() -> None:
    torch.manual_seed(0)
    scaled = CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25, num_key_value_heads=2))
    model = CurveModel(scaled.eval(), lora_config("cohere"), CurveSpec(1, 2))
    assert model.runner.last_map.scale == pytest.approx(0.25, rel=1e-5)
    torch.manual_seed(0)
    capped = Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, num_key_value_heads=2, final_logit_softcapping=0.5))
    assert CurveModel(capped.eval(), lora_config("gemma2"), CurveSpec(1, 2)).runner.last_map.scale is None


def test_a_classifier_is_read_where_it_pools() -> None:
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(
        LlamaConfig(**SMALL, num_labels=3, pad_token_id=0, num_key_value_heads=2)
    ).eval()
    for p in base.parameters():
        if p.dim() > 1:
            p.data.mul_(5)
    seen: list[torch.Tensor] = []
    hook = base.model.register_forward_hook(lambda m, a, out: seen.append(out.last_hidden_state))
    ids = torch.randint(3, 300, (1, 6))
    with torch.no_grad():
        base(input_ids=ids)
    hook.remove()
    model = CurveModel(base, lora_config("encoder"), CurveSpec(1, 2)).eval()
    rows = [Example("a", tuple(ids[0].tolist()), (), 0, 3), Example("b", (5, 6, 7, 8, 9, 4, 3, 7, 9), (), 1, 3)]
    encoded = Encoded(rows, "head", None, ("x", "y", "z"), "sum", 0)
    with torch.no_grad():
        _, states = model.runner.point_states(collate(encoded, [0, 1]), T)
    # Fresh adapters change nothing.
    torch.testing.assert_close(states.read[0, 0], seen[0][0, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_is_read_where_it_pools_though_its_head_is_zero(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, num_labels=3, pad_token_id=0, num_key_value_heads=2)
    base = LlamaForSequenceClassification(config).to(dtype).eval()
    lengths = (300, 7)  # beyond 256 whole numbers are not all bfloat16 ones
    ids = [torch.randint(3, 300, (1, n)) for n in lengths]
    with torch.no_grad():
        expected = [base.model(input_ids=x).last_hidden_state[0, -1].float() for x in ids]
    lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["score"])
    model = CurveModel(base, lora, CurveSpec(1, 2)).eval()
    model.set_curve(model.spec, random_points(model))
    rows = [Example(str(i), tuple(x[0].tolist()), (), 0, 3) for i, x in enumerate(ids)]
    batch = collate(Encoded(rows, "head", None, ("x", "y", "z"), "sum", 0), [0, 1])
    alone = torch.zeros(1, 3, dtype=torch.float64)
    with torch.no_grad():
        log_probs, states = model.runner.point_states(batch, alone)
        _, together = model.runner.point_states(batch, torch.cat([model.coefficients(T), alone]))
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.1}
    for found in (states.read[0], together.read[-1]):
        for row, own in zip(found, expected, strict=True):
            torch.testing.assert_close(row, own, **tolerance)
    torch.testing.assert_close(log_probs[0], torch.full((2, 3), 1 / 3).log().to(log_probs))


def test_logits_of_no_linear_map_are_refused() -> None:
    model = CurveModel(tiny("encoder"), lora_config("encoder"), CurveSpec(1, 2)).eval()
    inner = model.model.classifier
    forward = type(model.model).forward

    def squashed(self: Any, **given: Any) -> Any:
        out = forward(self, **given)
        out.logits = out.logits.tanh()
        return out

    model.model.forward = squashed.__get__(model.model)  # type: ignore[assignment]
    assert inner is model.model.classifier
    with pytest.raises(UserError, match="its logits are not what one linear map gives"):
        _ = model.runner.last_map
