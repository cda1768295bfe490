"""The HTTP app: what it answers, what it refuses, its pages and figures."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.made_runs import tree_hash
from helpers.served import LIMITS, ROWS, TEXTS, same
from helpers.waiting import SECONDS, until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loracurve.inference.config import GenerateConfig
from loracurve.inference.generation import generate
from loracurve.runs.run import Run
from loracurve.serving.config import ServeConfig

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
testclient = pytest.importorskip("fastapi.testclient")

from loracurve.serving.app import make_app  # noqa: E402
from loracurve.serving.engine import Engine  # noqa: E402


def test_predictions_are_those_of_the_command(client: Any, folder: Path, predicted: list[dict[str, Any]]) -> None:
    before = tree_hash(folder)
    answer = client.post("/predict", json={"rows": ROWS})
    assert answer.status_code == 200 and answer.json()["truncated"] == 0
    same(answer.json()["predictions"], predicted)
    assert {"abstain", "set"} <= answer.json()["predictions"][0].keys()
    unnamed = client.post("/predict", json={"rows": [{"text": text} for text in TEXTS[:3]]}).json()["predictions"]
    assert [p["id"] for p in unnamed] == ["0", "1", "2"]
    same([{**p, "id": f"r{p['id']}"} for p in unnamed], predicted[:3])
    assert tree_hash(folder) == before


def test_three_parts_and_two(client: Any, run: Run, tmp_path: Path) -> None:
    """What /run announces is what predictions have and what adds up to their entropy."""
    curve = Path(shutil.copytree(run.folder / "curve", tmp_path / "curve")).parent
    with testclient.TestClient(make_app(replace(run, folder=curve), LIMITS), base_url="http://127.0.0.1") as other:
        for asked, parts in ((client, ["within_points", "between_points"]), (other, ["mutual_information"])):
            described = asked.get("/run").json()
            assert described["parts"] == ["expected_entropy", *parts]
            assert described["familiarity"] == (described["calibration"] is not None) == (asked is client)
            if asked is client:
                stored = json.loads((run.folder / "calibration.json").read_text())
                kept = {name: stored["selective"][name] for name in ("threshold", "coverage", "risk", "delta")}
                kept |= {"temperature": stored["temperature"], "measure": stored["measure"]}
                assert described["calibration"] == kept | {"foreign": stored["foreign"]["alpha"]}
            for found in asked.post("/predict", json={"rows": ROWS}).json()["predictions"]:
                assert found["entropy"] == pytest.approx(sum(found[name] for name in described["parts"]), abs=3e-6)
                assert (
                    ("within_points" in found) == ("familiarity" in found) == ("reasons" in found) == (asked is client)
                )


def test_texts_are_those_of_the_function(client: Any, run: Run) -> None:
    asked = {"max_new_tokens": 4, "temperature": 0.8, "top_p": 0.9, "seed": 5, "weights": "sequence"}
    answer = client.post("/generate", json={"prompts": TEXTS[:2], **asked})
    average = run.average()
    expected = generate(
        run.model, run.task.tokenizer, TEXTS[:2], GenerateConfig(**asked), average.where, average.weights
    )
    for found, generation in zip(answer.json()["generations"], expected, strict=True):
        assert found["text"] == generation.text and found["token_ids"] == generation.token_ids
        for name in ("log_probs", "entropy", "expected_entropy", "mutual_information", "weights"):
            assert found[name] == pytest.approx(getattr(generation, name), abs=2e-6)


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/predict", b"{", 400, "expected a JSON body, found broken JSON"),
        ("/predict", b"", 422, "body: Field required"),
        ("/predict", b"[" * 15_000, 400, "expected a JSON body"),
        ("/predict", b"\xff\xfe\x00", 400, "expected a JSON body"),
        ("/predict", b'{"rows": 1' + b"0" * 6000 + b"}", 400, "expected a JSON body"),
        ("/predict", b"[1]", 422, "body: "),
        ("/predict", b'{"row": []}', 422, "rows: Field required"),
        ("/predict", b'{"rows": []}', 422, "rows: expected 1 to 8, found 0"),
        ("/predict", json.dumps({"rows": ROWS + ROWS}).encode(), 422, "rows: expected 1 to 8, found 12"),
        ("/predict", b'{"rows": [1]}', 422, "rows.0: "),
        ("/predict", b'{"rows": [{"txt": "a"}]}', 422, "row 1: expected a field 'text'"),
        ("/predict", b'{"rows": [{"id": "x", "text": 1}]}', 422, "row 1: expected 'text' as text"),
        ("/predict", b'{"rows": [{"text": "\\ud800"}]}', 422, "row 1: expected text, found half of a surrogate"),
        ("/predict", b" " * 20_001, 413, "expected a body of at most 20000 bytes"),
        ("/predict", b" " * 200_000, 413, "expected a body of at most 20000 bytes"),
        ("/generate", b'{"prompts": ["\\ud800"]}', 422, "prompt 1: expected text, found half of a surrogate"),
        ("/generate", b'{"prompts": "a"}', 422, "prompts: "),
        ("/generate", b'{"prompts": [""]}', 422, "the prompt: expected some text"),
        ("/generate", b'{"prompts": ["a"], "max_new_tokens": 7}', 422, "max_new_tokens: expected at most 6, found 7"),
        ("/generate", b'{"prompts": ["a"], "temperature": NaN}', 422, "temperature: "),
        ("/generate", b'{"prompts": ["a"], "temperature": -1}', 422, "temperature: expected a number >= 0"),
        ("/generate", b'{"prompts": ["a"], "batch_size": 9}', 422, "batch_size: Extra inputs"),
        ("/nowhere", b"{}", 404, "/docs lists them"),
        ("/health", b"{}", 405, "Method Not Allowed"),
    ],
)
def test_what_is_refused(client: Any, path: str, body: bytes, status: int, message: str) -> None:
    answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"] and message in answer.json()["error"] and "\n" not in answer.json()["error"]
    assert client.post("/predict", json={"rows": ROWS[:1]}).status_code == 200, "it goes on"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "text", "text2"]), inner),
    max_leaves=6,
)
FIELDS = st.sampled_from(["id", "text", "text2", "label", "prompt", "choices"])


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    st.sampled_from(["/predict", "/generate"]),
    VALUES
    | st.fixed_dictionaries({"rows": st.lists(st.dictionaries(FIELDS, VALUES), max_size=3)})
    | st.fixed_dictionaries(
        {"prompts": st.lists(st.text(max_size=9), max_size=2), "max_new_tokens": st.integers(-1, 2)}
    )
    | st.fixed_dictionaries(
        {"prompts": st.just(["a"]), "temperature": st.floats(), "seed": st.integers(), "top_p": VALUES}
    ),
    st.integers(0, 4),
)
def test_whatever_is_sent_is_answered(client: Any, path: str, value: Any, cut: int) -> None:
    body = json.dumps(value).encode()
    answer = client.post(path, content=body[: len(body) - cut], headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400, 422), answer.text
    assert answer.status_code == 200 or list(answer.json()) == ["error"]


def test_other_content_types_and_hosts_are_refused(client: Any) -> None:
    answer = client.post("/predict", content=b"a=b", headers={"Content-Type": "text/plain"})
    assert answer.status_code == 415 and "found 'text/plain'" in answer.json()["error"]
    body = json.dumps({"rows": ROWS[:1]}).encode()
    for kind, status in (
        ("Application/JSON", 200),
        ('application/json; charset="UTF-8"', 200),
        ("application/json;Charset=utf-8; x=y", 200),
        ("application/json; charset=latin-1", 415),
        ("application/jsonx", 415),
    ):
        assert client.post("/predict", content=body, headers={"Content-Type": kind}).status_code == status
    zipped = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    answer = client.post("/predict", content=body, headers=zipped)
    assert answer.status_code == 415 and "found it encoded by 'gzip'" in answer.json()["error"]
    twice = [("Content-Type", "text/plain"), ("Content-Type", "application/json")]
    answer = client.post("/predict", content=body, headers=twice)
    assert answer.status_code == 400 and answer.json() == {"error": "expected one header content-type, found several"}
    for host, status in (("evil.example", 421), ("localhost:80", 200), ("[::1]:80", 200), ("127.0.0.1", 200)):
        assert client.get("/health", headers={"Host": host}).status_code == status


def test_a_token_guards_all_that_speaks_of_the_run(run: Run) -> None:
    with testclient.TestClient(make_app(run, LIMITS, token="a-secret-word"), base_url="http://some.host") as client:
        for path in ("/", "/docs", "/openapi.json", "/health"):
            assert client.get(path).status_code == 200
        for path in ("/run", "/metrics", "/nowhere"):
            assert client.get(path).status_code == 401
        for sent in ("", "Bearer other", "a-secret-word", "Basic a-secret-word"):
            answer = client.post("/predict", json={"rows": ROWS[:1]}, headers={"Authorization": sent})
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        for bad in (b"Bearer \xff\xfe-secret", "Bearer ä-secret".encode(), b"bearer", b"Bearer a-secret-word x"):
            assert client.get("/run", headers={b"Authorization": bad}).status_code == 401
        for scheme in ("bearer ", "BEARER ", "BeArEr  "):
            assert client.get("/run", headers={"Authorization": scheme + "a-secret-word"}).status_code == 200
        good = {"Authorization": "Bearer a-secret-word"}
        assert client.post("/predict", json={"rows": ROWS[:1]}, headers=good).status_code == 200
        assert client.get("/run", headers=good).json()["classes"] == ["negative", "positive"]


def test_full_queues_and_late_answers(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request runs and ends too late, one waits, a third is refused; the thread goes on behind them."""
    running, release, over = threading.Event(), threading.Event(), threading.Event()
    work = Engine.work

    def slow(self: Engine, key: Any, jobs: Any) -> None:
        running.set()
        release.wait()
        work(self, key, jobs)

    async def wait(waited: set[Any], timeout: float, return_when: str) -> Any:
        """`asyncio.wait`, with a clock that stands still until the test says that the time is over."""
        while not over.is_set():
            done, _ = await asyncio.wait(waited, timeout=0.01, return_when=return_when)
            if done:
                break

    monkeypatch.setattr(Engine, "work", slow)
    monkeypatch.setattr("loracurve.serving.app.asyncio", SimpleNamespace(**vars(asyncio) | {"wait": wait}))
    options = ServeConfig(max_queue=1, timeout_s=600)
    with testclient.TestClient(make_app(run, options), base_url="http://127.0.0.1") as client:
        try:
            with ThreadPoolExecutor() as pool:
                try:
                    first = pool.submit(client.post, "/predict", json={"rows": ROWS[:1]})
                    assert running.wait(SECONDS)
                    second = pool.submit(client.post, "/predict", json={"rows": ROWS[:1]})
                    until(lambda: "loracurve_queue_length 1.0" in client.get("/metrics").text, "one waits")
                    third = client.post("/predict", json={"rows": ROWS[:1]})
                    assert third.status_code == 503 and int(third.headers["retry-after"]) >= 1
                    assert "expected at most 1 waiting rows, found more; try again in" in third.json()["error"]
                finally:
                    over.set()
                for late, message in ((first, "no answer within 600 s"), (second, "not begun within 60 s")):
                    assert late.result().status_code == 503
                    assert message in late.result().json()["error"]
                    assert ("retry-after" in late.result().headers) == (late is second)
            over.clear()
        finally:
            release.set()
        assert client.post("/predict", json={"rows": ROWS[:1]}).status_code == 200


