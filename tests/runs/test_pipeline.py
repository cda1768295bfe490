"""A run as a pipeline of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers
from helpers.made_runs import QUICK, Maker, base_folder, command, config_file, data_folder, predictions

import loracurve as lc


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated run of classification by words of a causal model."""
    root = tmp_path_factory.mktemp("pipeline")
    base, data = base_folder(root / "base", "qwen2"), data_folder(root / "data", "label")
    config = config_file(root / "c.yaml", base, data, "label")
    command("fit", config, "--out", root / "run", "--curve.kind=free", *QUICK)
    command("calibrate", root / "run", "--risk=.9")
    return root / "run"


def pipeline(run: Path | lc.runs.run.Run, **options: Any) -> Any:
    opened = lc.open_run(run) if isinstance(run, Path) else run
    return transformers.pipeline(  # type: ignore[call-overload]
        "text-classification", model=opened, pipeline_class=lc.CurvePipeline, **options
    )


def texts_in(file: Path) -> list[str]:
    return [json.loads(line)["text"] for line in file.read_text().splitlines()]


@pytest.mark.parametrize("scoring", ["label", "head"])
def test_answers_are_those_of_predict(
    scoring: str, labelled: Path, fitted: Maker, capsys: pytest.CaptureFixture[str]
) -> None:
    """All classes, their probabilities and the uncertainty: one by one, in batches of unequal texts, all together."""
    run = labelled if scoring == "label" else fitted("free", "head")
    rows = run.parent / "data" / ("test.jsonl" if scoring == "label" else "head/test.jsonl")
    expected = predictions(capsys, run, rows)
    pipe = pipeline(run)
    assert "points=3" in repr(pipe) and pipe.task == "text-classification"
    texts = texts_in(rows)
    assert len({len(pipe.tokenizer(text).input_ids) for text in texts}) > 1
    parts = {"expected_entropy", "within_points", "between_points", "mutual_information", "entropy", "familiarity"}
    for size in (1, 3, len(texts)):
        found = pipe(texts, top_k=None, uncertainty=True, batch_size=size)
        assert len(found) == len(expected)
        for answers, row in zip(found, expected, strict=True):
            assert answers[0]["label"] == row["prediction"]
            scores = {a["label"]: a["score"] for a in answers}
            # Both are rounded to six decimals, so that a difference in the eighth may be one in the sixth.
            assert [scores[name] for name in ("negative", "positive")] == pytest.approx(row["probs"], abs=1.1e-6)
            for answer in answers:
                beside = {k: v for k, v in answer.items() if k not in ("label", "score")}
                assert beside.keys() == row.keys() - {"id", "label", "prediction", "probs"} >= parts
                assert {k: beside[k] for k in parts - {"familiarity"}} == pytest.approx(
                    {k: row[k] for k in parts - {"familiarity"}}, abs=1.1e-6
                )
                if size == len(texts):
                    assert beside == {k: row[k] for k in beside}, "the same batch: the same to the bit"
    assert ("abstain" in found[0][0]) == (scoring == "label"), "with a calibration"
    assert pipe(texts) == [{"label": best["label"], "score": best["score"]} for best, *_ in pipe(texts, top_k=None)]
    assert [*pipe(text for text in texts[:2])] == pipe(texts[:2])


def test_one_point_is_transformers_own_pipeline_with_peft(fitted: Maker, tmp_path: Path) -> None:
    """The same values in the same form, however it is called."""
    run = lc.open_run(fitted("free", "head"))
    lc.save_run(run.model, run.task, tmp_path / "run", lc.EvaluationConfig(points=1))
    run.model.export(tmp_path / "adapter", 0.5)
    base, tokenizer = lc.load_base(run.config.model.name, True, num_labels=2)
    base.config.id2label = dict(enumerate(run.task.classes))  # type: ignore[union-attr]
    theirs: Any = transformers.pipeline(
        "text-classification",
        model=peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval(),  # type: ignore[arg-type]
        tokenizer=tokenizer,
    )
    ours = pipeline(tmp_path / "run")
    assert lc.open_run(tmp_path / "run").average().t.tolist() == [0.5]
    texts = texts_in(fitted.data("head") / "test.jsonl")

    def flat(found: Any) -> Any:
        """Its form, and its numbers."""
        if isinstance(found, list):
            each = [flat(x) for x in found]
            return [form for form, _ in each], [n for _, numbers in each for n in numbers]
        return (found.keys(), found["label"]), [found["score"]]

    calls: list[tuple[Any, dict[str, Any]]] = [
        (texts[0], {}),
        (texts, {}),
        (texts[0], {"top_k": None}),
        (texts, {"top_k": None, "batch_size": 4}),
        (texts, {"top_k": 1}),
        ({"text": texts[0]}, {}),
        (texts, {"truncation": True}),
    ]
    for inputs, options in calls:
        (form, numbers), (their_form, their_numbers) = flat(ours(inputs, **options)), flat(theirs(inputs, **options))
        assert form == their_form
        assert numbers == pytest.approx(their_numbers, abs=1e-5)


def test_rows_of_multiple_choice_are_mappings(fitted: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    run, rows = fitted("free", "letter"), fitted.data("letter") / "test.jsonl"
    expected = predictions(capsys, run, rows)
    asked = [json.loads(line) for line in rows.read_text().splitlines()]
    pipe = pipeline(run, top_k=None, batch_size=len(asked))
    for row, answers, wanted in zip(asked, pipe(asked), expected, strict=True):
        scores = {a["label"]: a["score"] for a in answers}
        assert [scores[choice] for choice in row["choices"]] == wanted["probs"]
    with pytest.raises(lc.UserError, match="pipeline: expected 'choices'"):
        pipe("a text")


def test_pairs_are_called_as_in_transformers(labelled: Path) -> None:
    row = pipeline(labelled).preprocess({"text": "a film", "text_pair": "is good"})["row"]
    assert (row.text, row.text2) == ("a film", "is good")


def test_what_it_cannot_have_is_refused_in_a_line(fitted: Maker, labelled: Path) -> None:
    run = lc.open_run(labelled)
    with pytest.raises(
        lc.UserError, match=r"model: expected an opened run, found CurveModel; give loracurve\.open_run"
    ):
        pipeline(run.model)
    with pytest.raises(lc.UserError, match="tokenizer: expected none"):
        pipeline(run, tokenizer=run.task.tokenizer)
    with pytest.raises(lc.UserError, match="which has no classes to predict"):
        pipeline(fitted("free", "lm"))
    for options, name in (({"function_to_apply": "none"}, "function_to_apply"), ({"truncation": False}, "truncation")):
        with pytest.raises(lc.UserError, match=f"expected top_k, uncertainty, batch_size or .*, found {name}"):
            pipeline(run, **options)
    with pytest.raises(lc.UserError, match="pipeline: expected"):
        pipeline(run)([["a text", "its pair"]])
