"""`CurvePipeline`: a run as a pipeline of transformers, for programs that have one already."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TextClassificationPipeline

from loracurve.runs.calibration import calibration_for
from loracurve.runs.predict import average_of_classes, prediction_records, say_what_is_missing
from loracurve.runs.run import Run
from loracurve.system.errors import UserError
from loracurve.tasks.classes import TaskIdentity, rows_in_class_order
from loracurve.tasks.dataset import parse_row

__all__ = ["CurvePipeline"]


_OF_THE_ANSWER = ("id", "label", "prediction", "probs", "names")


class CurvePipeline(TextClassificationPipeline):
    """`transformers.pipeline("text-classification", ...)` with the averaged probabilities of a run's curve.

    Args:
        model: the run, opened: `loracurve.open_run(FOLDER)`. Its prompt, tokenizer, window and calibration are used.
        device: where to compute. None: where the run is.
        kwargs: `batch_size`, and `top_k` and `uncertainty` where every call has the same.

    A call takes what transformers' own takes: a text, a list, a generator or a data set of them, pairs as
    ``{"text": ..., "text_pair": ...}``; of a multiple choice run its rows as mappings. It gives the same form back:
    `label` and `score`, the probability that `loracurve predict` writes, of the most probable class, with ``top_k=n``
    of n classes, with ``top_k=None`` of all. ``uncertainty=True`` puts the other columns of `loracurve predict` beside
    them: entropy and its parts in nats, familiarity, and with a calibration `abstain`, `reasons` and `set`.
    ``batch_size=n`` predicts so many rows together.

    Raises:
        UserError: no opened run, one of language modelling, a tokenizer or an option that the run cannot have, what is
            no row of it.
    """

    _load_tokenizer = False

    def __init__(self, model: Run, device: Any = None, **kwargs: Any) -> None:
        if not isinstance(model, Run):
            raise UserError(
                f"model: expected an opened run, found {type(model).__name__}; give loracurve.open_run(FOLDER)"
            )
        if kwargs.pop("tokenizer", None) is not None:
            raise UserError("tokenizer: expected none, as a run has its own, found one; leave it out")
        self.run, self.average = model, average_of_classes(model)
        place = model.model.device if device is None else device
        super().__init__(model=model.model, tokenizer=model.task.tokenizer, device=place, **kwargs)
        self.calibration = calibration_for(model, self.average)  # its guarantees depend on the device
        say_what_is_missing(model)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.run.folder)!r}, points={len(self.average.weights)})"

    def check_model_type(self, supported_models: Any) -> None:
        """A curve is none of transformers' classes, which would be said on every start."""

    def _sanitize_parameters(  # type: ignore[override]
        self, top_k: Any = "", uncertainty: bool | None = None, truncation: bool = True, **others: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if others or truncation is not True:
            raise UserError(
                f"pipeline: expected top_k, uncertainty, batch_size or truncation=True, found "
                f"{next(iter(others), 'truncation')}; texts are put into the run's prompt and cut to its window"
            )
        asked: dict[str, Any] = {} if top_k == "" else {"top_k": top_k, "_legacy": False}
        return {}, {}, asked if uncertainty is None else asked | {"uncertainty": uncertainty}

    def preprocess(self, inputs: Any) -> dict[str, Any]:  # type: ignore[override]
        """One row; it is tokenised with those that it is predicted with."""
        record = inputs if isinstance(inputs, Mapping) else {"text": inputs}
        if "text_pair" in record:
            record = {**record, "text2": record["text_pair"]}
        dataset = self.run.task.dataset
        row = parse_row({"id": "text", **record}, dataset.kind, dataset.labels, "pipeline", require_label=False)
        return {"row": rows_in_class_order([row], dataset.labels, TaskIdentity.of(self.run.task))[0]}

    def _forward(self, model_inputs: Mapping[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        found = model_inputs["row"]  # a list where rows are collated
        rows = found if isinstance(found, list) else [found]
        encoded = self.run.task.encode_rows(rows, "pipeline", labelled=False)
        predictive = self.average.predict(self.run.model, encoded)
        records = [
            record | {"names": row.choices or encoded.classes}
            for row, record in zip(
                rows, prediction_records(rows, encoded, predictive, self.calibration, self.average), strict=True
            )
        ]
        return {"record": records if isinstance(found, list) else records[0]}

    def postprocess(  # type: ignore[override]
        self,
        model_outputs: Mapping[str, Any],
        top_k: int | None = 1,
        uncertainty: bool = False,
        _legacy: bool = True,
    ) -> Any:
        """The answer in the form that transformers' own pipeline has: one, or a list where `top_k` was given."""
        record = model_outputs["record"]
        probs, beside = record["probs"], {k: v for k, v in record.items() if uncertainty and k not in _OF_THE_ANSWER}
        # Of probabilities that are equal as written, the class that was predicted comes first.
        order = sorted(range(len(probs)), key=lambda c: (c != record["label"], -probs[c]))
        answers = [{"label": record["names"][c], "score": probs[c], **beside} for c in order]
        return answers[0] if _legacy else answers[:top_k]
