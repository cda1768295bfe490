"""Clients run together as they would alone."""

from __future__ import annotations

import gc
import logging
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.served import LIMITS, ROWS, TEXTS, same

from loracurve.inference.config import GenerateConfig
from loracurve.inference.hidden_states import states_of
from loracurve.inference.prediction import laid_out_for
from loracurve.runs.run import Run, open_run
from loracurve.serving.batcher import Job
from loracurve.system.errors import UserError
from loracurve.tasks.dataset import subset

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from loracurve.serving.engine import PREDICT, Engine, Nearest  # noqa: E402


def test_clients_that_run_together_get_what_they_get_alone(run: Run) -> None:
    """Of rows, of greedy texts and of drawn ones; a bad row fails its own request only."""
    engine = Engine(run, LIMITS)
    rows = [engine.rows(ROWS[:2]), engine.rows(ROWS[2:5]), engine.rows([{"text": "long " * 101}])]
    together, alone = _answers(engine, "predict", rows), [_answers(engine, "predict", [r])[0] for r in rows]
    for one, other in zip(together[:2], alone[:2], strict=True):
        same(one["predictions"], other["predictions"])  # to 3e-6, abstentions and sets exactly
        assert all({"abstain", "set"} <= p.keys() for p in one["predictions"])
    assert "row 1: expected at most 100 tokens, found" in str(together[2]) and isinstance(together[2], UserError)
    for config in (GenerateConfig(max_new_tokens=4), GenerateConfig(max_new_tokens=4, temperature=1.0, seed=2)):
        prompts = [TEXTS[:2], TEXTS[2:5], [TEXTS[0]], ["long " * 101]]
        together = _answers(engine, config, prompts)
        for one, p in zip(together[:3], prompts, strict=False):
            (other,) = _answers(engine, config, [p])
            assert [g["token_ids"] for g in one["generations"]] == [g["token_ids"] for g in other["generations"]]
        assert "prompt 1: expected at most 100 tokens" in str(together[3])


