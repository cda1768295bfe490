"""The page of `loracurve serve` in a real browser."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.browser import CHROMIUM, Browser
from helpers.made_runs import QUICK, base_folder, command, config_file, data_folder
from helpers.served import served

from loracurve.runs.run import open_run
from loracurve.serving.config import ServeConfig

pytest.importorskip("uvicorn", reason="the extra serve is not installed")
pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_page_predicts_and_generates(tmp_path: Path) -> None:
    data = data_folder(tmp_path / "data", "label")
    config = config_file(tmp_path / "c.yaml", base_folder(tmp_path / "base", "qwen2"), data, "label")
    command("fit", config, "--out", tmp_path / "run", "--curve.kind=free", *QUICK)
    command("calibrate", tmp_path / "run")  # from too few rows to answer any
    options = ServeConfig(max_new_tokens=8, nearest_rows=5)
    assert CHROMIUM is not None
    browser = Browser(CHROMIUM, tmp_path / "profile")
    try:
        with served(open_run(tmp_path / "run"), options, token="a-secret-word") as address:
            browser.call("Page.navigate", url=address)
            said = browser.until("document.readyState === 'complete' && document.getElementById('error').textContent")
            assert said.startswith("401: expected the header") and browser.run("at('connection').open")
            browser.complaints.clear()  # the 401
            browser.run("at('token').value = 'a-secret-word'; at('token').dispatchEvent(new Event('change'))")
            browser.until("at('field-text') && !at('tab-generating').hidden && !at('error').textContent")
            assert "average over 3 points" in browser.run("at('about').textContent")

            # One text: the answer in words, a bar for each class, the parts, the nearest training texts.
            browser.run("at('field-text').value = 'the film is good'; at('asking').click()")
            browser.until("!at('answer').hidden")
            assert browser.run("at('said').textContent").startswith("Uncertain")
            assert "calibration lets no text through" in browser.run("at('why').textContent")
            figures = "[...document.querySelectorAll('#%s .figure')].map((f) => parseFloat(f.textContent))"
            assert sum(browser.run(figures % "classes")) == pytest.approx(100, abs=0.2)
            found = json.loads(browser.run("at('json').textContent"))["predictions"][0]
            parts = ("expected_entropy", "within_points", "between_points")
            assert browser.run(figures % "legend") == pytest.approx([found[name] for name in parts], abs=6e-4)
            known = {json.loads(line)["text"] for line in (data / "train.jsonl").read_text().splitlines()}
            assert len(found["nearest"]) == 3 and {near["text"] for near in found["nearest"]} <= known
            named = browser.run("[...at('nearest').children].map((near) => near.firstChild.textContent)")
            assert named == [near["text"] for near in found["nearest"]]
            # Held back for its entropy though a class is likely: by which threshold, and what share that lets through.
            rule = {"temperature": 0.5, "measure": "entropy", "threshold": 0.0123, "coverage": 0.625, "risk": 0.05}
            likely = {**found, "probs": [0.001, 0.999], "entropy": 0.5, "reasons": ["uncertain"]}
            browser.run(f"Object.assign(known.calibration, {json.dumps(rule)})")
            browser.run(f"answer({json.dumps(likely)}, known.classes)")
            why = "Its entropy of 0.5000\u00a0nats is not below 0.0123\u00a0nats, this run's threshold."
            assert browser.run("at('why').textContent").startswith(why)
            said = browser.run("at('rule').textContent")
            assert "62.5\u00a0% of the familiar rows" in said and "at most 5\u00a0% of the answers are wrong" in said
            assert "a temperature of 0.50, which makes them bolder; the uncertainty is measured before it" in said
            sure = likely | {"entropy": 0.01, "abstain": False, "reasons": []}
            browser.run(f"answer({json.dumps(sure)}, known.classes)")
            assert "0.0100\u00a0nats is below 0.0123\u00a0nats" in browser.run("at('why').textContent")
            assert browser.run("at('said').textContent").startswith("Answer")
            browser.run("at('tab-one').focus()")
            arrow = "at('tabs').dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'}))"
            assert browser.run(f"{arrow}; !at('many').hidden && document.activeElement.id") == "tab-many"

            row = '{"id": "<b>mine</b>", "text": "the film is good"}'
            browser.run(f"at('rows').value = {row!r} + '\\n' + {row!r}; at('predict').click()")
            browser.until("at('predictions').tBodies[0].rows.length === 2")
            cells = browser.run("[...at('predictions').tBodies[0].rows[0].cells].map((c) => c.textContent)")
            assert cells[0] == "<b>mine</b>" and cells[1] in ("negative", "positive")
            assert cells[-1].startswith("uncertain") and 0.5 <= float(cells[2]) <= 1
            heads = browser.run("[...at('predictions').tHead.rows[0].cells].map((c) => c.textContent)")
            assert heads[3:-1] == ["entropy", "expected entropy", "within points", "between points", "familiarity"]
            assert float(cells[3]) == pytest.approx(sum(map(float, cells[4:7])), abs=2e-3) and float(cells[5]) > 0
            assert 0 < float(cells[7]) <= 1

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
            assert browser.run(shown) != first and any("0.75" in colour for colour in browser.run(shown))
            assert browser.run("at('error').textContent") == ""

            browser.call("Page.navigate", url=f"{address}/docs")
            browser.until("document.readyState === 'complete' && document.querySelectorAll('h2').length > 5")
            browser.run("new Promise((done) => setTimeout(done))")  # whatever was to be said of it has been
            assert browser.complaints == []
    finally:
        browser.close()
