"""lm-polygraph's estimators on a run: by hand, against the library's own decoding, and through the real package."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.documents import fenced
from helpers.made_runs import QUICK, base_folder, command, config_file, data_folder
from helpers.places import ROOT
from torch import Tensor

from loracurve.inference.config import GenerateConfig
from loracurve.inference.generation import generate
from loracurve.model.curve_model import CurveModel
from loracurve.runs.polygraph import manager, measures, member_weights
from loracurve.runs.run import Run, open_run
from loracurve.system.errors import UserError
from loracurve.tasks.tokens import leading_tokens, tokenise, with_lead

TEXTS = ["the film is good", "a truly awful", "it was"]
TRAINING = ["quite dull", "i found the music lovely", "the story was fine", "a poor film"]
TOKENS = 5


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("polygraph")
    data = data_folder(root / "data", "label")
    command("fit", config_file(root / "c.yaml", base_folder(root / "base", "qwen2"), data, "label"), "--out",
            root / "run", *QUICK)  # fmt: skip
    return open_run(root / "run")


@pytest.fixture
def polygraph() -> Any:
    pytest.importorskip("lm_polygraph", reason="the package lm-polygraph is not installed")
    import lm_polygraph.estimators

    return lm_polygraph


def plain(run: Run, prompt: str, written: list[int]) -> Tensor:
    """Log-probabilities [n, T, V] at the written tokens by a forward pass at each point."""
    tokenizer = run.task.tokenizer
    ids = [*with_lead(leading_tokens(tokenizer), tokenise(tokenizer, [prompt])[0]), *written]
    with torch.inference_mode():
        logits = [run.model(t, input_ids=torch.tensor([ids])).logits[0] for t in run.average().t.tolist()]
    return torch.stack(logits)[:, -len(written) - 1 : -1].double().log_softmax(-1)


def estimated(run: Run, polygraph: Any, *names: str, **options: Any) -> dict[str, np.ndarray]:
    """What estimators say of TEXTS, in batches of two."""
    estimators = [getattr(polygraph.estimators, name)() for name in names]
    data = polygraph.Dataset(TEXTS, [""] * len(TEXTS), 2)
    made = manager(run, data, estimators, max_new_tokens=TOKENS, verbose=False, **options)
    made()
    return {name: np.array(made.estimations[e.level, str(e)]) for name, e in zip(names, estimators, strict=True)}


def test_measures_of_two_opposite_points() -> None:
    log_probs = torch.tensor([[[0.9, 0.1]], [[0.1, 0.9]]], dtype=torch.float64).log()
    data = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    cross = -(math.log(0.9) + math.log(0.1)) / 2
    found = measures(log_probs)
    assert found["total_uncertainty"] == pytest.approx(math.log(2))
    assert found["data_uncertainty"] == pytest.approx(data)
    assert found["mutual_information"] == pytest.approx(math.log(2) - data)
    assert found["epkl"] == pytest.approx(cross - data) and found["rmi"] == pytest.approx(cross - math.log(2))
    alone = measures(log_probs, torch.tensor([[1.0], [0.0]], dtype=torch.float64))
    assert alone["total_uncertainty"] == pytest.approx(data)


def test_points_weigh_by_the_text_so_far() -> None:
    likelihoods = torch.tensor([[0.5, 0.9, 0.1], [0.25, 0.1, 0.1]]).log()
    expected = torch.tensor([[1 / 2, 2 / 3, 18 / 19], [1 / 2, 1 / 3, 1 / 19]])
    torch.testing.assert_close(member_weights(likelihoods), expected)


def test_a_missing_package_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*(n for n in sys.modules if n.partition(".")[0] == "lm_polygraph"), "lm_polygraph"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="expected the package lm-polygraph, found none .*; pip install lm-polygraph"):
        manager(run, None, [])


def test_ensemble_measures_are_the_librarys_own_of_the_same_tokens(run: Run, polygraph: Any) -> None:
    found = estimated(
        run, polygraph, "PETtu", "PETdu", "PETmi", "PETrmi", "EPTtu", "PEStu", "PESrmi", "MeanTokenEntropy"
    )
    made = generate(run.model, run.task.tokenizer, TEXTS, GenerateConfig(max_new_tokens=TOKENS), run.average().t)
    for name, own in (("PETtu", "entropy"), ("PETdu", "expected_entropy"), ("PETmi", "mutual_information")):
        assert found[name] == pytest.approx([np.mean(getattr(m, own)) for m in made], abs=1e-5), name
    assert found["MeanTokenEntropy"] == pytest.approx(found["PETtu"], abs=1e-6)
    for i, (text, one) in enumerate(zip(TEXTS, made, strict=True)):
        at_points = plain(run, text, one.token_ids)
        probs, mean = at_points.exp(), at_points.exp().mean(0)
        assert found["PETrmi"][i] == pytest.approx(
            float((mean * (mean.log() - at_points.mean(0))).sum(-1).mean()), abs=1e-5
        )
        own = at_points[:, range(len(one.token_ids)), one.token_ids]
        so_far = torch.cat([torch.zeros(len(own), 1), own.cumsum(1)[:, :-1]], 1).exp()
        posterior = (probs * (so_far / so_far.sum(0))[..., None]).sum(0)
        assert found["EPTtu"][i] == pytest.approx(float(-(posterior * posterior.log()).sum(-1).mean()), abs=1e-5)
        whole = own.mean(1).exp()
        assert found["PEStu"][i] == pytest.approx(-float(whole.mean()), abs=1e-6)
        assert found["PESrmi"][i] == pytest.approx(float(whole.mean().log() - own.mean()), abs=1e-5)
    assert (found["PETmi"] > 0).all()


def test_scores_are_those_of_the_packages_own_collector(polygraph: Any) -> None:
    """It still has the function that turned an ensemble's scores into them; a text begins with a start token there."""
    from lm_polygraph.utils.token_restoration import collect_token_level_uncertainties
    from transformers.utils import ModelOutput

    log_probs = torch.randn(3, 4, 20, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    average = log_probs.exp().mean(0).log()
    chosen = average.argmax(-1)
    data = -(log_probs.exp() * log_probs).sum(-1).mean(0)
    output = ModelOutput(
        sequences=torch.cat([torch.tensor([99]), chosen])[None],
        beam_indices=torch.tensor([[0, 0, 0, 0, -1]]),
        generation_scores=tuple(row[None] for row in average),
        models_scores=[[point[None] for point in step] for step in log_probs.unbind(1)],
        sequences_scores=average.gather(-1, chosen[:, None]).mean()[None],
    )
    theirs = collect_token_level_uncertainties(
        output, 1, 1, 20, pad_token_id=-5, ensemble_uncertainties={"data_uncertainty": [row[None] for row in data]}
    )
    ours = measures(log_probs)
    assert theirs["weights"].tolist() == [[1.0]]
    for name in ("entropy", "entropy_top5", "entropy_top10", "entropy_top15", "data_uncertainty"):
        assert ours[name] == pytest.approx(theirs[name].item(), abs=1e-5), name
    sums = log_probs[:, range(4), chosen].sum(1)
    assert theirs["log_probas"][0, :, 0] == pytest.approx((sums / 5).numpy(), abs=1e-5), "the start token counts there"


def test_every_ensemble_measure_has_a_finite_value(run: Run, polygraph: Any) -> None:
    from lm_polygraph.estimators.ensemble_token_measures import all_token_estimators

    names = [type(e).__name__ for e in all_token_estimators()] + ["EPStu", "EPSrmi", "PEStu", "PESrmi"]
    for name, values in estimated(run, polygraph, *names).items():
        assert values.shape == (len(TEXTS),) and np.isfinite(values).all(), name


def test_density_information_and_sampling_stand_beside_them(run: Run, polygraph: Any) -> None:
    train = polygraph.Dataset(TRAINING, [""] * len(TRAINING), 3)
    names = ("MaximumSequenceProbability", "Perplexity", "MonteCarloSequenceEntropy", "LexicalSimilarity")
    found = estimated(run, polygraph, "MahalanobisDistanceSeq", "PETmi", *names, train=train, samples=3)
    made = generate(run.model, run.task.tokenizer, TEXTS, GenerateConfig(max_new_tokens=TOKENS), run.average().t)
    assert found["MaximumSequenceProbability"] == pytest.approx([-sum(m.log_probs) for m in made], abs=1e-4)
    assert found["Perplexity"] == pytest.approx([-np.mean(m.log_probs) for m in made], abs=1e-5)
    drawn = generate(
        run.model, run.task.tokenizer, [t for t in TEXTS for _ in range(3)],
        GenerateConfig(max_new_tokens=TOKENS, temperature=1.0), run.average().t,
    )  # fmt: skip
    sums = np.array([sum(m.log_probs) for m in drawn]).reshape(-1, 3)
    assert found["MonteCarloSequenceEntropy"] == pytest.approx(-sums.mean(1), abs=1e-4), "whatever the batches"
    assert np.isfinite(found["MahalanobisDistanceSeq"]).all() and len(set(found["MahalanobisDistanceSeq"])) == 3


def test_states_are_means_over_points_and_tokens_read(run: Run, polygraph: Any) -> None:
    data = polygraph.Dataset(TEXTS, [""] * len(TEXTS), 2)
    made = manager(run, data, [], max_new_tokens=TOKENS, verbose=False, save_stats=["embeddings_decoder"])
    made()
    tokenizer = run.task.tokenizer
    for text, tokens, found in zip(TEXTS, made.stats["greedy_tokens"], made.stats["embeddings_decoder"], strict=True):
        ids = [*with_lead(leading_tokens(tokenizer), tokenise(tokenizer, [text])[0]), *tokens[:-1]]
        with torch.inference_mode():
            states = [
                run.model(t, input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0].mean(0)
                for t in run.average().t.tolist()
            ]
        torch.testing.assert_close(torch.tensor(found), torch.stack(states).mean(0), atol=1e-5, rtol=1e-5)


def test_what_is_refused(run: Run, polygraph: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data, estimators = polygraph.Dataset(TEXTS, [""] * len(TEXTS), 2), polygraph.estimators
    with pytest.raises(UserError, match="MahalanobisDistanceSeq_decoder: .* needs train_embeddings; give train"):
        manager(run, data, [estimators.MahalanobisDistanceSeq()])
    with pytest.raises(UserError, match="needs .*attention.*; leave it out"):
        manager(run, data, [estimators.AttentionScore()])
    uneven = replace(run, config=replace(run.config, evaluation=replace(run.config.evaluation, weights="arc-length")))
    with pytest.raises(UserError, match="expected points of equal weights"):
        manager(uneven, data, [])
    monkeypatch.setattr(CurveModel, "is_classifier", True)
    with pytest.raises(UserError, match="found a sequence classifier"):
        manager(run, data, [])


def test_the_example_of_the_page_runs(run: Run, polygraph: Any, tmp_path: Path) -> None:
    (block,) = fenced("python", (ROOT / "docs" / "how-to" / "polygraph.md").read_text())
    names: dict[str, Any] = {"texts": TEXTS, "answers": ["good", "dull", "fine"], "training_texts": TRAINING}
    exec(block.replace('"runs/mine"', repr(str(run.folder))), names)
    assert len(names["comparison"].estimations["sequence", "PETmi"]) == len(TEXTS)
