"""The page of `loracurve serve` in a real browser."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.browser import CHROMIUM, Browser
from helpers.made_runs import QUICK, base_folder, command, config_file, data_folder
from helpers.waiting import SECONDS

from loracurve.runs.run import open_run
from loracurve.serving.config import ServeConfig

uvicorn = pytest.importorskip("uvicorn", reason="the extra serve is not installed")
pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from loracurve.serving.app import make_app  # noqa: E402


@contextmanager
def served(folder: Path, token: str) -> Iterator[str]:
    """The address of a run served from a thread."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        app = make_app(open_run(folder), ServeConfig(max_new_tokens=8), token=token)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none", lifespan="on"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(SECONDS)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_page_predicts_and_generates(tmp_path: Path) -> None:
    data = data_folder(tmp_path / "data", "label")
    config = config_file(tmp_path / "c.yaml", base_folder(tmp_path / "base", "qwen2"), data, "label")
    command("fit", config, "--out", tmp_path / "run", "--curve.kind=free", *QUICK)
    command("calibrate", tmp_path / "run")  # from too few rows to answer any
    assert CHROMIUM is not None
    browser = Browser(CHROMIUM, tmp_path / "profile")
    try:
        with served(tmp_path / "run", "a-secret-word") as address:
            browser.call("Page.navigate", url=address)
            said = browser.until("document.readyState === 'complete' && document.getElementById('error').textContent")
            assert said.startswith("401: expected the header") and browser.run("at('predicting').hidden")
            browser.complaints.clear()  # the 401
            browser.run("at('token').value = 'a-secret-word'; at('token').dispatchEvent(new Event('change'))")
            browser.until("!at('predicting').hidden && !at('generating').hidden && !at('error').textContent")
            assert "average over 3 points" in browser.run("at('about').textContent")

            row = '{"id": "<b>mine</b>", "text": "the film is good"}'
            browser.run(f"at('rows').value = {row!r} + '\\n' + {row!r}; at('predict').click()")
            browser.until("at('predictions').tBodies[0].rows.length === 2")
            cells = browser.run("[...at('predictions').tBodies[0].rows[0].cells].map((c) => c.textContent)")
            assert cells[0] == "<b>mine</b>" and cells[1].startswith(("negative (abstain", "positive (abstain"))
            assert "(abstain: uncertain, the classes are close to each other" in cells[1]
            probs = [float(figure[-5:]) for figure in cells[2].replace("positive", " ").split()]
            assert sum(probs) == pytest.approx(1, abs=2e-3)
            heads = browser.run("[...at('predictions').tHead.rows[0].cells].map((c) => c.textContent)")
            assert heads[3:] == ["entropy", "expected entropy", "within points", "between points", "familiarity"]
            assert float(cells[3]) == pytest.approx(sum(map(float, cells[4:7])), abs=2e-4) and float(cells[5]) > 0
            assert 0 < float(cells[7]) <= 1
            assert "within points (large far from the training data)" in browser.run("at('parts').textContent")

            browser.run("at('rows').value = '{'; at('predict').click()")
            assert "row 1" in browser.until("at('error').textContent")
            browser.run("at('prompt').value = 'the film'; at('max_new_tokens').value = 9; at('generate').click()")
            assert "max_new_tokens: expected at most 8" in browser.until(
                "at('error').textContent.includes('422') && at('error').textContent"
            )
            browser.complaints.clear()  # the 422
            browser.run("at('max_new_tokens').value = 5; at('generate').click()")
            browser.until("document.querySelectorAll('.token').length")
            shown = "[...document.querySelectorAll('.token')].map((t) => t.style.background)"
            first = browser.run(shown)
            browser.run("at('measure').value = 'entropy'; at('measure').dispatchEvent(new Event('change'))")
            assert browser.run(shown) != first and "rgb(235, 85, 60)" in browser.run(shown)
            assert browser.run("at('error').textContent") == ""

            browser.call("Page.navigate", url=f"{address}/docs")
            browser.until("document.readyState === 'complete' && document.querySelectorAll('h2').length > 5")
            browser.run("new Promise((done) => setTimeout(done))")  # whatever was to be said of it has been
            assert browser.complaints == []
    finally:
        browser.close()
