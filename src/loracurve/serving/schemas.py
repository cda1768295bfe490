"""Bodies of requests and answers, from which the checks and the OpenAPI page are made."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, get_type_hints

import docstring_parser
from pydantic import BaseModel, ConfigDict, FailFast, Field, create_model

from loracurve.inference.config import GenerateConfig
from loracurve.inference.generation import Generation

__all__ = ["Description", "Failure", "GenerateAnswer", "GenerateRequest", "Health", "PredictAnswer", "PredictRequest"]


_STRICT = ConfigDict(extra="forbid")

MOST_NEAREST = 10


class PredictRequest(BaseModel):
    """Rows to predict."""

    model_config = _STRICT
    rows: Annotated[list[dict[str, Any]], FailFast()] = Field(
        description="Rows as in the training data; labels are not needed. One without an id gets its place as id. "
        "GET /run has an example."
    )
    nearest: int = Field(
        0,
        ge=0,
        le=MOST_NEAREST,
        description="How many of the nearest training texts to name for each row, where the server keeps any.",
    )


class Neighbour(BaseModel):
    """A training row near to one that was asked about."""

    text: str
    label: str | None = Field(description="Its class; null where it has none.")
    cosine: float = Field(description="Of the hidden states of both, at the curve's middle point; 1 is the same.")


class Prediction(BaseModel):
    """One row's prediction. Entropies in nats, before the calibration's temperature: entropy is the sum of
    expected_entropy and mutual_information, and this, where the run has Gaussians, of within_points and
    between_points."""

    id: str
    label: int = Field(description="Place of the most probable class.")
    prediction: str = Field(description="Its name.")
    probs: list[float] = Field(description="Averaged probabilities of the classes, tempered where it is calibrated.")
    entropy: float = Field(description="Total uncertainty.")
    expected_entropy: float = Field(description="Aleatoric: what the data leave open.")
    mutual_information: float = Field(description="Epistemic: what more training data could settle.")
    within_points: float | None = Field(None, description="Part of it: large far from the training data.")
    between_points: float | None = Field(None, description="Part of it: the fine-tunes disagree.")
    familiarity: float | None = Field(
        None, description="Part of known rows that are at least as far from the training data; near 0 for foreign ones."
    )
    abstain: bool | None = Field(None, description="Only with a calibration: don't rely on the answer.")
    reasons: list[str] | None = Field(
        None,
        description="Why to abstain: uncertain (the classes are close), foreign (far from the training data), or both.",
    )
    set: list[str] | None = Field(None, description="Only with a calibration: classes that hold the label.")
    nearest: list[Neighbour] | None = Field(None, description="Only where asked for: training rows, nearest first.")


class PredictAnswer(BaseModel):
    """Predictions in the order of the rows."""

    predictions: list[Prediction]
    truncated: int = Field(description="How many rows were cut on the left to fit the model's window.")


def _decoding() -> dict[str, Any]:
    """The fields of `GenerateConfig` that a client may set, with their defaults and descriptions."""
    said = {p.arg_name: p.description for p in docstring_parser.parse_from_object(GenerateConfig).params}
    types = get_type_hints(GenerateConfig)
    return {
        f.name: (types[f.name], Field(f.default, description=said[f.name], allow_inf_nan=False))
        if types[f.name] is float
        else (types[f.name], Field(f.default, description=said[f.name]))
        for f in fields(GenerateConfig)
        if f.name != "batch_size"
    }


GenerateRequest = create_model(
    "GenerateRequest",
    __config__=_STRICT,
    __doc__="Prompts to continue and how.",
    prompts=(
        Annotated[list[str], FailFast()],
        Field(description="Texts, continued as they stand, without a chat template."),
    ),
    **_decoding(),
)


class GenerateAnswer(BaseModel):
    """Texts in the order of the prompts."""

    generations: list[Generation]


class CalibrationRule(BaseModel):
    """When the run answers: where `measure` is below `threshold`, and familiarity not below `foreign`."""

    temperature: float = Field(description="Of the probabilities; the uncertainties are measured before it.")
    measure: str = Field(description="entropy or mutual_information, in nats.")
    threshold: float | None = Field(description="null: none was certified, and nothing is answered.")
    coverage: float = Field(description="Share of the familiar rows it was calibrated on that are answered.")
    risk: float = Field(description="Share of the answers that may be wrong.")
    delta: float = Field(description="Probability that more are, over draws of the calibration rows.")
    foreign: float | None = Field(description="Familiarity below which a row is foreign; null: none is.")


class Description(BaseModel):
    """What a run can do."""

    run: str
    base: str = Field(description="Name of the base model.")
    task: str = Field(description="Kind of the rows.")
    scoring: str
    classes: list[str]
    predict: bool
    generate: bool
    points: int = Field(description="Points of the curve that are averaged.")
    calibration: CalibrationRule | None = Field(description="null for a run that was not calibrated.")
    parts: list[str] = Field(description="Fields of a prediction that add up to its entropy: two, or three.")
    familiarity: bool = Field(description="Whether predictions say how familiar a row is.")
    nearest: bool = Field(description="Whether predictions can name the nearest training texts.")
    example_row: dict[str, Any]
    limits: dict[str, float]


class Health(BaseModel):
    """The server runs."""

    status: str


class Failure(BaseModel):
    """What was expected, what was found, what to do, in one line."""

    error: str
