"""lm-evaluation-harness on a curve: scores against plain forward passes, windows, a local task by the real library."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import matrix
from helpers.made import made_task, vocabulary
from helpers.made_runs import QUICK, base_folder, command, config_file, data_folder
from helpers.tiny import lora_config, random_points, tiny
from helpers.tokenizers_made import llama_style

from loracurve.curve.quadrature import quadrature
from loracurve.curve.spec import CurveSpec
from loracurve.model.curve_model import CurveModel
from loracurve.runs.lm_eval import Scorer, harness_class, main, rolling_windows
from loracurve.system.errors import UserError
from loracurve.tasks.tokens import leading_tokens, tokenise

PAIRS = [
    ("the film is", " good"),
    ("the film is", " awful and dull"),
    ("a truly", " lovely story"),
    ("", "it was great"),
    ("i found the music rather", " poor"),
]


def make(tmp_path: Path, architecture: str, window: int | None = 512) -> Scorer:
    task = made_task(tmp_path, architecture, "label")
    base = tiny(architecture, vocabulary=vocabulary(task))
    model = CurveModel(base, lora_config(architecture), CurveSpec(2, 2))
    model.set_curve(model.spec, random_points(model))
    t, weights = quadrature("gauss-legendre", 4, 2)
    return Scorer(model, task.tokenizer, t, weights, window)


def plain(scorer: Scorer, context: list[int], continuation: list[int]) -> tuple[torch.Tensor, bool]:
    """Log-likelihood at each point by an ordinary forward pass at it, and greediness of the average."""
    ids = torch.tensor([[*context, *continuation]])
    each, mean = [], 0.0
    for t, w in zip(scorer.t.tolist(), scorer.weights.tolist(), strict=True):
        with torch.no_grad():
            logits = scorer.model(t, input_ids=ids).logits[0, len(context) - 1 : -1]
        log_probs = logits.double().log_softmax(-1)
        each.append(log_probs.gather(-1, ids[0, len(context) :, None]).sum())
        mean = mean + w * log_probs.exp()
    return torch.stack(each), bool((mean.argmax(-1) == ids[0, len(context) :]).all())


def mixed(scorer: Scorer, each: torch.Tensor) -> float:
    return float((scorer.weights * each.exp()).sum().log())


@matrix.decoders
def test_scores_are_the_log_of_the_mean_of_sequence_probabilities(architecture: str, tmp_path: Path) -> None:
    scorer = make(tmp_path, architecture)
    lead = list(leading_tokens(scorer.tokenizer))
    tokens = [(tokenise(scorer.tokenizer, [p])[0], tokenise(scorer.tokenizer, [p + c])[0]) for p, c in PAIRS]
    rows = []
    for prompt, whole in tokens:
        context = [*lead, *prompt] or [scorer.tokenizer.eos_token_id]
        assert whole[: len(prompt)] == prompt
        rows.append((context, whole[len(prompt) :]))
    found = scorer.continuations(PAIRS)
    for (context, rest), (value, greedy) in zip(rows, found, strict=True):
        each, expected_greedy = plain(scorer, context, rest)
        assert value == pytest.approx(mixed(scorer, each), abs=1e-4)
        assert greedy == expected_greedy
    logs, greedy = scorer._score([(context, [v]) for context, _ in rows for v in range(vocabulary_of(scorer))])
    assert greedy.view(len(rows), -1).sum(1).tolist() == [1] * len(rows), (
        "one token of the vocabulary is the greedy one"
    )
    one = logs.view(len(scorer.t), len(rows), -1).exp().sum(-1)
    torch.testing.assert_close(one, torch.ones_like(one), rtol=1e-4, atol=1e-4)


def vocabulary_of(scorer: Scorer) -> int:
    return scorer.model.model.config.vocab_size


def test_long_contexts_are_cut_and_long_texts_read_through_windows(tmp_path: Path) -> None:
    scorer = make(tmp_path, "qwen2", window=6)
    text = "the film is good a truly lovely story it was great"
    ids = tokenise(scorer.tokenizer, [text])[0]
    assert len(ids) > 8
    (value, _) = scorer._score([(ids[:-2], ids[-2:])])
    each, _ = plain(scorer, ids[-7:-2], ids[-2:])
    torch.testing.assert_close(value[:, 0], each, rtol=1e-4, atol=1e-4)
    first = scorer._start([])[-1]
    windows = rolling_windows(ids, first, 6)
    total = sum(plain(scorer, context, rest)[0] for context, rest in windows)
    found = scorer.texts([text, "good"])
    assert found[0] == pytest.approx(mixed(scorer, total), abs=1e-4)
    alone = plain(scorer, [first], tokenise(scorer.tokenizer, ["good"])[0])[0]
    assert found[1] == pytest.approx(mixed(scorer, alone), abs=1e-4)
    with pytest.raises(UserError, match="at most 6 tokens, found one of 7"):
        scorer._score([([first], ids[:7])])
    with pytest.raises(UserError, match="at least one token"):
        scorer.continuations([("a truly", "")])


def test_requests_that_begin_with_bos_have_it_once() -> None:
    """A chat template's text: one BOS, as in the tokens that the template gives, wherever the request is split."""
    tokenizer = llama_style()
    model = CurveModel(tiny("llama", vocabulary=len(tokenizer)), lora_config("llama"), CurveSpec(2, 2))
    model.set_curve(model.spec, random_points(model))
    scorer = Scorer(model, tokenizer, *quadrature("gauss-legendre", 4, 2), 512)
    template = "{{ bos_token }}[user] {{ messages[0]['content'] }}"
    turn = [{"role": "user", "content": "good film"}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, chat_template=template)
    ids = tokenizer.apply_chat_template(turn, tokenize=True, chat_template=template, return_dict=False)
    whole = tokenizer(text + " yes", add_special_tokens=False).input_ids
    assert ids.count(tokenizer.bos_token_id) == 1 == whole.count(tokenizer.bos_token_id) and whole[: len(ids)] == ids
    asked = [(text, " yes"), ("", text + " yes"), ("<s>", text.removeprefix("<s>") + " yes")]
    for (value, greedy), start in zip(scorer.continuations(asked), (len(ids), 1, 1), strict=True):
        each, expected_greedy = plain(scorer, whole[:start], whole[start:])
        assert value == pytest.approx(mixed(scorer, each), abs=1e-4) and greedy == expected_greedy
    each, _ = plain(scorer, whole[:1], whole[1:])
    assert scorer.texts([text + " yes"]) == [pytest.approx(mixed(scorer, each), abs=1e-4)]
    for ask in (lambda: scorer.continuations([("a", " b"), ("a", "\ud800")]), lambda: scorer.texts(["a", "\ud800"])):
        with pytest.raises(UserError, match="request 2: expected text, found half of a surrogate pair"):
            ask()


