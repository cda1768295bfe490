"""Decoding with the model average: against a slow loop over PEFT adapters without a cache, and the exact mixture."""

from __future__ import annotations

import copy
import math
import warnings
from itertools import pairwise
from typing import Any

import peft
import pytest
import torch
from helpers import matrix
from helpers.tiny import adapters_on, lora_config, peft_twin, random_points, tiny
from helpers.tokenizers_made import eos_style, llama_style, qwen_style
from torch import Tensor

from loracurve.curve.spec import CurveSpec
from loracurve.inference.config import GenerateConfig
from loracurve.inference.generation import Generation, choose_tokens, generate
from loracurve.model.curve_model import CurveModel
from loracurve.system.errors import UserError
from loracurve.system.randomness import generator
from loracurve.system.ranges import LARGEST, SMALLEST
from loracurve.tasks.tokens import leading_tokens, tokenise

T = torch.tensor([0.0, 0.3, 0.8, 1.0], dtype=torch.float64)
WEIGHTS = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
PROMPTS = ["Question: which is good", "The sentiment of the word film was a very plain story about water is", "a"]
TOKENIZERS = {"qwen2": qwen_style, "llama": llama_style}


def build(architecture: str, **options: Any) -> tuple[CurveModel, torch.nn.Module, Any]:
    """A curve whose points differ, an untouched base, and its tokenizer."""
    tokenizer = TOKENIZERS[architecture]()
    base = tiny(architecture, vocabulary=len(tokenizer))
    untouched = copy.deepcopy(base)
    model = CurveModel(base, lora_config(architecture, **options), CurveSpec(2, 2))
    model.set_curve(model.spec, random_points(model))
    return model, untouched, tokenizer


@torch.no_grad()
def slow(
    twin: peft.PeftModel, ids: list[int], weights: Tensor, config: GenerateConfig, number: int, ends: set[int]
) -> dict[str, list[Any]]:
    """One prompt by a loop over adapters, the whole text again at each token, in float64 probabilities."""
    out: dict[str, list[Any]] = {"token_ids": [], "log_probs": [], "entropy": [], "expected_entropy": []}
    w = weights.clone()
    for step in range(config.max_new_tokens):
        rows = []
        for i in range(len(weights)):
            twin.set_adapter(f"p{i}")
            rows.append(twin(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(-1))
        probs = torch.stack(rows)
        average = w @ probs
        if config.temperature == 0:
            token = int(average.argmax())
        else:
            tempered = average ** (1 / config.temperature)
            tempered /= tempered.sum()
            kept, total = [], 0.0
            for token in tempered.argsort(descending=True).tolist():
                kept.append(token)
                total += float(tempered[token])
                if total >= config.top_p:
                    break
            u = float(torch.rand((), generator=generator(config.seed, "generate", number, step), dtype=torch.float64))
            below = 0.0
            for token in kept:
                below += float(tempered[token]) / total
                if below > u:
                    break
        out["token_ids"].append(token)
        out["log_probs"].append(float(average[token].log()))
        out["entropy"].append(float(torch.special.entr(average).sum()))
        out["expected_entropy"].append(float(w @ torch.special.entr(probs).sum(-1)))
        if config.weights == "sequence":
            w = w * probs[:, token] / (w @ probs[:, token])
        ids = [*ids, token]
        if token in ends:
            break
    return out | {"weights": w.tolist()}


@pytest.mark.parametrize("weights", ["fixed", "sequence"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.3, "top_p": 0.8, "seed": 4}], ids=["greedy", "top-p"])
@matrix.decoders
def test_equals_a_slow_loop_over_peft_adapters(architecture: str, sampling: dict[str, Any], weights: Any) -> None:
    model, base, tokenizer = build(architecture)
    twin = peft_twin(base, model.config, adapters_on(model, T))
    config = GenerateConfig(max_new_tokens=6, weights=weights, batch_size=2, **sampling)
    found = generate(model, tokenizer, PROMPTS, config, T, WEIGHTS)
    lead = leading_tokens(tokenizer)
    for number, (ids, generation) in enumerate(zip(tokenise(tokenizer, PROMPTS), found, strict=True)):
        expected = slow(twin, [*lead, *ids], WEIGHTS, config, number, {tokenizer.eos_token_id})
        assert generation.token_ids == expected.pop("token_ids")
        for name, values in expected.items():
            assert getattr(generation, name) == pytest.approx(values, abs=2e-4), name
    assert max(m for g in found for m in g.mutual_information) > 0.05, "the points differ, or nothing was tested"


