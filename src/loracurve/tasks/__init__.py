"""Data sets, prompts and tokens: what a model is trained on and evaluated with."""

from loracurve.tasks.data import Dataset, Kind, Row, as_text, read_dataset, read_rows, split_validation
from loracurve.tasks.encoding import Encoded, Example
from loracurve.tasks.hub import HUB, load_from_hub
from loracurve.tasks.task import Scoring, Task, TaskConfig, load_task, open_dataset
from loracurve.tasks.templates import TEMPLATES, Template
from loracurve.tasks.word_sentiment import word_sentiment

__all__ = [
    "HUB",
    "TEMPLATES",
    "Dataset",
    "Encoded",
    "Example",
    "Kind",
    "Row",
    "Scoring",
    "Task",
    "TaskConfig",
    "Template",
    "as_text",
    "load_from_hub",
    "load_task",
    "open_dataset",
    "read_dataset",
    "read_rows",
    "split_validation",
    "word_sentiment",
]
