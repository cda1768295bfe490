"""`loracurve serve`: what it answers, what it refuses, and that clients run together as they would alone."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_runs import QUICK, base_folder, command, config_file, data_folder, tree_hash

from loracurve.cli import main
from loracurve.inference.config import GenerateConfig
from loracurve.inference.generation import generate
from loracurve.runs.run import Run, open_run
from loracurve.serving.batcher import Batcher, Closed, Job, QueueFull
from loracurve.serving.config import ServeConfig
from loracurve.system.errors import UserError

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
testclient = pytest.importorskip("fastapi.testclient")

from loracurve.serving.app import make_app  # noqa: E402
from loracurve.serving.engine import Engine  # noqa: E402

TEXTS = ["the film is good", "a truly awful", "it was fine", "quite dull", "i found the music lovely", "poor " * 30]
ROWS = [{"id": f"r{i}", "text": text} for i, text in enumerate(TEXTS)]
LIMITS = ServeConfig(max_body_bytes=20_000, max_rows=8, max_tokens_per_row=100, max_new_tokens=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fitted and calibrated run of classification by a causal model."""
    root = tmp_path_factory.mktemp("server")
    base, data = base_folder(root / "base", "qwen2"), data_folder(root / "data", "label")
    command(
        "fit", config_file(root / "c.yaml", base, data, "label"), "--out", root / "run", "--curve.kind=free", *QUICK
    )
    command("calibrate", root / "run", "--risk=.9")
    return root / "run"


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return open_run(folder)


@pytest.fixture(scope="module")
def client(run: Run) -> Iterator[Any]:
    with testclient.TestClient(make_app(run, LIMITS), base_url="http://127.0.0.1") as client:
        yield client


