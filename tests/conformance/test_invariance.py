"""Invariance of the public face, by properties: what predictions, folders and averages do not depend on."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from helpers.alone import CASES, LABELS, POINTS, TEXTS, Case, log_probs_of, make_case, parts_of, write_data
from helpers.made_runs import QUICK, base_folder, command, config_file, tree_hash
from helpers.matrix import KINDS, SHAPES, curve_of
from helpers.places import ROOT
from helpers.processes import ran
from helpers.ranks import together
from helpers.read_runs import read
from helpers.tiny import lora_config, random_points, tiny
from helpers.tokenizers_made import bert_style
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import loracurve as lc
from loracurve.inference.calibration import apply_temperature, tempered
from loracurve.inference.metrics import classification_summary
from loracurve.inference.predictive import Predictive
from loracurve.runs.config import load_config, save_config
from loracurve.runs.identity import IDENTITY, read_identity, write_identity
from loracurve.runs.predict import predict_rows
from loracurve.runs.run import Run
from loracurve.tasks.batching import evaluation_batches
from loracurve.tasks.encoding import Encoded

# An example that fails is small already: making it smaller would run models for minutes.
FEW = settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
MEASURES = ("acc", "nll", "brier", "ece", "entropy", "expected_entropy", "mutual_information", "disagreement")

numbers_of_rows = st.lists(st.integers(0, len(TEXTS) - 1), min_size=1, max_size=14)
orders_of_classes = st.permutations(range(len(LABELS)))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Each case, made once."""
    made: dict[str, Case] = {}

    def case(name: str) -> Case:
        if name not in made:
            made[name] = make_case(name, tmp_path_factory.mktemp("data"))
        return made[name]

    return case


every_case = pytest.mark.parametrize("name", list(CASES))


def close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def of_average(p: Predictive) -> dict[str, Tensor]:
    """What an average of points says of each row."""
    names = ("confidence", "entropy", "expected_entropy", "mutual_information", "disagreement")
    found = {name: getattr(p, name) for name in names}
    return found | ({"nll": p.negative_log_likelihood()} if p.point_log_probs is None else {"probs": p.probs})


# What a prediction does not depend on: company, order, batches, rows that are shared, padding, way, processes.


@every_case
@FEW
@given(
    numbers=numbers_of_rows,
    tokens=st.sampled_from([1, 40, 150, 4096]),
    row_tokens=st.sampled_from([1, 24, 70, 256]),
    packing=st.booleans(),
    pad_to=st.sampled_from([1, 8]),
    in_a_pass=st.sampled_from([1, 130, None]),
)
def test_a_row_is_predicted_alike_in_any_company(
    cases: Callable[[str], Case], name: str, numbers: list[int], tokens: int, row_tokens: int, packing: bool,
    pad_to: int, in_a_pass: int | None,
) -> None:  # fmt: skip
    case = cases(name)
    encoded = case.encode(numbers)
    packing &= case.model.runner.takes_trees(encoded, row_tokens)
    batches = [*evaluation_batches(encoded, tokens, row_tokens, packing, pad_to)]
    case.check(parts_of(log_probs_of(case.model, batches, POINTS, in_a_pass), encoded), numbers)
    predictive = lc.predict(case.model, batches, POINTS, summarise=name == "lm")
    case.check(parts_of(predictive, encoded), numbers)


@every_case
@FEW
@given(numbers=numbers_of_rows, way=st.sampled_from(["auto", "points", "merged"]), points=st.permutations(range(3)))
def test_a_split_is_predicted_alike_in_every_way(
    cases: Callable[[str], Case], name: str, numbers: list[int], way: Any, points: list[int]
) -> None:
    case = cases(name)
    encoded = case.encode(numbers)
    found = lc.predict_split(case.model, encoded, POINTS[points], way=way)
    back = torch.tensor(points).argsort()
    case.check([part[back] for part in parts_of(found, encoded)], numbers)
    # Copies of a row differ in nothing that is reported.
    copies = {n: [i for i, other in enumerate(numbers) if other == n] for n in numbers}
    for places in copies.values() if name != "lm" else ():
        for values in of_average(found).values():
            close(values[places], values[places[:1]].expand_as(values[places]), 1e-6)