@pytest.mark.parametrize("count", [0, 1, 4, 5, 8, 9, 11])
def test_windows_predict_each_token_once_from_full_context(count: int) -> None:
    tokens = list(range(100, 100 + count))
    windows = rolling_windows(tokens, 7, 4)
    assert [token for _, rest in windows for token in rest] == tokens
    whole = [7, *tokens]
    for i, (context, rest) in enumerate(windows):
        assert len(context) + len(rest) - 1 <= 4
        assert i == 0 or len(context) + len(rest) - 1 == 4
        place = whole.index(rest[0])
        assert whole[place - len(context) : place] == context


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("harness")
    data = data_folder(root / "data", "letter")
    command("fit", config_file(root / "c.yaml", base_folder(root / "base", "qwen2"), data, "letter"), "--out",
            root / "run", *QUICK)  # fmt: skip
    return root / "run"


def test_the_class_answers_as_the_harness_asks(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in of the harness's documented interface: LM, a registry, requests with `.args`."""
    registry: dict[str, Any] = {}

    class LM:
        def __init__(self) -> None:
            self._rank, self._world_size = 0, 1

    def register_model(*names: str) -> Any:
        def keep(cls: type) -> type:
            registry.update(dict.fromkeys(names, cls))
            return cls

        return keep

    for name, content in {
        "lm_eval": {}, "lm_eval.api": {}, "lm_eval.models": {}, "lm_eval.api.model": {"LM": LM},
        "lm_eval.api.registry": {"model_registry": registry, "register_model": register_model},
    }.items():  # fmt: skip
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    cls = harness_class()
    assert registry["loracurve"] is cls is harness_class() and issubclass(cls, LM)
    model = cls(run=str(run), points=3, batch_size=1, max_batch_size=None, device=None)
    assert len(model.scorer.t) == 3
    asked = [SimpleNamespace(args=pair) for pair in PAIRS]
    assert model.loglikelihood(asked) == model.scorer.continuations(PAIRS)
    assert model.loglikelihood_rolling([SimpleNamespace(args=("it was great",))]) == model.scorer.texts(
        ["it was great"]
    )
    with pytest.raises(UserError, match="one that generates text"):
        model.generate_until([SimpleNamespace(args=("it was", {"until": ["."]}))])


def test_a_missing_harness_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    assert main() == 2
    assert (
        capsys.readouterr().err
        == "loracurve.runs.lm_eval: expected the package lm-eval, found none; pip install lm-eval\n"
    )


def test_a_local_task_by_the_real_harness(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    import lm_eval
    from lm_eval.tasks import TaskManager

    rows = [json.loads(line) for line in (run.parent / "data" / "test.jsonl").read_text().splitlines()]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    task = {
        "task": "made_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }
    model = harness_class()(run=str(run), points=3)
    manager = TaskManager(include_defaults=False)
    out = lm_eval.simple_evaluate(model=model, tasks=[task], task_manager=manager, bootstrap_iters=0)
    right = 0
    for row in rows:
        scores = [
            value for value, _ in model.scorer.continuations([(row["question"], " " + c) for c in row["choices"]])
        ]
        right += scores.index(max(scores)) == row["label"]
    assert out["results"]["made_choice"]["acc,none"] == pytest.approx(right / len(rows))
