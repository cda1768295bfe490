"""Every family, in a covering design of ways, scorings, lengths, padding, adapters and precisions, against PEFT."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import lru_cache
from itertools import combinations, product
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from conformance import reference
from conformance.cases import AXES, FLOAT32, Case, cases_of
from conformance.families import FAMILIES, known
from conformance.made_rows import VOCABULARY, made_tokenizer, words_of, write_task
from conformance.ways import POINTS, predictions
from loracurve.inference.config import GenerateConfig
from loracurve.inference.generation import generate
from loracurve.model.curve_model import CurveModel
from loracurve.system.errors import UserError
from loracurve.tasks.config import TaskConfig
from loracurve.tasks.task import load_task
from loracurve.tasks.tokens import leading_tokens, tokenise

ROUNDED = 1e-3
"""the same where in float64 the difference is within the first, so that only rounding can be behind it"""
HALF = 5e-3
"""how much further than PEFT's the mean in bfloat16 may lie from float32, beside twice as far"""
NEW_TOKENS = 6


@lru_cache(maxsize=1)
def _base(name: str, grown: bool) -> nn.Module:
    family = FAMILIES[name]
    if not grown:
        return family.build(VOCABULARY)
    base: Any = family.build(VOCABULARY - reference.GROWN)
    torch.manual_seed(5)
    base.resize_token_embeddings(VOCABULARY)
    return base.eval()


def _quantised(base: nn.Module, folder: Path) -> Callable[[], nn.Module]:
    """Opens the base with its linear maps in four bits, which are multiplied in float32."""
    pytest.importorskip("bitsandbytes")
    base.save_pretrained(folder)  # type: ignore[operator]
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=[reference.head_name(base)],
    )
    kind: Any = type(base)

    def opened() -> nn.Module:
        model = kind.from_pretrained(folder, quantization_config=how, dtype=torch.float32).eval()
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False  # some processors would multiply in bfloat16
        return model

    return opened


def _compared(case: Case, folder: Path, dtype: str) -> list[Tensor]:
    """As vectors: what the library finds, what PEFT does, and in bfloat16 what PEFT does in float32 with the same
    weights."""
    family = FAMILIES[case.family]
    plain = _base(case.family, case.adapter == "grown")
    try:
        folders = reference.make_adapters(family, plain, case.adapter, folder / "adapters")
    except (AttributeError, TypeError, ValueError) as error:  # what PEFT refuses is refused
        CurveModel.from_config(copy.deepcopy(plain), reference.adapter_config(family, plain, "plain"))
        raise AssertionError("expected what PEFT refuses to be refused") from error
    if dtype == "nf4":
        opened = _quantised(plain, folder / "base")
    else:
        opened = lambda: copy.deepcopy(plain).to(getattr(torch, dtype))  # noqa: E731
    model = CurveModel.from_adapters(opened(), [folders[0], folders[2]], alignment="none")
    model.export(folder / "export", 0.5)
    folders[1] = folder / "export"
    kept = {"float64": torch.float64, "bfloat16": torch.bfloat16}
    twins = [[reference.with_adapter(opened(), path).to(kept.get(dtype)) for path in folders]]
    if dtype == "bfloat16":
        twins.append([copy.deepcopy(twin).float() for twin in twins[0]])
    way = _generated if case.way == "generate" else _predicted
    return way(case, folder, model, twins)


def _style(case: Case) -> str:
    family = FAMILIES[case.family]
    if family.encoder:
        return "xlnet" if family.model_type == "xlnet" else "encoder"
    return "bos" if crc32(case.family.encode()) % 2 else "bare"


def _tokenizer(case: Case) -> Any:
    pad = FAMILIES[case.family].config(VOCABULARY).get_text_config().pad_token_id
    return made_tokenizer(_style(case), case.side, pad or 0)


def _predicted(case: Case, folder: Path, model: CurveModel, twins: list[list[nn.Module]]) -> list[Tensor]:
    seed = crc32(str(case).encode())
    data = write_task(folder / "data", case.scoring, case.length, FAMILIES[case.family].encoder, seed)
    config = TaskConfig(str(data), case.scoring)  # type: ignore[arg-type]
    encoded = load_task(config, _tokenizer(case), model.runner.window).encode("test")
    found = predictions(model, encoded, case.way)
    out = [found, *(torch.stack([reference.log_probs(twin, encoded) for twin in part]) for part in twins)]
    there = out[1] > -math.inf
    assert found.shape == there.shape and torch.equal(found > -math.inf, there)
    return [part[there] for part in out]