@pytest.mark.parametrize("name", ["letter", "text", "lm", "head", "decoder head"])
def test_the_padding_of_the_tokenizer_changes_nothing(cases: Callable[[str], Case], name: str) -> None:
    case = cases(name)
    every = [*range(len(case.rows)), 3, 0]
    for side in ("left", "right"):
        for pad in (case.task.tokenizer.eos_token, case.task.tokenizer.convert_ids_to_tokens(40), None):
            tokenizer = copy.deepcopy(case.task.tokenizer)
            tokenizer.padding_side, tokenizer.pad_token = side, pad
            task = case.with_tokenizer(tokenizer)
            encoded = task.encode_rows([case.rows[n] for n in every])
            case.check(parts_of(lc.predict_split(case.model, encoded, POINTS), encoded), every)


def test_padding_that_stands_in_a_text_is_read(cases: Callable[[str], Case]) -> None:
    """A text that ends in the padding token, alone and beside longer ones."""
    case = cases("decoder head")
    pad = case.task.tokenizer.pad_token
    rows = [replace(case.rows[n], text=f"{case.rows[n].text}{end}") for n, end in ((3, pad), (5, ""), (7, pad * 2))]
    whole = case.task.encode_rows(rows)
    found = lc.predict_split(case.model, whole, POINTS)
    for number, row in enumerate(rows):
        alone = lc.predict_split(case.model, case.task.encode_rows([row]), POINTS)
        close(found.index(torch.tensor([number])).probs, alone.probs)


@every_case
def test_two_processes_predict_what_one_does(cases: Callable[[str], Case], name: str, tmp_path: Path) -> None:
    """Of fewer rows than processes too, where one of them has none."""
    case = cases(name)
    asked = [(numbers, way) for numbers in ([6], [5, 0, 9, 1, 1]) for way in ("points", "merged", "auto")]

    def work(rank: int) -> list[list[Tensor]]:
        found = []
        for numbers, way in asked:
            encoded = case.encode(numbers)
            found.append(parts_of(lc.predict_split(case.model, encoded, POINTS, way=way), encoded))  # type: ignore[arg-type]
        return found

    for of_rank in together(work, tmp_path / "ranks"):
        for (numbers, _), found in zip(asked, of_rank, strict=True):
            case.check(found, numbers)


def as_json(case: Case, number: int, name: str) -> dict[str, Any]:
    row = case.rows[number]
    fields = ("text", "text2", "question", "choices")
    return {"id": name, **{f: value for f in fields if (value := getattr(row, f))}}