@pytest.fixture(scope="module")
def predicted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What `loracurve predict` says of ROWS."""
    written = tmp_path_factory.mktemp("predicted")
    (written / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    command("predict", folder, written / "rows.jsonl", "--out", written / "o.jsonl")
    return [json.loads(line) for line in (written / "o.jsonl").read_text().splitlines()]


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Predictions are equal up to the rounding of another batch."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert one[name] == (pytest.approx(value, abs=3e-6) if isinstance(value, float) else value) or (
                name == "probs" and one[name] == pytest.approx(value, abs=3e-6)
            )


# ---- answers


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


def test_clients_that_run_together_get_what_they_get_alone(run: Run) -> None:
    """Of rows, of greedy texts and of drawn ones; a bad row fails its own request only."""
    engine = Engine(run, LIMITS)
    rows = [engine.rows(ROWS[:2]), engine.rows(ROWS[2:5]), engine.rows([{"text": "long " * 101}])]
    together, alone = _answers(engine, "predict", rows), [_answers(engine, "predict", [r])[0] for r in rows]
    for one, other in zip(together[:2], alone[:2], strict=True):
        same(one["predictions"], other["predictions"])
    assert "row 1: expected at most 100 tokens, found" in str(together[2]) and isinstance(together[2], UserError)
    for config in (GenerateConfig(max_new_tokens=4), GenerateConfig(max_new_tokens=4, temperature=1.0, seed=2)):
        prompts = [TEXTS[:2], TEXTS[2:5], [TEXTS[0]], ["long " * 101]]
        together = _answers(engine, config, prompts)
        for one, p in zip(together[:3], prompts, strict=False):
            (other,) = _answers(engine, config, [p])
            assert [g["token_ids"] for g in one["generations"]] == [g["token_ids"] for g in other["generations"]]
        assert "prompt 1: expected at most 100 tokens" in str(together[3])


def _answers(engine: Engine, key: Any, work: list[Any]) -> list[Any]:
    jobs = [Job(key, w, 0.1, time.monotonic() + 60) for w in work]
    engine.work(key, jobs)
    return [job.future.exception() or job.future.result() for job in jobs]


def test_decoding_ends_when_nobody_waits(run: Run) -> None:
    engine = Engine(run, LIMITS)
    config = GenerateConfig(max_new_tokens=400)
    late = Job(config, TEXTS[:1], 0.1, time.monotonic() + 0.05)
    with pytest.raises(Exception, match="nobody waits"):
        engine.work(config, [late])
    assert not late.future.done()


# ---- refusals


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


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    for host, status in (("evil.example", 421), ("localhost:80", 200), ("[::1]:80", 200), ("127.0.0.1", 200)):
        assert client.get("/health", headers={"Host": host}).status_code == status


def test_what_a_run_cannot_do(run: Run) -> None:
    lm = replace(run, config=replace(run.config, task=replace(run.config.task, scoring="lm")))
    with pytest.raises(UserError, match="language modelling, which has no classes to predict; use /generate"):
        Engine(lm, LIMITS).rows(ROWS)


def test_a_token_guards_all_that_speaks_of_the_run(run: Run) -> None:
    with testclient.TestClient(make_app(run, LIMITS, token="a-secret-word"), base_url="http://some.host") as client:
        for path in ("/", "/docs", "/openapi.json", "/health"):
            assert client.get(path).status_code == 200
        for path in ("/run", "/metrics", "/nowhere"):
            assert client.get(path).status_code == 401
        for sent in ("", "Bearer other", "a-secret-word", "Basic a-secret-word"):
            answer = client.post("/predict", json={"rows": ROWS[:1]}, headers={"Authorization": sent})
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        good = {"Authorization": "Bearer a-secret-word"}
        assert client.post("/predict", json={"rows": ROWS[:1]}, headers=good).status_code == 200
        assert client.get("/run", headers=good).json()["classes"] == ["negative", "positive"]


def test_full_queues_and_late_answers(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request runs and ends too late, one waits, a third is refused; the thread goes on behind them."""
    running, release = threading.Event(), threading.Event()
    work = Engine.work

    def slow(self: Engine, key: Any, jobs: Any) -> None:
        running.set()
        release.wait(10)
        work(self, key, jobs)

    monkeypatch.setattr(Engine, "work", slow)
    options = ServeConfig(max_queue=1, timeout_s=0.6, batch_wait_ms=0)
    with testclient.TestClient(make_app(run, options), base_url="http://127.0.0.1") as client:
        with ThreadPoolExecutor() as pool:
            first = pool.submit(client.post, "/predict", json={"rows": ROWS[:1]})
            assert running.wait(10)
            second = pool.submit(client.post, "/predict", json={"rows": ROWS[:1]})
            while "loracurve_queue_length 1.0" not in client.get("/metrics").text:
                time.sleep(0.01)
            third = client.post("/predict", json={"rows": ROWS[:1]})
            assert third.status_code == 429 and third.headers["retry-after"] == "1"
            assert "fewer than 1 waiting requests" in third.json()["error"]
            for late in (first, second):
                assert late.result().status_code == 503
                assert "no answer within 0.6 s" in late.result().json()["error"]
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port=70000"], "port: expected a port from 0 to 65535, found 70000"),
        (["--max_queue=0"], "max_queue: expected at least 1, found 0"),
        (["--timeout_s=0"], "timeout_s: expected seconds above 0, found 0"),
        (["--host=0.0.0.0"], "host: expected this machine's own address, such as 127.0.0.1, found 0.0.0.0"),
        (["--token_file=nowhere"], "token_file: expected a text file with a token, found nowhere"),
        (["--token_file=SHORT"], "token_file: expected 8 or more ASCII characters without blanks"),
        (["--host=no.such.host.invalid", "--token_file=GOOD"], "cannot listen on no.such.host.invalid, port 0"),
        (["--port=TAKEN"], "Address already in use; choose another --port"),
        ([], "expected a run directory with a fitted curve"),
    ],
)
def test_what_the_command_refuses(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short").write_text("abc\n")
    (tmp_path / "good").write_text("a-secret-word\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        names = {"SHORT": tmp_path / "short", "GOOD": tmp_path / "good", "TAKEN": taken.getsockname()[1]}
        words = [re.sub("SHORT|GOOD|TAKEN", lambda m: str(names[m[0]]), a) for a in ["--port=0", *arguments]]
        assert main(["serve", str(tmp_path / "nothing"), *words]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1, said


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "RUN"]) == 2
    assert "expected the package uvicorn, found none; pip install 'loracurve[serve]'" in capsys.readouterr().err


# ---- pages and figures


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
    assert set(api["paths"]) == {"/predict", "/generate", "/health", "/run", "/metrics"}
    page = client.get("/docs").text
    for name in (*api["paths"], "max_new_tokens", "mutual_information", "Most tokens to generate for each prompt."):
        assert name in page
    decoding = api["components"]["schemas"]["GenerateRequest"]["properties"]
    assert decoding["max_new_tokens"]["default"] == GenerateConfig().max_new_tokens and "batch_size" not in decoding


# ---- the queue


def _job(key: str, work: Any, share: float = 0.3, seconds: float = 60) -> Job:
    return Job(key, work, share, time.monotonic() + seconds)


def test_jobs_are_grouped_in_their_order() -> None:
    ran: list[list[Any]] = []

    def work(key: Any, jobs: Any) -> None:
        ran.append([job.work for job in jobs])
        for job in jobs:
            job.succeed(job.work * 2)

    batcher = Batcher(work, 0, 10)
    jobs = [_job(key, i) for i, key in enumerate("aabaaa")]
    gone, late = _job("a", 6), _job("a", 7, seconds=-1)
    gone.future.cancel()
    jobs += [_job("b", 8, share=5)]
    for job in (*jobs[:-1], gone, late, jobs[-1]):
        batcher.submit(job)
    with pytest.raises(QueueFull):
        for i in range(4):
            batcher.submit(_job("a", 9 + i, share=1))
    batcher.start()
    assert [job.future.result(10) for job in jobs] == [2 * job.work for job in jobs]
    batcher.close(10)
    assert ran[:4] == [[0, 1, 3], [2], [4, 5], [8]]
    assert not late.future.done() and gone.future.cancelled()
    with pytest.raises(Closed):
        batcher.submit(_job("a", 0))


def test_one_jobs_fault_is_not_anothers() -> None:
    def work(key: Any, jobs: Any) -> None:
        if any(job.work == 1 for job in jobs):
            raise ValueError("one")
        for job in jobs:
            if job.work != 2:
                job.succeed(job.work)

    batcher = Batcher(work, 0, 10)
    jobs = [_job("a", i) for i in range(3)]
    for job in jobs:
        batcher.submit(job)
    batcher.start()
    assert jobs[0].future.result(10) == 0
    for job, message in zip(jobs[1:], ("one", "no answer was made"), strict=True):
        assert message in str(job.future.exception(10))
    batcher.close(10)


def test_closing_fails_what_waits() -> None:
    batcher = Batcher(lambda key, jobs: None, 60, 10)
    job = _job("a", 0)
    batcher.submit(job)
    batcher.start()
    batcher.close(10)
    assert isinstance(job.future.exception(10), Closed)


# ---- a real server


class Served:
    """The command in a process of its own."""

    def __init__(self, folder: Path) -> None:
        limits = ["--max_body_bytes=20000", "--read_timeout_s=1", "--batch_wait_ms=200", "--timeout_s=20"]
        arguments = [sys.executable, "-m", "loracurve.cli", "serve", str(folder), "--port=0", *limits]
        self.process = subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}
        )
        assert self.process.stdout is not None and self.process.stderr is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        assert found, line + self.process.stderr.read()
        self.port = int(found[1])

    def ask(self, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        if body is None:
            connection.request("GET", path)
        else:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, text if path == "/metrics" else json.loads(text)

    def raw(self, *parts: bytes) -> tuple[bytes, float]:
        """What comes back for bytes as they stand, up to the server's closing, and after how many seconds."""
        started = time.monotonic()
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as connection:
            for part in parts:
                connection.sendall(part)
            answer = b""
            while part := _received(connection):
                answer += part
        return answer, time.monotonic() - started


def _received(connection: socket.socket) -> bytes:
    try:
        return connection.recv(65536)
    except ConnectionResetError:
        return b""


HEAD = b"POST /%s HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


def test_a_real_server(folder: Path, predicted: list[dict[str, Any]]) -> None:
    before = tree_hash(folder)
    served = Served(folder)
    try:
        _clients_share_batches(served, predicted)
        _bad_clients_are_survived(served)
        status, answer = served.ask("/predict", {"rows": ROWS})
        assert status == 200
        same(answer["predictions"], predicted)
        _it_ends_well(served)
    finally:
        served.process.kill()
        served.process.communicate()
    assert tree_hash(folder) == before


def _clients_share_batches(served: Served, predicted: list[dict[str, Any]]) -> None:
    with ThreadPoolExecutor(len(ROWS)) as pool:
        answers = list(pool.map(lambda row: served.ask("/predict", {"rows": [row]}), ROWS))
    assert [status for status, _ in answers] == [200] * len(ROWS)
    same([answer["predictions"][0] for _, answer in answers], predicted)
    figures = served.ask("/metrics")[1]
    batches = re.search(r"^loracurve_batch_requests_count (\d+)", figures, re.MULTILINE)
    assert batches and 1 <= int(batches[1]) < len(ROWS), "several clients ran together"
    assert f"loracurve_batch_requests_sum {len(ROWS)}.0" in figures


def _bad_clients_are_survived(served: Served) -> None:
    answer, _ = served.raw(b"\x16\x03\x01 what is this\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400")
    for head in (
        HEAD % b"predict" + b"Content-Length: 30000\r\n\r\n",
        HEAD % b"predict" + b"Content-Length: -1\r\n\r\n",
    ):
        answer, _ = served.raw(head, b"x" * 30000)
        assert answer.startswith((b"HTTP/1.1 413", b"HTTP/1.1 400")), answer
    answer, _ = served.raw(HEAD % b"predict" + b"Content-Length: 99999999999\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413") and b'{"error":' in answer
    chunk = b"2000\r\n" + b"x" * 0x2000 + b"\r\n"
    answer, _ = served.raw(HEAD % b"predict" + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 3, b"0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413")
    # Slow ones: a head that never ends, no head at all, a body that stops.
    for parts, begin in (
        (b"POST /pre", b""),
        (b"", b""),
        (HEAD % b"predict" + b"Content-Length: 9\r\n\r\n{", b"HTTP/1.1 408"),
    ):
        answer, seconds = served.raw(parts)
        assert answer.startswith(begin) and 0.9 < seconds < 8
        assert begin or not answer
    # One that asks a lot and reads nothing is dropped, once the buffers between are full.
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", served.port))
        connection.sendall(b"GET /docs HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 700)
        time.sleep(2)
        got = 0
        while part := _received(connection):
            got += len(part)
    assert 0 < got < 700 * 10_000
    # One that goes away while its text is being made: the next answer need not wait for all of it.
    body = json.dumps({"prompts": [TEXTS[0]] * 200, "max_new_tokens": 250}).encode()
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(HEAD % b"generate" + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        time.sleep(0.5)
    started = time.monotonic()
    assert served.ask("/predict", {"rows": ROWS[:1]})[0] == 200 and time.monotonic() - started < 5
    figures = served.ask("/metrics")[1]
    assert 'loracurve_requests_total{path="/generate",status="499"} 1.0' in figures
    assert 'kind="generated"' not in figures


def _it_ends_well(served: Served) -> None:
    """SIGTERM: the request that runs gets its answer, then the process ends with code 0 and says nothing."""
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(served.ask, "/generate", {"prompts": TEXTS[:1], "max_new_tokens": 50})
        time.sleep(0.1)
        served.process.send_signal(signal.SIGTERM)
        status, answer = asked.result(20)
    assert status == 200 and len(answer["generations"][0]["token_ids"]) >= 1
    assert served.process.wait(20) == 0
    assert served.process.stderr is not None
    said = served.process.stderr.read()
    assert "Traceback" not in said, said