def test_the_nearest_training_texts_are_those_of_plain_states(run: Run) -> None:
    """By cosines of `hidden_states` at the middle point; a training row itself is its own nearest."""
    engine = Engine(run, replace(LIMITS, nearest_rows=20))
    engine.warm_up()
    train = subset(run.task.dataset.rows("train"), 20)
    rows = [{"id": "own", "text": train[3].text}, *ROWS[:2]]
    key = engine.key(4)
    assert key == Nearest(4)
    found, other = _answers(engine, key, [engine.rows(rows[:1]), engine.rows(rows[1:])])
    records = found["predictions"] + other["predictions"]
    t = engine.average.t[len(engine.average.t) // 2 :][:1]
    known = states_of(run.model, run.task.encode_rows(train), t).states.read[0].float()
    asked = states_of(run.model, run.task.encode_rows(engine.rows(rows)), t).states.read[0].float()
    cosine = torch.nn.functional.cosine_similarity(asked[:, None], known[None], dim=-1)
    for record, own in zip(records, cosine, strict=True):
        best = own.topk(4)
        assert [n["cosine"] for n in record["nearest"]] == pytest.approx(best.values.tolist(), abs=1e-4)
        texts = {row.text: run.task.classes[row.label] for row in train if row.label is not None}
        assert all(texts[n["text"]] == n["label"] for n in record["nearest"])
    assert records[0]["nearest"][0]["text"] == train[3].text and records[0]["nearest"][0]["cosine"] > 0.999
    plain = _answers(engine, PREDICT, [engine.rows(rows)])[0]["predictions"]
    same([{k: v for k, v in r.items() if k != "nearest"} for r in records], plain)


def test_training_texts_are_shown_only_where_the_server_keeps_them(run: Run) -> None:
    engine = Engine(run, LIMITS)
    assert engine.key() == PREDICT and not engine.describe()["nearest"]
    with pytest.raises(UserError, match="nearest: this server keeps no training texts; start it with --nearest_rows"):
        engine.key(1)


def test_a_calibration_of_other_points_is_warned_about(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "loracurve"):
        Engine(run, LIMITS)
        assert not caplog.records
        Engine(run, LIMITS, replace(run.config.evaluation, points=run.config.evaluation.points + 1))
    first, line = [record.getMessage() for record in caplog.records]
    assert "without Gaussians and familiarity, which are of another average" in first
    assert "the guarantees of abstain and set do not hold" in line and "loracurve calibrate again" in line


def _answers(engine: Engine, key: Any, work: list[Any]) -> list[Any]:
    """Of jobs that are weighed one by one, as the batcher does it, and run together."""
    jobs = [Job(key, w, len(w), math.inf) for w in work]
    for job in jobs:
        try:
            job.share = engine.weigh(job)
        except UserError as error:
            job.fail(error)
    engine.work(key, [job for job in jobs if job.live])
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

    late = Leaving(config, TEXTS[:1], 1, math.inf)
    with pytest.raises(Exception, match="nobody waits"):
        engine.work(config, [late])
    assert len(looks) == 3 and not late.future.done()


def test_a_share_counts_what_all_prompts_begin_with_once(run: Run) -> None:
    engine = Engine(run, replace(LIMITS, batch_tokens=50))
    encoded = run.task.encode_rows(engine.rows(ROWS[:3]))
    sizes = [len(example.prompt) for example in encoded.examples]
    job = Job(PREDICT, engine.rows(ROWS[:3]), 3, math.inf)
    assert engine.weigh(job) == pytest.approx(sum(sizes) / 50)
    engine.warm_up()
    assert engine.prefix == encoded.prefix > 0
    assert engine.weigh(job) == pytest.approx((sum(sizes) - 3 * encoded.prefix) / (50 - encoded.prefix))
    assert job.ready.examples == encoded.examples


def test_warmed_up_nothing_is_tried_for_a_request(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials copy the weights in full precision: they are made before the first request, for all lengths at once."""
    engine = Engine(open_run(run.folder), LIMITS)
    engine.warm_up()
    for trial in ("takes_tree_masks", "check_causal", "mixing_layer", "decodes_in_batches"):
        monkeypatch.setattr(f"loracurve.model.runner.{trial}", lambda *_: 1 / 0)
    for rows in (ROWS[:1], ROWS, [{"text": "good " * 20}]):
        assert "predictions" in _answers(engine, PREDICT, [engine.rows(rows)])[0]
    assert "generations" in _answers(engine, GenerateConfig(max_new_tokens=1), [TEXTS[:2]])[0]


def test_requests_leave_nothing_behind(run: Run) -> None:
    """After some requests of all sizes the next ones add no object that lives on."""
    engine = Engine(run, LIMITS)

    def ask(first: int) -> int:
        for i in range(first, first + 30):
            work = [engine.rows([{"text": f"{TEXTS[i % 6]} {i}"}] * (1 + i % 3)), engine.rows(ROWS[: 1 + i % 6])]
            _answers(engine, PREDICT, work)
        gc.collect()
        return len(gc.get_objects())

    ask(0)
    before = ask(1000)
    assert ask(2000) - before < 30, "less than one a request"


def test_requests_of_all_lengths_have_few_shapes_in_half_precision(run: Run) -> None:
    """The CPU's library keeps code for each shape of a product, half a MiB: memory grew with what clients sent."""
    model = open_run(run.folder).model.to(torch.bfloat16)
    encoded = run.task.encode_rows(Engine(run, LIMITS).rows(ROWS[:1]))
    shapes, waste = set(), []
    for tokens in range(1, 201):
        prompt = (encoded.examples[0].prompt * tokens)[:tokens]
        (batch,) = laid_out_for(model, replace(encoded, examples=[replace(encoded.examples[0], prompt=prompt)]))
        shapes.add(batch.input_ids.shape)
        waste.append(batch.tokens / tokens - 1)
    assert len(shapes) <= 24 and sum(waste) / len(waste) < 0.15


def test_what_a_run_cannot_do(run: Run) -> None:
    lm = replace(run, config=replace(run.config, task=replace(run.config.task, scoring="lm")))
    with pytest.raises(UserError, match="language modelling, which has no classes to predict; use /generate"):
        Engine(lm, LIMITS).rows(ROWS)
