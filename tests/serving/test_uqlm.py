"""uqlm and LangChain on a served run. They need another NumPy and transformers than the library, so they run in an
environment of their own, whose Python LORACURVE_UQLM names."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import pytest
from helpers.processes import ran
from helpers.served import LIMITS, TEMPLATE, served

from loracurve.inference.config import GenerateConfig
from loracurve.inference.generation import Generation, generate
from loracurve.runs.run import Run

CLIENTS = os.environ.get("LORACURVE_UQLM")
pytestmark = pytest.mark.skipif(CLIENTS is None, reason="LORACURVE_UQLM names no Python that has uqlm")
QUESTIONS = ["good ?", "a film"]
ALONE = "user : {} answer :"
HELPFUL = "system : You are a helpful assistant. user : {} answer :"
"""uqlm puts this system message in front."""

TOKENS, TOP = 4, 5
PROGRAM = f"""
import asyncio, json, sys
from langchain_openai import ChatOpenAI
from uqlm import BlackBoxUQ, WhiteBoxUQ

def llm(**options):
    return ChatOpenAI(base_url=sys.argv[1], api_key="none", model="run", max_completion_tokens={TOKENS}, **options)

async def scored(kind, count, temperature, **options):
    scorer = kind(llm=llm(temperature=temperature), **options)
    result = await scorer.generate_and_score({QUESTIONS}, num_responses=count, show_progress_bars=False)
    return result.to_dict()["data"]

def langchain():
    asked = llm(temperature=0, logprobs=True, top_logprobs={TOP}, disable_streaming=True)
    answers = asked.batch({QUESTIONS})
    raw = asked.client.create(model="run", messages=[dict(role="user", content={QUESTIONS}[0])], temperature=0)
    return dict(
        texts=[a.content for a in answers],
        tokens=[a.response_metadata["logprobs"]["content"] for a in answers],
        streamed="".join(part.content for part in asked.stream({QUESTIONS}[0])),
        uncertainty=raw.choices[0].uncertainty,
    )

async def uqlm():
    single, top = ["sequence_probability", "min_probability"], ["mean_token_negentropy", "probability_margin"]
    return dict(
        single=await scored(WhiteBoxUQ, 1, 0, scorers=single),
        top=await scored(WhiteBoxUQ, 1, 0, scorers=top, top_k_logprobs={TOP}),
        sampled=await scored(WhiteBoxUQ, 3, 0, scorers=["monte_carlo_probability"]),
        matched=await scored(BlackBoxUQ, 3, 1.0, scorers=["exact_match"]),
    )

print(json.dumps(dict(langchain=langchain(), **asyncio.run(uqlm()))))
"""


@pytest.fixture(scope="module")
def found(run: Run) -> dict[str, Any]:
    """What the clients say of a server of the run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.task.tokenizer, "chat_template", TEMPLATE)
        with served(run, LIMITS) as address:
            answer = ran([CLIENTS, "-W", "ignore", "-c", PROGRAM, f"{address}/v1"])
    assert answer.returncode == 0, answer.stderr[-4000:]
    texts: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return texts


def made(run: Run, prompt: str) -> list[Generation]:
    """The run's own texts for the questions."""
    average, config = run.average(), GenerateConfig(max_new_tokens=TOKENS, alternatives=TOP)
    prompts = [prompt.format(question) for question in QUESTIONS]
    return generate(run.model, run.task.tokenizer, prompts, config, average.where, average.weights)


def test_langchain_reads_texts_log_probabilities_and_uncertainty(run: Run, found: dict[str, Any]) -> None:
    expected, given = made(run, ALONE), found["langchain"]
    assert given["texts"] == [m.text for m in expected] and given["streamed"] == expected[0].text
    for tokens, one in zip(given["tokens"], expected, strict=True):
        assert [t["token"] for t in tokens] == one.tokens
        assert [t["logprob"] for t in tokens] == pytest.approx(one.log_probs, abs=1e-4)
        for token, others in zip(tokens, one.alternatives, strict=True):
            assert [t["logprob"] for t in token["top_logprobs"]] == pytest.approx([v for _, v in others], abs=1e-4)
    assert given["uncertainty"]["tokens"]["entropy"][:TOKENS] == pytest.approx(expected[0].entropy, abs=1e-4)


def test_uqlm_scores_the_average(run: Run, found: dict[str, Any]) -> None:
    expected = made(run, HELPFUL)
    assert found["single"]["responses"] == found["top"]["responses"] == [m.text for m in expected]
    log_probs = [np.array(m.log_probs) for m in expected]
    assert found["single"]["sequence_probability"] == pytest.approx([np.exp(v.mean()) for v in log_probs], abs=1e-5)
    assert found["single"]["min_probability"] == pytest.approx([np.exp(v.min()) for v in log_probs], abs=1e-5)
    best = [np.exp([[v for _, v in place] for place in m.alternatives]) for m in expected]
    shares = [p / p.sum(-1, keepdims=True) for p in best]
    negentropy = [1 + (p * np.log(p)).sum(-1).mean() / np.log(TOP) for p in shares]
    assert found["top"]["mean_token_negentropy"] == pytest.approx(negentropy, abs=1e-4)
    assert found["top"]["probability_margin"] == pytest.approx([(p[:, 0] - p[:, 1]).mean() for p in best], abs=1e-4)


def test_uqlm_draws_texts_that_differ(found: dict[str, Any]) -> None:
    sampled = (found["sampled"][name] for name in ("logprob", "sampled_logprob", "monte_carlo_probability"))
    for greedy, drawn, score in zip(*sampled, strict=True):
        of_tokens = [[token["logprob"] for token in text] for text in (greedy, *drawn)]
        assert len(drawn) == 3 and not of_tokens[1] == of_tokens[2] == of_tokens[3], "a seed for each request"
        assert score == pytest.approx(np.mean([np.exp(np.mean(text)) for text in of_tokens]), abs=1e-5)
    matched = (found["matched"][name] for name in ("responses", "sampled_responses", "exact_match"))
    for answer, drawn, share in zip(*matched, strict=True):
        assert share == pytest.approx(sum(text == answer for text in drawn) / 3)
