"""What clients of OpenAI's API get: log-probabilities and uncertainty of the average, in the shapes that they know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.served import LIMITS, TEMPLATE, TEXTS

from loracurve.model.curve_model import CurveModel
from loracurve.runs.run import Run
from loracurve.tasks.tokens import leading_tokens, tokenise, with_lead

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
testclient = pytest.importorskip("fastapi.testclient")

from loracurve.serving.app import make_app  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("entropy", "expected_entropy", "mutual_information")
GREEDY = {"model": "run", "max_tokens": 4, "temperature": 0}
TURNS = [{"role": "system", "content": "be brief"}, {"role": "user", "content": [{"type": "text", "text": "good ?"}]}]
PUT_IN = "system : be brief user : good ? answer :"


@pytest.fixture
def chatty(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.task.tokenizer, "chat_template", TEMPLATE)


def _plain(run: Run, prompt: str, written: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities [T, V] of the average at each written token, its entropy and expected entropy [T]; no cache."""
    average, tokenizer = run.average(), run.task.tokenizer
    ids = with_lead(leading_tokens(tokenizer), tokenise(tokenizer, [prompt])[0])
    whole = torch.tensor([ids + written])
    with torch.inference_mode():
        logits = run.model(average.where, input_ids=whole, attention_mask=torch.ones_like(whole)).logits
    probs = logits[:, len(ids) - 1 : -1].double().softmax(-1)
    weights = average.weights.double()[:, None]
    mean = (weights[..., None] * probs).sum(0)
    expected = (weights * -(probs * probs.log()).sum(-1)).sum(0)
    return mean.log(), -(mean * mean.log()).sum(-1), expected


def test_log_probabilities_are_those_of_generate_and_of_a_plain_average(client: Any, run: Run) -> None:
    answer = client.post("/v1/completions", json={**GREEDY, "prompt": TEXTS[:2], "logprobs": 3}).json()
    made = client.post("/generate", json={"prompts": TEXTS[:2], "max_new_tokens": 4}).json()["generations"]
    assert answer["object"] == "text_completion" and [c["index"] for c in answer["choices"]] == [0, 1]
    for choice, generation in zip(answer["choices"], made, strict=True):
        ids = generation["token_ids"]
        log_probs, entropy, expected = _plain(run, generation["prompt"], ids)
        given = choice["logprobs"]
        assert choice["text"] == generation["text"] and given["tokens"] == generation["tokens"]
        assert choice["finish_reason"] == {"eos": "stop", "length": "length"}[generation["finish"]]
        assert given["token_logprobs"] == generation["log_probs"]
        assert given["token_logprobs"] == pytest.approx(log_probs[range(len(ids)), ids].tolist(), abs=1e-4)
        best = log_probs.topk(3)
        for found, values, places in zip(given["top_logprobs"], *(b.tolist() for b in best), strict=True):
            named: dict[str, float] = {}
            for value, place in zip(values, places, strict=True):
                named.setdefault(run.task.tokenizer.decode([place]), value)
            assert found == pytest.approx(named, abs=1e-4)
        assert choice["uncertainty"]["tokens"] == {name: generation[name] for name in PARTS}
        assert choice["uncertainty"]["tokens"]["entropy"] == pytest.approx(entropy.tolist(), abs=1e-4)
        assert choice["uncertainty"]["tokens"]["expected_entropy"] == pytest.approx(expected.tolist(), abs=1e-4)
        assert choice["uncertainty"]["entropy"] == pytest.approx(float(entropy.mean()), abs=1e-4)
    read = sum(
        len(with_lead(leading_tokens(run.task.tokenizer), tokenise(run.task.tokenizer, [t])[0])) for t in TEXTS[:2]
    )
    written = sum(len(g["token_ids"]) for g in made)
    usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    assert answer["usage"] == usage


@pytest.mark.usefixtures("chatty")
def test_a_conversation_is_its_template_continued(client: Any) -> None:
    asked = {"model": "run", "messages": TURNS, "max_completion_tokens": 3, "temperature": 0}
    answer = client.post("/v1/chat/completions", json={**asked, "logprobs": True, "top_logprobs": 2}).json()
    (made,) = client.post("/generate", json={"prompts": [PUT_IN], "max_new_tokens": 3, "alternatives": 2}).json()[
        "generations"
    ]
    (choice,) = answer["choices"]
    assert answer["object"] == "chat.completion" and choice["message"]["content"] == made["text"]
    content = choice["logprobs"]["content"]
    assert [(c["token"], c["logprob"]) for c in content] == list(zip(made["tokens"], made["log_probs"], strict=True))
    for token, others in zip(content, made["alternatives"], strict=True):
        assert [top["logprob"] for top in token["top_logprobs"]] == [value for _, value in others]
        assert token["logprob"] == others[0][1], "greedy: the first is the most probable"
    assert client.post("/v1/chat/completions", json=asked).json()["choices"][0]["logprobs"] is None


