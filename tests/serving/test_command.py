"""`loracurve serve`: what it refuses, and a real server."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.made_runs import tree_hash
from helpers.processes import started
from helpers.served import ROWS, TEXTS, same
from helpers.waiting import SECONDS, until

from loracurve.cli import main

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port=70000"], "port: expected a whole number in [0, 65535], found 70000"),
        (["--max_queue=0"], "max_queue: expected a whole number >= 1, found 0"),
        (["--timeout_s=0"], "timeout_s: expected a number > 0, found 0"),
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


class Served:
    """The command in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        assert found, line + process.stderr.read()
        self.port = int(found[1])

    def ask(self, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and answer."""
        sent = b"" if body is None else json.dumps(body).encode()
        head = (
            HEAD % path[1:].encode() if body is not None else b"GET %s HTTP/1.1\r\nHost: 127.0.0.1\r\n" % path.encode()
        )
        with socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS) as connection:
            # At once: this client is not slow, however busy the machine is.
            connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(sent) + sent)
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            text = answer.read().decode()
        return answer.status, text if path == "/metrics" else json.loads(text)

    def figure(self, name: str) -> float:
        """The value of one of its metrics."""
        found = re.search(rf"^{name} ([\d.]+)", self.ask("/metrics")[1], re.MULTILINE)
        assert found
        return float(found[1])

    def batches(self) -> float:
        """How many batches it has begun."""
        return self.figure("loracurve_batch_requests_count")

    @contextmanager
    def busy(self) -> Iterator[None]:
        """A client that asks for a long text is served inside the block, and goes away then."""
        before = self.batches()
        body = json.dumps({"prompts": [TEXTS[0]] * 200, "max_new_tokens": 250}).encode()
        with socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS) as connection:
            connection.sendall(HEAD % b"generate" + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            until(lambda: self.batches() > before, "it is being made")
            yield

    def clients(self) -> set[int]:
        """Ports of those that are connected to it."""
        return {c.raddr.port for c in psutil.Process(self.process.pid).net_connections() if c.raddr}

    def raw(self, *parts: bytes) -> tuple[bytes, float]:
        """What comes back for bytes as they stand, up to the server's closing, and after how many seconds."""
        started = time.monotonic()
        with socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS) as connection:
            connection.sendall(b"".join(parts))
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
    limits = ["--max_body_bytes=20000", "--read_timeout_s=1", "--timeout_s=600"]
    limits += ["--max_wait_s=600", "--batch_tokens=4096"]
    words = [sys.executable, "-m", "loracurve.cli", "serve", folder, "--port=0", *limits]
    with started(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        served = Served(process)
        _clients_share_batches(served, predicted)
        _bad_clients_are_survived(served)
        status, answer = served.ask("/predict", {"rows": ROWS})
        assert status == 200
        same(answer["predictions"], predicted)
        _it_ends_well(served)
    assert tree_hash(folder) == before


def _clients_share_batches(served: Served, predicted: list[dict[str, Any]]) -> None:
    with ThreadPoolExecutor(len(ROWS)) as pool:
        with served.busy():
            asked = [pool.submit(served.ask, "/predict", {"rows": [row]}) for row in ROWS]
            until(lambda: served.figure("loracurve_queue_length") == len(ROWS), "all wait")
        answers = [one.result(SECONDS) for one in asked]
    assert [status for status, _ in answers] == [200] * len(ROWS)
    same([answer["predictions"][0] for _, answer in answers], predicted)
    assert served.batches() == 2, "they ran together, after the long one"
    assert served.figure("loracurve_batch_requests_sum") == 1 + len(ROWS)


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
    # A client that waits to be told to go on is told so, unless its head is refused already.
    for kind, begin in ((b"json", b"HTTP/1.1 100 "), (b"xml", b"HTTP/1.1 415 ")):
        head = (HEAD % b"predict").replace(b"json", kind) + b"Content-Length: 2\r\nExpect: 100-continue\r\n\r\n"
        assert served.raw(head, b"{")[0].startswith(begin)
    for twice in (b"Content-Type: text/plain\r\n", b"Authorization: Bearer a\r\nAuthorization: Bearer b\r\n"):
        answer, _ = served.raw(HEAD % b"predict" + twice + b"Content-Length: 2\r\n\r\n{}")
        assert answer.startswith(b"HTTP/1.1 400") and b"expected one header" in answer
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
        assert answer.startswith(begin) and seconds > 0.9, "it has patience, and an end to it"
        assert begin or not answer
    # One that asks a lot and reads nothing is dropped, once the buffers between are full.
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", served.port))
        connection.sendall(b"GET /docs HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 700)
        mine = connection.getsockname()[1]
        until(lambda: mine in served.clients(), "it is taken")
        until(lambda: mine not in served.clients(), "it is dropped")
        got = 0
        while part := _received(connection):
            got += len(part)
    assert 0 < got < 700 * 10_000
    # One that goes away while it waits leaves the queue. One that goes away while its text is being made: the next
    # answer need not wait for all of it.
    with served.busy():
        with socket.create_connection(("127.0.0.1", served.port), timeout=SECONDS) as waiting:
            body = json.dumps({"rows": ROWS}).encode()
            waiting.sendall(HEAD % b"predict" + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            until(lambda: served.figure("loracurve_queue_rows") == len(ROWS), "it waits")
        until(lambda: served.figure("loracurve_queue_rows") == 0, "it has left")
    assert served.ask("/predict", {"rows": ROWS[:1]})[0] == 200
    figures = served.ask("/metrics")[1]
    assert 'loracurve_requests_total{path="/generate",status="499"} 2.0' in figures
    assert 'kind="generated"' not in figures, "its text was not made to the end"


def _it_ends_well(served: Served) -> None:
    """SIGTERM: the request that runs gets its answer, then the process ends with code 0 and says nothing."""
    before = served.batches()
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(served.ask, "/generate", {"prompts": TEXTS[:1], "max_new_tokens": 50})
        until(lambda: served.batches() > before, "it is at work")
        served.process.send_signal(signal.SIGTERM)
        status, answer = asked.result(SECONDS)
    assert status == 200 and len(answer["generations"][0]["token_ids"]) >= 1
    assert served.process.wait(SECONDS) == 0
    assert served.process.stderr is not None
    said = served.process.stderr.read()
    assert "Traceback" not in said, said