@pytest.mark.parametrize("name", [name for name in CASES if name != "lm"])
@FEW
@given(numbers=numbers_of_rows, seed=st.integers(0, 99))
def test_records_of_a_file_depend_on_their_row_alone(
    cases: Callable[[str], Case], tmp_path_factory: pytest.TempPathFactory, name: str, numbers: list[int], seed: int
) -> None:
    case, folder = cases(name), tmp_path_factory.mktemp("rows")
    config = lc.RunConfig(lc.ModelConfig("base"), case.options, evaluation=lc.EvaluationConfig(points=3))
    run = Run(folder, config, case.model, case.task)
    draw = random.Random(seed)
    ids = [f"{draw.choice('xyzé')} {draw.random()}" for _ in numbers]

    def records(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        path = folder / "rows.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return [*predict_rows(run, path)]

    found = records([as_json(case, n, i) for n, i in zip(numbers, ids, strict=True)])
    assert [record["id"] for record in found] == ids
    for number in {*numbers}:
        (alone,) = records([as_json(case, number, "alone")])
        for record in (r for r, n in zip(found, numbers, strict=True) if n == number):
            assert record.keys() == alone.keys() and len(record["probs"]) == len(alone["probs"])
            for key in ("label", "prediction"):
                assert record[key] == alone[key]
            for key in ("probs", "entropy", "expected_entropy", "mutual_information"):
                assert record[key] == pytest.approx(alone[key], abs=3e-6)


# Other names and other orders of the same data.


def turned_head(case: Case, order: list[int]) -> lc.CurveModel:
    """The same classifier with its classes in another order."""
    model = copy.deepcopy(case.model)
    points = {
        name: p[:, order] if ".classifier." in name or ".score." in name else p
        for name, p in model.control_points().items()
    }
    model.set_curve(model.spec, points)
    return model


def summary(found: Predictive, encoded: Encoded) -> dict[str, float]:
    values = classification_summary(found, encoded.labels)
    return {name: values[name] for name in MEASURES}


@pytest.mark.parametrize("form", ["label", "answers", "text", "text answers", "head", "decoder head"])
@FEW
@given(order=orders_of_classes, rows=st.permutations(range(len(TEXTS))))
def test_relabelled_data_give_relabelled_predictions_and_equal_metrics(
    cases: Callable[[str], Case], tmp_path_factory: pytest.TempPathFactory, form: str, order: list[int], rows: list[int]
) -> None:
    scoring = form.split()[-1] if "head" in form else form.split()[0].replace("answers", "label")
    case = cases({"label": "label", "text": "text"}.get(scoring, form))
    found = {}
    for name, labels in (("own", LABELS), ("turned", [LABELS[c] for c in order])):
        words = {"red": "yes", "green": "World", "blue": "no"}
        own: dict[str, Any] = {}
        if "answers" in form:
            own = {"prompt": "Text: {text}\nLabel:", "answers": [words[label] for label in labels]}
        # A multiple-choice model may score classes by text too: it is the same language model.
        data = write_classes(tmp_path_factory.mktemp(name), labels, rows if name == "turned" else range(len(TEXTS)))
        options = lc.TaskConfig(data=str(data), scoring=scoring, **own)  # type: ignore[arg-type]
        encoded = lc.load_task(options, case.task.tokenizer, 512).encode("test")
        model = turned_head(case, order) if "head" in form and name == "turned" else case.model
        found[name] = lc.predict_split(model, encoded, POINTS), encoded
    own_rows, turned = found["own"][0], found["turned"][0].index(torch.tensor(rows).argsort())
    close(turned.probs, own_rows.probs[:, order])
    assert turned.point_log_probs is not None and own_rows.point_log_probs is not None
    close(turned.point_log_probs, own_rows.point_log_probs[..., order])
    assert torch.equal(torch.tensor(order)[turned.prediction], own_rows.prediction)
    assert summary(*found["turned"]) == pytest.approx(summary(*found["own"]), abs=1e-5)


def write_classes(folder: Path, labels: Sequence[str], order: Sequence[int]) -> Path:
    """The texts with labels by name, in an order of rows, under other ids."""
    data = write_data(folder / "data", "label", labels)
    lines = (data / "test.jsonl").read_text().splitlines()
    rows = [json.loads(lines[number]) | {"id": f"{folder.name}-{place}"} for place, number in enumerate(order)]
    (data / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data


@pytest.mark.parametrize("normalise", ["sum", "mean"])
@FEW
@given(numbers=numbers_of_rows, seed=st.integers(0, 99))
def test_choices_in_another_order_are_scored_alike(
    cases: Callable[[str], Case], normalise: Any, numbers: list[int], seed: int
) -> None:
    case = cases("text")
    task = lc.load_task(replace(case.options, normalise=normalise), case.task.tokenizer, 512)
    rows = [case.rows[n] for n in numbers]
    orders = [random.Random(seed + i).sample(range(len(row.choices)), len(row.choices)) for i, row in enumerate(rows)]
    turned = [
        replace(row, choices=tuple(row.choices[c] for c in order), label=order.index(row.label or 0))
        for row, order in zip(rows, orders, strict=True)
    ]
    one, other = task.encode_rows(rows), task.encode_rows(turned)
    mine, found = (lc.predict_split(case.model, encoded, POINTS) for encoded in (one, other))
    for i, order in enumerate(orders):
        close(found.probs[i, : len(order)], mine.probs[i, order])
    assert summary(found, other) == pytest.approx(summary(mine, one), abs=1e-5)


# Averages.


@every_case
@FEW
@given(
    times=st.lists(st.floats(0, 1), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    way=st.sampled_from(["points", "merged"]),
)
def test_averages_are_of_points_with_weights_whatever_their_order_and_number(
    cases: Callable[[str], Case], name: str, times: list[float], seed: int, way: Any
) -> None:
    case, draw = cases(name), random.Random(seed)
    encoded = case.encode(range(5))
    t = torch.tensor(times, dtype=torch.float64)
    weights = torch.tensor([draw.random() + 0.01 for _ in times], dtype=torch.float64)
    weights /= weights.sum()

    def average(t: Tensor, weights: Tensor) -> Predictive:
        return lc.predict_split(case.model, encoded, t, weights, way=way)

    whole = average(t, weights)
    expected = of_average(whole)
    order = torch.tensor(draw.sample(range(len(t)), len(t)))
    turned = average(t[order], weights[order])
    close(of_average(turned), expected)
    close(turned.pairwise_jsd, whole.pairwise_jsd)  # of pairs of points: the one measure that a copy of a point changes
    twice = draw.randrange(len(t))
    halves = torch.cat([weights, weights[twice : twice + 1] / 2])
    halves[twice] /= 2
    close(of_average(average(torch.cat([t, t[twice : twice + 1]]), halves)), expected)
    alone = torch.zeros(len(t), dtype=torch.float64)
    alone[twice] = 1
    close(of_average(average(t, alone)), of_average(average(t[twice : twice + 1], torch.ones(1))))
    if name != "lm":  # points are kept in float32
        close(apply_temperature(whole.log_probs, 1.0), whole.log_probs, 1e-6)
        close(tempered(whole, 1.0).probs, whole.probs, 1e-6)


@every_case
@FEW
@given(t=st.floats(0, 1))
def test_places_on_a_curve_and_their_coefficients_are_the_same_points(
    cases: Callable[[str], Case], name: str, t: float
) -> None:
    case = cases(name)
    encoded, where = case.encode(range(5)), torch.tensor([t, 1 - t], dtype=torch.float64)
    on_curve = lc.predict_split(case.model, encoded, where)
    found = lc.predict_split(case.model, encoded, case.model.coefficients(where))
    close(of_average(found), of_average(on_curve))


# What is saved, loaded and saved again.


def saved_again(first: Path, load: Callable[[Path], lc.CurveModel]) -> None:
    """Twice, equal to the byte."""
    for n in (1, 2):
        torch.manual_seed(n)
        load(first.with_name(f"{n - 1}")).save_pretrained(first.with_name(f"{n}"))
        assert tree_hash(first.with_name(f"{n}")) == tree_hash(first)


@pytest.mark.parametrize("architecture", ["qwen2", "encoder"])
@pytest.mark.parametrize("spec", [*(curve_of(kind, 2) for kind in KINDS), *SHAPES, lc.CurveSpec.slots(3)])
def test_curves_that_are_saved_again_are_equal_to_the_byte(
    architecture: str, spec: lc.CurveSpec, tmp_path: Path
) -> None:
    config = lora_config(architecture, rank_pattern={r".*\.0\..*": 2}, use_rslora=True)
    model = lc.CurveModel(tiny(architecture), config, spec)
    model.set_curve(spec, spec.tie(random_points(model)))
    model.save_pretrained(tmp_path / "0")
    assert lc.CurveModel.from_pretrained(tmp_path / "0", tiny(architecture)).spec == spec
    saved_again(tmp_path / "0", lambda folder: lc.CurveModel.from_pretrained(folder, tiny(architecture)))


def test_curves_with_weights_of_their_base_are_saved_again_equal_to_the_byte(tmp_path: Path) -> None:
    """A checkpoint of a masked language model has no pooler, which is drawn anew at each loading."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tf.BertForMaskedLM(tf.BertConfig(vocab_size=len(bert_style()), **sizes)).save_pretrained(tmp_path / "base")
    bert_style().save_pretrained(tmp_path / "base")
    base, _ = lc.load_base(str(tmp_path / "base"), classifier=True, num_labels=3)
    model = lc.CurveModel.from_config(base, peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    model.set_curve(model.spec, random_points(model))
    model.save_pretrained(tmp_path / "0")
    assert (tmp_path / "0" / "base_weights.safetensors").is_file()
    saved_again(tmp_path / "0", lc.CurveModel.from_pretrained)


odd_texts = [
    "yes",
    "null",
    "~",
    "1e3",
    "[a, b]",
    "a: b",
    "{text}",
    "2020-01-01",
    " x ",
    "a\nb",
    "\x85",
    "=",
    "-",
    "# x",
]
texts = st.sampled_from(odd_texts) | st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
plain_texts = texts.filter(lambda text: text[0] not in "[#~" and "null" not in text and text.strip())
rates = st.floats(1e-12, 0.5)
configs = st.builds(
    lc.RunConfig,
    model=st.builds(lc.ModelConfig, name=texts, revision=st.none() | plain_texts),
    task=st.builds(
        lc.TaskConfig, data=texts, scoring=st.just("label"), prompt=plain_texts, seed=st.integers(0, 2**40),
        answers=st.none() | st.lists(texts, min_size=2, max_size=3),
    ),
    lora=st.builds(
        lc.LoraOptions, r=st.integers(1, 9), lora_alpha=rates, use_rslora=st.booleans(),
        target_modules=plain_texts | st.lists(texts, min_size=1, max_size=2),
        rank_pattern=st.dictionaries(texts, st.integers(1, 9), max_size=2),
        alpha_pattern=st.dictionaries(texts, rates, max_size=2),
        layers_to_transform=st.none() | st.lists(st.integers(0, 9), min_size=1, max_size=2),
    ),
    curve=st.builds(lc.CurveConfig, segments=st.integers(2, 5), closed=st.booleans()),
    adapters=st.just([]),
    anchor_training=st.builds(lc.LoopConfig, learning_rate=rates, eps=rates, betas=st.tuples(rates, rates)),
    curve_training=st.builds(lc.FitConfig, learning_rate=rates, steps=st.integers(1, 10**6)),
)  # fmt: skip


def check_config(config: lc.RunConfig, folder: Path) -> None:
    save_config(config, folder / "0.yaml")
    again = load_config(folder / "0.yaml")
    assert again == config
    save_config(again, folder / "1.yaml")
    assert (folder / "1.yaml").read_bytes() == (folder / "0.yaml").read_bytes()


@settings(FEW, max_examples=40)
@given(config=configs)
def test_configs_that_are_saved_again_are_equal_to_the_byte(
    tmp_path_factory: pytest.TempPathFactory, config: lc.RunConfig
) -> None:
    check_config(config, tmp_path_factory.mktemp("config"))


def test_whole_numbers_in_a_config_are_saved_again_equal_to_the_byte(tmp_path: Path) -> None:
    check_config(lc.RunConfig(lc.ModelConfig("base"), lc.TaskConfig("data", "label")), tmp_path)


@pytest.mark.parametrize(
    ("prompt", "targets"),
    [("### Text: {text}\n### Label:", "all-linear"), ("null", "all-linear"), ("~", "all-linear"), ("{text}:", "[qv]")],
)
def test_strings_in_a_config_stay_strings(prompt: str, targets: str, tmp_path: Path) -> None:
    """A prompt of lines that YAML would take for comments, a regular expression that it would take for a list."""
    task = lc.TaskConfig("data", "label", prompt=prompt)
    config = lc.RunConfig(lc.ModelConfig("base"), task, lc.LoraOptions(lora_alpha=8.0, target_modules=targets))
    check_config(config, tmp_path)


# Export, PEFT, and back.

ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("qwen2", {"target_modules": "all-linear"}),
    "patterns": (
        "qwen2",
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {r".*\.0\..*q_proj": 5},
            "alpha_pattern": {"v_proj": 3},
            "use_rslora": True,
        },
    ),
    "saved head": ("qwen2", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tied head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "bert": ("encoder", {"target_modules": ["query", "value"]}),
    "distilbert": ("distilbert", {"target_modules": ["q_lin", "v_lin"], "rank_pattern": {"v_lin": 3}}),
}
IDS = torch.tensor([[3, 9, 4, 11, 7, 2], [5, 5, 8, 40, 1, 0]])
ENDS = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)


def peft_base(architecture: str) -> nn.Module:
    if architecture != "distilbert":
        return tiny(architecture, vocabulary=60)
    torch.manual_seed(0)
    config = tf.DistilBertConfig(vocab_size=60, dim=16, hidden_dim=24, n_layers=2, n_heads=2, num_labels=3)
    return tf.DistilBertForSequenceClassification(config).eval()


def to_export(name: str) -> tuple[str, lc.CurveModel]:
    architecture, options = ADAPTERS[name]
    kind = "SEQ_CLS" if architecture in ("encoder", "distilbert") else "CAUSAL_LM"
    model = lc.CurveModel(peft_base(architecture), peft.LoraConfig(r=2, task_type=kind, **options), lc.CurveSpec(1, 2))
    model.set_curve(model.spec, random_points(model, scale=0.3))
    return architecture, model


@torch.no_grad()
def through_peft(model: lc.CurveModel, architecture: str, folder: Path) -> list[Path]:
    """Three points of a curve, exported, loaded in PEFT, where they predict the same, and saved by it."""
    folders = []
    for t in ENDS.tolist():
        model.export(folder / f"{t}" / "ours", t)
        plain = peft.PeftModel.from_pretrained(peft_base(architecture), folder / f"{t}" / "ours").eval()
        close(plain(input_ids=IDS).logits, model(t, input_ids=IDS).logits, 3e-5)
        plain.save_pretrained(folder / f"{t}" / "peft")
        folders.append(folder / f"{t}" / "peft")
    return folders


@torch.no_grad()
@pytest.mark.parametrize("alignment", ["none", "balanced+procrustes"])
@pytest.mark.parametrize("name", list(ADAPTERS))
def test_rounds_of_export_peft_and_import_change_nothing(name: str, alignment: Any, tmp_path: Path) -> None:
    architecture, model = to_export(name)
    wanted = model(ENDS, input_ids=IDS).logits
    first: list[dict[str, Tensor]] = []
    for n in range(3):
        folders = through_peft(model, architecture, tmp_path / f"{n}")
        stored = [load_file(folder / "adapter_model.safetensors") for folder in folders]
        first = first or stored
        for mine, other in zip(stored, first, strict=True):
            assert mine.keys() == other.keys()
            # Without alignment the same numbers, not only the same products.
            assert alignment != "none" or all(torch.equal(mine[k], other[k]) for k in mine)
        model = lc.CurveModel.from_adapters(peft_base(architecture), folders, alignment=alignment)
        close(model(ENDS, input_ids=IDS).logits, wanted, 5e-5)


@pytest.mark.parametrize("name", ADAPTERS)
def test_rounds_of_export_peft_and_import_leave_the_config(name: str, tmp_path: Path) -> None:
    architecture, model = to_export(name)
    exported = []
    for n in range(3):
        folders = through_peft(model, architecture, tmp_path / f"{n}")
        exported.append(read(tmp_path / f"{n}" / "0.0" / "ours" / "adapter_config.json"))
        model = lc.CurveModel.from_adapters(peft_base(architecture), folders, alignment="none")
    assert exported[2] == exported[1], "PEFT writes all-linear out in the first round"


# Runs that are opened, and moved.


class Runs:
    """Two finished, calibrated runs, and a file of rows."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rows = folder, folder / "rows.jsonl"
        self.rows.write_text("".join(json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(TEXTS)))
        for scoring, architecture in (("label", "qwen2"), ("head", "encoder")):
            place = folder / scoring
            place.mkdir()
            base = base_folder(place / "base", architecture)
            data = write_data(place / "data", scoring)
            for split in ("train", "validation", "test"):  # enough to be calibrated
                lines = (data / f"{split}.jsonl").read_text().splitlines() * 3
                rows = [json.loads(line) | {"id": f"{split}-{n}"} for n, line in enumerate(lines)]
                (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            command("fit", config_file(place / "config.yaml", base, data, scoring), *QUICK, "--out", place / "run")
            command("calibrate", place / "run")

    def run(self, scoring: str) -> Path:
        return self.folder / scoring / "run"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def predicted(capsys: pytest.CaptureFixture[str]) -> Callable[..., list[dict[str, Any]]]:
    def run(*words: object) -> list[dict[str, Any]]:
        capsys.readouterr()
        command("predict", *words)
        return records_of(capsys.readouterr().out)

    return run


def records_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


both = pytest.mark.parametrize("scoring", ["label", "head"])


@both
def test_a_run_that_is_opened_is_not_rewritten(runs: Runs, scoring: str, predicted: Any, tmp_path: Path) -> None:
    run = runs.run(scoring)
    before, found = tree_hash(run), predicted(run, runs.rows)
    command("evaluate", run, "--out", tmp_path / "evaluated")
    command("export", run, "--points=2", "--out", tmp_path / "points")
    assert predicted(run, runs.rows) == found and tree_hash(run) == before
    identity = read_identity(run)
    assert identity is not None
    write_identity(identity, tmp_path)
    save_config(load_config(run / "config.yaml"), tmp_path / "config.yaml")
    for name in (IDENTITY, "config.yaml"):
        assert (tmp_path / name).read_bytes() == (run / name).read_bytes()
    lc.open_run(run).model.save_pretrained(tmp_path / "curve")
    assert tree_hash(tmp_path / "curve") == tree_hash(run / "curve")
    command("calibrate", run)
    assert tree_hash(run) == before, "the same rows give the same calibration.json"


@both
def test_evaluations_of_relabelled_data_are_equal(runs: Runs, scoring: str, tmp_path: Path) -> None:
    figures = []
    for number, labels in enumerate((LABELS, ["blue", "red", "green"], ["green", "blue", "red"])):
        order = random.Random(number).sample(range(len(TEXTS)), len(TEXTS))
        data, out = write_classes(tmp_path / f"{number}", labels, order), tmp_path / f"out {number}"
        command("evaluate", runs.run(scoring), "--task", data, "--out", out)
        found = read(out / "metrics.json")["methods"]["curve"]["sets"]["test"]
        figures.append({name: found[name] for name in MEASURES})
    assert figures[1] == pytest.approx(figures[0], abs=1e-5) and figures[2] == pytest.approx(figures[0], abs=1e-5)


@pytest.mark.parametrize(("scoring", "own_process"), [("label", False), ("head", True)])
def test_a_run_of_another_user_in_another_place_predicts_the_same(
    runs: Runs, scoring: str, own_process: bool, predicted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run and base moved, the data gone, another home and working directory, nothing that may be written."""
    expected = predicted(runs.run(scoring), runs.rows)
    there, home = tmp_path / "ein anderer ort", tmp_path / "home"
    shutil.copytree(runs.run(scoring), there / "the run")
    shutil.copytree(runs.folder / scoring / "base", there / "models" / "b")
    home.mkdir()
    shutil.copy(runs.rows, home / "rows.jsonl")
    config = there / "the run" / "config.yaml"
    config.write_text(config.read_text().replace(str(runs.folder), "/gone"))
    before = tree_hash(there)
    for path in (*there.rglob("*"), there):
        path.chmod(0o555 if path.is_dir() else 0o444)
    words = ["predict", "../ein anderer ort/the run", "rows.jsonl", "--base", "../ein anderer ort/models/b"]
    try:
        if own_process:
            environment = {**os.environ, "HOME": str(home), "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
            program = [sys.executable, "-m", "loracurve", *words]
            done = ran(program, cwd=home, env=environment)
            assert done.returncode == 0, done.stderr
            found = records_of(done.stdout)
        else:
            monkeypatch.chdir(home)
            monkeypatch.setenv("HOME", str(home))
            found = predicted(*words[1:])
    finally:
        for path in (there, *there.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
    assert found == expected and tree_hash(there) == before