def test_drawn_texts_have_streams_of_their_own(client: Any) -> None:
    """`n` texts of a prompt are those of `n` equal prompts; without a seed, one is drawn and told."""
    asked = {"model": "run", "prompt": TEXTS[0], "max_tokens": 4, "n": 3, "logprobs": 0}
    made = client.post(
        "/generate", json={"prompts": [TEXTS[0]] * 3, "max_new_tokens": 4, "temperature": 1.0, "seed": 7}
    ).json()["generations"]
    answer = client.post("/v1/completions", json={**asked, "seed": 7}).json()
    assert [c["logprobs"]["tokens"] for c in answer["choices"]] == [g["tokens"] for g in made]
    assert answer["usage"]["prompt_tokens"] == made[0]["prompt_tokens"] and answer["seed"] == 7
    drawn = client.post("/v1/completions", json=asked).json()
    again = client.post("/v1/completions", json={**asked, "seed": drawn["seed"]}).json()
    assert [c["text"] for c in drawn["choices"]] == [c["text"] for c in again["choices"]]


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        ("completions", {"stream": True}, "stream: expected none or False, found 'True'"),
        ("completions", {"stop": ["."]}, "stop: expected none"),
        ("completions", {"frequency_penalty": 0.5}, "frequency_penalty: expected none or 0"),
        ("completions", {"model": "gpt"}, "model: expected 'run', found 'gpt'"),
        ("completions", {"n": 2}, "n: expected 1 with temperature 0"),
        ("completions", {"n": 9, "temperature": 1}, "prompts times n: expected 1 to 8, found 9"),
        ("completions", {"prompt": [1, 2]}, "prompt"),
        ("completions", {"max_tokens": 7}, "expected at most 6, found 7"),
        ("completions", {"temperature": -1}, "temperature: expected a number >= 0"),
        ("completions", {"logprobs": 21}, "logprobs: "),
        ("chat/completions", {}, "expected a tokenizer with a chat template, found one without"),
        ("chat/completions", {"messages": []}, "messages: "),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0."),
    ],
)
def test_what_is_refused(client: Any, path: str, change: dict[str, Any], message: str) -> None:
    body = {**GREEDY, **({"messages": TURNS} if path.startswith("chat") else {"prompt": "a"}), **change}
    answer = client.post(f"/v1/{path}", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert message in error["message"] and "\n" not in error["message"]


@pytest.mark.usefixtures("chatty")
def test_a_conversation_asks_for_one_length_and_for_log_probabilities_before_others(client: Any) -> None:
    for change, message in (({"top_logprobs": 2}, "top_logprobs: "), ({"max_completion_tokens": 2}, "max_tokens: ")):
        answer = client.post("/v1/chat/completions", json={**GREEDY, "messages": TURNS, **change})
        assert answer.status_code == 400 and answer.json()["error"]["message"].startswith(message)


def test_tokens_limits_and_classifiers_answer_in_the_same_object(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    guarded = testclient.TestClient(make_app(run, LIMITS, token="a long secret"), base_url="http://127.0.0.1")
    answer = guarded.get("/v1/models")
    assert answer.status_code == 401 and answer.json()["error"]["type"] == "authentication_error"
    right = {"Authorization": "Bearer a long secret"}
    assert [m["id"] for m in guarded.get("/v1/models", headers=right).json()["data"]] == ["run"]
    long = guarded.post("/v1/completions", json={"prompt": "a" * 30_000}, headers=right)
    assert long.status_code == 413 and "20000 bytes" in long.json()["error"]["message"]
    nowhere = guarded.get("/v1/nothing", headers=right)
    assert nowhere.status_code == 404 and nowhere.json()["error"]["type"] == "not_found_error"
    monkeypatch.setattr(CurveModel, "is_classifier", True)
    head = testclient.TestClient(make_app(run, LIMITS), base_url="http://127.0.0.1")
    for path, what in (("completions", {"prompt": "a"}), ("chat/completions", {"messages": TURNS})):
        refused = head.post(f"/v1/{path}", json={**GREEDY, **what})
        assert refused.status_code == 400 and "this run is of a classifier" in refused.json()["error"]["message"]


@pytest.mark.usefixtures("chatty")
def test_the_client_of_openai_reads_the_answers(client: Any) -> None:
    openai = pytest.importorskip("openai", reason="the package openai is not installed")
    asking = openai.OpenAI(base_url="http://127.0.0.1/v1", api_key="none", http_client=client, max_retries=0)
    (model,) = asking.models.list()
    text = asking.completions.create(model=model.id, prompt="it was", max_tokens=3, temperature=0, logprobs=2)
    type(text).model_validate(text.model_dump(), strict=True)
    turn = asking.chat.completions.create(
        model=model.id, messages=TURNS, max_completion_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    type(turn).model_validate(turn.model_dump(), strict=True)
    assert turn.usage.completion_tokens == len(turn.choices[0].logprobs.content)
    assert set(turn.choices[0].uncertainty) == {*PARTS, "tokens"}
    with pytest.raises(openai.BadRequestError, match="stream: expected none or False"):
        asking.completions.create(model=model.id, prompt="a", stream=True)


@pytest.mark.usefixtures("chatty")
def test_the_example_of_the_page_runs(client: Any) -> None:
    pytest.importorskip("openai", reason="the package openai is not installed")
    block = (ROOT / "docs" / "serve.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {"served": client}
    exec(
        block.replace('api_key="none"', 'api_key="none", http_client=served').replace("127.0.0.1:8000", "127.0.0.1"),
        names,
    )
    assert 0 <= names["choice"].uncertainty["mutual_information"] <= names["choice"].uncertainty["entropy"]