def test_a_fault_of_ours_is_told_and_survived(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_predict", lambda self, jobs: 1 / 0)
        app = make_app(run, LIMITS)
        with testclient.TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
            answer = client.post("/predict", json={"rows": ROWS[:1]})
            assert answer.status_code == 500 and "a fault of the server" in answer.json()["error"]
            patch.undo()
            assert client.post("/predict", json={"rows": ROWS[:1]}).status_code == 200


def test_the_figures_count(run: Run) -> None:
    with testclient.TestClient(make_app(run, LIMITS), base_url="http://127.0.0.1") as client:
        for rows in (ROWS[:2], ROWS[2:3], []):
            client.post("/predict", json={"rows": rows})
        client.get("/etc/passwd")
        made = client.post("/generate", json={"prompts": TEXTS[:1], "max_new_tokens": 3}).json()["generations"]
        text = client.get("/metrics").text
    read = sum(len(ids) for ids in run.task.tokenizer([*TEXTS[:3], TEXTS[0]], add_special_tokens=False)["input_ids"])
    for line in (
        'loracurve_requests_total{path="/predict",status="200"} 2.0',
        'loracurve_requests_total{path="/predict",status="422"} 1.0',
        'loracurve_requests_total{path="other",status="404"} 1.0',
        'loracurve_errors_total{path="/predict"} 1.0',
        'loracurve_request_seconds_count{path="/predict"} 3.0',
        "loracurve_batch_requests_count 3.0",
        f'loracurve_tokens_total{{kind="read"}} {read}.0',
        f'loracurve_tokens_total{{kind="generated"}} {len(made[0]["token_ids"])}.0',
        "loracurve_queue_length 0.0",
    ):
        assert f"\n{line}\n" in text, line


def test_the_pages_load_nothing_from_elsewhere(client: Any) -> None:
    for path in ("/", "/docs"):
        answer = client.get(path)
        assert answer.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "//" not in re.sub("</", "", answer.text.replace("<!doctype", "")), "no address of another host"
    api = client.get("/openapi.json").json()
    openai = {"/v1/completions", "/v1/chat/completions", "/v1/models"}
    assert set(api["paths"]) == {"/predict", "/generate", "/health", "/run", "/metrics"} | openai
    page = client.get("/docs").text
    for name in (*api["paths"], "max_new_tokens", "mutual_information", "Most tokens to generate for each prompt."):
        assert name in page
    decoding = api["components"]["schemas"]["GenerateRequest"]["properties"]
    assert decoding["max_new_tokens"]["default"] == GenerateConfig().max_new_tokens and "batch_size" not in decoding