def test_upper_layers_alone_share_the_cache_of_the_lower_ones() -> None:
    model, base, tokenizer = build("qwen2", layers_to_transform=[2], target_modules=["q_proj", "v_proj"])
    assert model.runner.replication.shared == 2
    twin = peft_twin(base, model.config, adapters_on(model, T))
    config = GenerateConfig(max_new_tokens=6)
    for ids, generation in zip(
        tokenise(tokenizer, PROMPTS), generate(model, tokenizer, PROMPTS, config, T, WEIGHTS), strict=True
    ):
        expected = slow(twin, ids, WEIGHTS, config, 0, {tokenizer.eos_token_id})
        assert generation.token_ids == expected["token_ids"]
        assert generation.log_probs == pytest.approx(expected["log_probs"], abs=2e-4)


def test_sequence_weights_are_the_mixture_of_whole_texts() -> None:
    """log p of the text equals log sum_i w_i p_i(text), with p_i the product over its tokens at one point."""
    model, _, tokenizer = build("qwen2")
    config = GenerateConfig(max_new_tokens=7, temperature=1.0, weights="sequence", seed=1)
    (found,) = generate(model, tokenizer, PROMPTS[0], config, T, WEIGHTS)
    alone = []
    ids = tokenise(tokenizer, [PROMPTS[0]])[0]
    with torch.no_grad():
        for t in T.tolist():
            whole = torch.tensor([ids + found.token_ids])
            log_probs = model(t, input_ids=whole).logits[0].double().log_softmax(-1)
            alone.append(sum(float(log_probs[len(ids) - 1 + k, x]) for k, x in enumerate(found.token_ids)))
    expected = math.log(sum(w * math.exp(a) for w, a in zip(WEIGHTS.tolist(), alone, strict=True)))
    assert sum(found.log_probs) == pytest.approx(expected, abs=1e-3)
    posterior = [w * math.exp(a - expected) for w, a in zip(WEIGHTS.tolist(), alone, strict=True)]
    assert found.weights == pytest.approx(posterior, abs=1e-3)


def test_draws_follow_the_tempered_and_cut_distribution() -> None:
    log_probs = torch.tensor([0.5, 0.05, 0.3, 0.15]).log().expand(20_000, 4)
    uniform = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000  # a grid: no chance in it

    def shares(**options: float) -> list[float]:
        chosen = choose_tokens(log_probs, GenerateConfig(**options), uniform)  # type: ignore[arg-type]
        return (torch.bincount(chosen, minlength=4) / len(chosen)).tolist()

    assert shares(temperature=1.0) == pytest.approx([0.5, 0.05, 0.3, 0.15], abs=1e-4)
    assert shares(temperature=1.0, top_p=0.79) == pytest.approx([5 / 8, 0, 3 / 8, 0], abs=1e-4)
    squares = [0.25, 0.0025, 0.09, 0.0225]
    assert shares(temperature=0.5) == pytest.approx([s / sum(squares) for s in squares], abs=1e-4)
    assert shares(temperature=1.0, top_p=1e-9) == [1, 0, 0, 0]
    assert shares() == [1, 0, 0, 0]


def test_draws_do_not_depend_on_the_batch_and_change_with_the_seed() -> None:
    model, _, tokenizer = build("qwen2")

    def drawn(batch_size: int, seed: int) -> list[list[int]]:
        config = GenerateConfig(max_new_tokens=8, temperature=1.0, batch_size=batch_size, seed=seed)
        return [g.token_ids for g in generate(model, tokenizer, PROMPTS, config, T)]

    assert drawn(1, 0) == drawn(3, 0) != drawn(3, 1)


