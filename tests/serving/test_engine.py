"""Clients run together as they would alone."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any

import pytest
from helpers.served import LIMITS, ROWS, TEXTS, same

from loracurve.inference.config import GenerateConfig
from loracurve.runs.run import Run
from loracurve.serving.batcher import Job
from loracurve.system.errors import UserError

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from loracurve.serving.engine import Engine  # noqa: E402


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


def test_a_calibration_of_other_points_is_warned_about(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "loracurve"):
        Engine(run, LIMITS)
        assert not caplog.records
        Engine(run, LIMITS, replace(run.config.evaluation, points=run.config.evaluation.points + 1))
    (line,) = [record.getMessage() for record in caplog.records]
    assert "the guarantees of abstain and set do not hold" in line and "loracurve calibrate again" in line


def _answers(engine: Engine, key: Any, work: list[Any]) -> list[Any]:
    jobs = [Job(key, w, 0.1, math.inf) for w in work]
    engine.work(key, jobs)
    return [job.future.exception() or job.future.result() for job in jobs]


def test_decoding_ends_when_nobody_waits(run: Run) -> None:
    engine = Engine(run, LIMITS)
    config = GenerateConfig(max_new_tokens=400)
    looks = []

    class Leaving(Job):
        @property
        def live(self) -> bool:  # the client goes away at the third token
            looks.append(1)
            return len(looks) < 3

    late = Leaving(config, TEXTS[:1], 0.1, math.inf)
    with pytest.raises(Exception, match="nobody waits"):
        engine.work(config, [late])
    assert len(looks) == 3 and not late.future.done()


def test_what_a_run_cannot_do(run: Run) -> None:
    lm = replace(run, config=replace(run.config, task=replace(run.config.task, scoring="lm")))
    with pytest.raises(UserError, match="language modelling, which has no classes to predict; use /generate"):
        Engine(lm, LIMITS).rows(ROWS)