def _generated(case: Case, folder: Path, model: CurveModel, twins: list[list[nn.Module]]) -> list[Tensor]:
    """Log-probabilities of the tokens that the library chooses, twice: as it says, and as the references say, beside
    which stand those of the most probable tokens."""
    tokenizer = _tokenizer(case)
    texts = words_of(case.length, crc32(str(case).encode()))
    out: list[list[Tensor]] = [[] for _ in range(1 + len(twins))]
    for place in (1, 2):
        made = generate(model, tokenizer, texts, GenerateConfig(max_new_tokens=NEW_TOKENS), POINTS[place : place + 1])
        for text, generation in zip(texts, made, strict=True):
            prompt, ids = [*leading_tokens(tokenizer), *tokenise(tokenizer, [text])[0]], generation.token_ids
            scored = [reference.logits(part[place], [*prompt, *ids][:-1]).log_softmax(-1) for part in twins]
            scored = [log_probs[len(prompt) - 1 :] for log_probs in scored]
            chosen = [log_probs.gather(-1, torch.tensor(ids)[:, None])[:, 0] for log_probs in scored]
            out[0] += [torch.tensor(generation.log_probs, dtype=torch.float64), chosen[-1]]
            for column, log_probs, of_chosen in zip(out[1:], scored, chosen, strict=True):
                column += [of_chosen, log_probs.max(-1).values]
    return [torch.cat(column) for column in out]


def _check(case: Case, folder: Path) -> float:
    """The largest difference of log-probabilities, relative to their size where that is above 1."""
    found, plain, *rest = _compared(case, folder / case.dtype, case.dtype)
    assert bool(plain.isfinite().all()), "the reference is not finite"
    scale = max(1.0, float(plain.abs().max()))
    worst = float((found - plain).abs().max()) / scale
    if case.dtype == "bfloat16":
        (exact,) = rest
        ours, theirs = (float((part - exact).abs().mean()) for part in (found, plain))
        routed = 4 if "expert" in str(FAMILIES[case.family].options) else 1  # rounding sends tokens to other experts
        assert ours < 2 * theirs + routed * HALF * scale, f"{ours:.2g} from float32 where PEFT is {theirs:.2g}"
        return worst
    if worst > FLOAT32:
        assert worst < ROUNDED, f"{worst:.2g}"
        if case.dtype == "float32":
            try:
                found, plain = _compared(case, folder / "float64", "float64")
            except (RuntimeError, UserError) as error:  # grouped products of experts know no float64
                assert "Double" in str(error) and worst < 5 * FLOAT32, f"{worst:.2g}"
                return worst
            exact64 = float((found - plain).abs().max()) / scale
            assert exact64 < FLOAT32, f"{exact64:.2g} in float64, {worst:.2g} in float32"
    return worst


def _too_long(case: Case) -> tuple[str, str] | None:
    """Texts that leave no room for new tokens are refused by all families that say how long they can be."""
    return None if FAMILIES[case.family].unbounded else known({"generate over": "expected at most"}, case)


def _refusals(case: Case) -> list[tuple[str, str]]:
    """For which axis values the case is refused, and a part of the message; one of them is met first."""
    folded = known({"merged nf4": "folding needs floating-point base weights"}, case)
    found = (known(FAMILIES[case.family].refused, case), _too_long(case), folded)
    return [refusal for refusal in found if refusal is not None]


CASES = cases_of({name: (family.kind, family.without) for name, family in FAMILIES.items()})


def _parameters() -> list[Any]:
    out = []
    for name, cases in CASES.items():
        for case in cases:
            wrong = None if _too_long(case) else known(FAMILIES[name].wrong, case)
            marks = [pytest.mark.xfail(strict=True, reason=wrong[1])] if wrong is not None else []
            out.append(pytest.param(case, id=str(case), marks=marks))
    return out


@pytest.mark.parametrize("case", _parameters())
def test_equal_or_refused(case: Case, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    record_property("family", case.family)
    refusals = _refusals(case)
    if not refusals:
        record_property("exact", case.dtype == "float32")
        record_property("difference", _check(case, tmp_path))
        return
    with pytest.raises(UserError) as error:
        _check(case, tmp_path)
    message = str(error.value)
    if _too_long(case) is None:
        record_property("refused", (refusals[0][0], message.partition(f"{tmp_path}/{case.dtype}/")[2] or message))
    assert any(text in message for _, text in refusals) and "\n" not in message


@pytest.mark.parametrize("kind", AXES)
def test_every_pair_of_axis_values_occurs(kind: str) -> None:
    axes = AXES[kind]
    cases = [case for name, of in CASES.items() if FAMILIES[name].kind == kind for case in of]
    for one, other in combinations(axes, 2):
        found = {(getattr(case, one), getattr(case, other)) for case in cases}
        assert found == {*product(axes[one], axes[other])}


@pytest.mark.parametrize("name", ["causal: llama", "classifier: bert"])
def test_dora_is_refused(name: str, tmp_path: Path) -> None:
    base = _base(name, False)
    folders = reference.make_adapters(FAMILIES[name], base, "dora", tmp_path)
    with pytest.raises(UserError, match="use_dora"):
        CurveModel.from_adapters(copy.deepcopy(base), folders)