@matrix.decoders
def test_pieces_make_up_the_text_as_the_tokenizer_decodes_it(architecture: str) -> None:
    model, _, tokenizer = build(architecture)
    config = GenerateConfig(max_new_tokens=12, temperature=1.0, seed=3)
    for generation in generate(model, tokenizer, PROMPTS, config, T):
        own = generation.tokens[: -1 if generation.finish == "eos" else None]
        assert "".join(own) == generation.text
        ids = [*leading_tokens(tokenizer), *tokenise(tokenizer, [generation.prompt])[0], *generation.token_ids]
        whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        shown = generation.prompt + generation.text
        assert whole.startswith(shown)
        # A character whose bytes are not all there yet is not shown.
        assert whole == shown or whole.endswith("\ufffd")
        columns = ("tokens", "log_probs", "entropy", "expected_entropy", "mutual_information")
        assert {len(getattr(generation, name)) for name in columns} == {len(generation.token_ids)}


def test_stops_at_the_end_of_the_sequence_and_goes_on_with_the_others() -> None:
    model, _, tokenizer = build("qwen2")
    config = GenerateConfig(max_new_tokens=6)
    plain = generate(model, tokenizer, PROMPTS, config, T)
    # The third token of the first prompt is made the end; by the model's own setting it ends too.
    end = plain[0].token_ids[2]
    model.model.generation_config.eos_token_id = [end, tokenizer.eos_token_id]
    found = generate(model, tokenizer, PROMPTS, config, T)
    cut: Generation
    for before, cut in zip(plain, found, strict=True):
        stop = before.token_ids.index(end) + 1 if end in before.token_ids else len(before.token_ids)
        assert cut.token_ids == before.token_ids[:stop]
        assert cut.finish == ("eos" if stop < 6 or before.token_ids[-1] == end else "length")
        assert cut.log_probs == pytest.approx(before.log_probs[:stop], abs=1e-5)
    assert found[0].finish == "eos" and found[0].tokens[-1] == tokenizer.convert_ids_to_tokens(end)
    assert any(g.finish == "length" for g in found)


def test_no_end_of_sequence_stands_behind_the_prompt() -> None:
    """A tokenizer that appends EOS by default: the prompt is BOS and text."""
    tokenizer = eos_style()
    base = tiny("qwen2", vocabulary=len(tokenizer))
    model = CurveModel(base, lora_config("qwen2"), CurveSpec(1, 2))
    model.set_curve(model.spec, random_points(model))
    (found,) = generate(model, tokenizer, "the film is", GenerateConfig(max_new_tokens=1), torch.tensor([0.4]))
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenise(tokenizer, ["the film is"])[0]]])
    with torch.no_grad():
        assert found.token_ids == [int(model(0.4, input_ids=ids).logits[0, -1].argmax())]
    assert found.mutual_information == [pytest.approx(0, abs=1e-5)]


@pytest.mark.parametrize("make", [llama_style, eos_style])
def test_a_prompt_that_begins_with_bos_has_it_once(make: Any) -> None:
    """What a chat template writes is continued as the tokens that the template itself gives."""
    tokenizer = make()
    template = "{{ bos_token }}[user] {{ messages[0]['content'] }}"
    turn = [{"role": "user", "content": "good film"}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, chat_template=template)
    ids = tokenizer.apply_chat_template(turn, tokenize=True, chat_template=template, return_dict=False)
    assert ids.count(tokenizer.bos_token_id) == 1
    base = tiny("llama", vocabulary=len(tokenizer))
    untouched = copy.deepcopy(base)
    model = CurveModel(base, lora_config("llama"), CurveSpec(1, 2))
    model.set_curve(model.spec, random_points(model))
    twin = peft_twin(untouched, model.config, adapters_on(model, T))
    config = GenerateConfig(max_new_tokens=4)
    (found,) = generate(model, tokenizer, text, config, T, WEIGHTS)
    expected = slow(twin, ids, WEIGHTS, config, 0, {tokenizer.eos_token_id})
    assert found.token_ids == expected["token_ids"]
    assert found.log_probs == pytest.approx(expected["log_probs"], abs=2e-4)
    (without,) = generate(model, tokenizer, text.removeprefix("<s>"), config, T, WEIGHTS)
    if make is eos_style:  # the other one puts a space in front of a text that begins without a token
        assert without.log_probs == found.log_probs


