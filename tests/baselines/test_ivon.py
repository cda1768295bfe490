"""IVON against its library used directly, and a Gaussian toy."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.settings import LOOP, posterior_setting
from torch.nn.functional import cross_entropy

from loracurve.baselines.ivon import IVON
from loracurve.baselines.single_adapter_loop import fresh_adapter
from loracurve.curve.anchored import slot_times
from loracurve.curve.spec import CurveSpec
from loracurve.inference.prediction import predict_split
from loracurve.system.errors import UserError
from loracurve.tasks.batching import collate
from loracurve.training.anchors import slot_seeds
from loracurve.training.loop import batch_numbers


def test_ivon_equals_the_library_used_directly(tmp_path: Path) -> None:
    library = pytest.importorskip("ivon")
    of = posterior_setting(
        tmp_path, "encoder", replace(LOOP, steps=3, keep="last", schedule="constant", warmup=0.0), samples=2
    )
    method = IVON(learning_rate=0.1, effective_samples=500.0, hessian=0.5, weight_decay=1e-3, clip_radius=0.2, passes=2)
    found = method.fit(of).predict(of.task.encode("test"))

    from loracurve.system.randomness import stream_seed

    model, rows = of.model, of.task.encode("train")
    model.set_curve(CurveSpec.slots(1), fresh_adapter(of))
    model.train()
    optimizer = library.IVON(
        model.factors,
        lr=0.1,
        ess=500.0,
        hess_init=0.5,
        beta2=0.99999,
        weight_decay=1e-3,
        mc_samples=2,
        clip_radius=0.2,
        rescale_lr=False,
    )
    seed = slot_seeds(of.training.seed, 1)[0]
    here = model.coefficients(slot_times(1))
    for step in range(3):
        torch.manual_seed(stream_seed(seed, "forward", step))
        batch = collate(rows, batch_numbers(seed, step, len(rows), 4))
        for _ in range(2):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                cross_entropy(model.runner.scores(batch, here)[0], batch.labels).backward()
        optimizer.step()
    for s in range(2):
        torch.manual_seed(stream_seed(of.seed, "ivon test", s))
        with optimizer.sampled_params():
            point = predict_split(model, of.task.encode("test"), slot_times(1)).point_log_probs[0]
        torch.testing.assert_close(found.point_log_probs[s], point, rtol=1e-4, atol=1e-5)


def test_ivons_default_rate_follows_the_fine_tunes(tmp_path: Path) -> None:
    pytest.importorskip("ivon")
    of = posterior_setting(tmp_path, "encoder", replace(LOOP, steps=2, learning_rate=2e-3), samples=2)
    test = of.task.encode("test")
    default = IVON(clip_radius=1e-2).fit(of).predict(test)
    named = IVON(clip_radius=1e-2, learning_rate=0.3 * 2e-3 / 1e-2).fit(of).predict(test)
    torch.testing.assert_close(default.probs, named.probs)


def test_ivon_finds_the_posterior_of_a_gaussian_toy() -> None:
    pytest.importorskip("ivon")
    from loracurve.baselines.ivon import _Variational

    curvature = torch.tensor([[4.0, 1.0, 0.25]])
    method = IVON(
        learning_rate=0.3, effective_samples=100.0, hessian=1.0, betas=(0.9, 0.98), weight_decay=0.1, clip_radius=10.0,
        passes=4,
    )  # fmt: skip
    learner = _Variational([torch.ones(1, 3)], method)
    torch.manual_seed(0)
    for step in range(300):
        learner.step(lambda v: (float((curvature * v[0] ** 2).sum() / 2), [curvature * v[0]]), step, 1 - step / 300)
    samples = torch.cat([learner.sample(s)[0] for s in range(2000)])
    expected = 1 / (100 * (curvature[0] + 0.1))
    torch.testing.assert_close(samples.var(0), expected, rtol=0.15, atol=0)
    assert samples.mean(0).abs().max() < 0.05


def test_ivon_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ivon", None)
    with pytest.raises(UserError, match=r"ivon-opt.*pip install 'loracurve\[ivon\]'"):
        IVON().fit(posterior_setting(tmp_path))