@matrix.decoders
def test_nothing_warns_of_what_will_go(architecture: str) -> None:
    model, _, tokenizer = build(architecture)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = generate(model, tokenizer, PROMPTS, GenerateConfig(max_new_tokens=3, batch_size=2), T, WEIGHTS)
    assert [len(generation.token_ids) for generation in found] == [3, 3, 3]


def test_coefficients_beside_the_curve_and_no_trace_in_the_model() -> None:
    model, _, tokenizer = build("llama")
    model.train()
    config = GenerateConfig(max_new_tokens=3)
    along = generate(model, tokenizer, PROMPTS, config, T, WEIGHTS)
    beside = generate(model, tokenizer, PROMPTS, config, model.coefficients(T), WEIGHTS)
    assert along == beside
    assert model.training and all(p.grad is None for p in model.parameters())


def test_what_cannot_be_decoded_is_said_in_one_line() -> None:
    model, _, tokenizer = build("qwen2")
    for options, message in (
        ({"max_new_tokens": 0}, "max_new_tokens: expected a whole number >= 1, found 0"),
        ({"temperature": -1.0}, "temperature: expected a number >= 0"),
        ({"temperature": math.nan}, "temperature: expected a number >= 0, found nan"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p: expected a number in \(0, 1\], found 0.0"),
        ({"top_p": 0.9}, "top_p: expected 1 with temperature 0"),
    ):
        with pytest.raises(UserError, match=message):
            GenerateConfig(**options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"prompt 2: expected at most 512 tokens with 500 new ones, found \d+ \+ 500"):
        generate(model, tokenizer, ["a", "good film " * 20], GenerateConfig(max_new_tokens=500))
    with pytest.raises(UserError, match="the prompt: expected some text"):
        generate(model, tokenizer, "")
    with pytest.raises(UserError, match="prompt 2: expected text, found half of a surrogate pair"):
        generate(model, tokenizer, ["a", "b\ud800"])
    with pytest.raises(UserError, match="at least one prompt"):
        generate(model, tokenizer, [])
    encoder = CurveModel(tiny("encoder"), lora_config("encoder"), CurveSpec(1, 1))
    with pytest.raises(UserError, match="causal language model, found a classifier"):
        generate(encoder, tokenizer, "a")


def test_progress_counts_the_steps_of_each_batch() -> None:
    model, _, tokenizer = build("qwen2")
    seen: list[int] = []
    generate(model, tokenizer, PROMPTS, GenerateConfig(max_new_tokens=2, batch_size=2), T, progress=seen.append)
    assert seen == [1, 2, 1, 2] and all(b - a in (1, -1) for a, b in pairwise(seen))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_outputs_that_are_no_numbers_are_refused(temperature: float) -> None:
    model, _, tokenizer = build("qwen2")
    with torch.no_grad():
        for point in model.factors:
            point.fill_(1e30)
    with pytest.raises(UserError, match="generate: the model's outputs are no numbers"):
        generate(model, tokenizer, PROMPTS, GenerateConfig(max_new_tokens=2, temperature=temperature))


def test_the_lowest_and_highest_temperatures_have_their_limits() -> None:
    log_probs = torch.tensor([[0.2, 0.5, 0.3]]).log()
    draws = torch.tensor([0.999], dtype=torch.float64)
    assert choose_tokens(log_probs, GenerateConfig(temperature=SMALLEST), draws).tolist() == [1], "greedy"
    flat = [
        choose_tokens(log_probs, GenerateConfig(temperature=LARGEST), torch.tensor([u])).item() for u in (0.1, 0.5, 0.9)
    ]
    assert sorted(flat) == [0, 1, 2], "each a third"
