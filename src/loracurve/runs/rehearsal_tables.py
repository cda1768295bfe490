"""What a dry run prints: data, curve, trainings, time and memory of the run that would follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from loracurve.runs.rehearsal import Memory, Rehearsal, gigabytes
from loracurve.system.escaping import inline, visible

__all__ = ["duration", "print_rehearsal", "total_time"]


LONG = 600
"""Seconds of a run from which on something shorter is named."""


def print_rehearsal(found: Rehearsal) -> None:
    """Print tables of data, trainings, time and memory."""
    console = Console(markup=False, emoji=False)
    console.print(_table(f"data: {found.name}", ["split", "rows", "mean tokens", "longest", "cut"], _data(found)))
    longest = max(split.longest for split in found.splits.values())
    window = "no window" if found.window is None else f"a window of {found.window}"
    cut = sum(split.cut for split in found.splits.values())
    console.print(f"The longest input has {longest} tokens, in {window}; {cut} rows are cut to it.\n")
    console.print(visible(_curve(found)) + "\n")
    headings = ["training", "steps", "batch", "epochs", "s a step", "validations", "s each"]
    console.print(_table("training", headings, _trainings(found)))
    console.print(_table("estimated time", ["part", "time"], _times(found.seconds)))
    console.print(f"In all {total_time(found.seconds)}.\n")
    if found.upper and not found.memory.on_gpu and sum(found.seconds.values()) > LONG:
        console.print(_shorter(found.upper) + "\n", soft_wrap=True)
    console.print(_table("memory", ["part", "size"], _memory(found.memory)))


def _shorter(upper: Sequence[int]) -> str:
    option = f"--lora.layers_to_transform='[{', '.join(map(str, upper))}]'"
    return (
        "Without a GPU the upper third of the layers alone takes about half of that, because all points share the "
        f"lower ones: {option} (compare the validation NLL)."
    )


def _data(found: Rehearsal) -> list[list[str]]:
    splits = found.splits.items()
    return [[name, str(s.rows), f"{s.tokens:.1f}", str(s.longest), str(s.cut)] for name, s in splits]


def _curve(found: Rehearsal) -> str:
    spec, maps = found.spec, ", ".join(f"{count} {name}" for name, count in found.maps.items())
    frozen = spec.size - sum(spec.trainable or [True] * spec.size)
    segments = f"{spec.segments} segment{'s' * (spec.segments > 1)} of degree {spec.degree}"
    points = f"{spec.size} control points{f', {frozen} of them anchors' if frozen else ''}"
    return (
        f"The curve has {segments}: {points}, each an adapter of {found.adapter_parameters:,} parameters on "
        f"{sum(found.maps.values())} maps ({maps}). Its training moves {found.trainable_parameters:,} parameters."
    )


def _trainings(found: Rehearsal) -> list[list[str]]:
    return [
        [
            name,
            str(t.steps),
            str(t.batch_size),
            f"{t.epochs:.1f}",
            f"{t.step:.3f}",
            str(t.validations),
            f"{t.validation:.2f}",
        ]
        for name, t in found.trainings.items()
    ]


_WHEN = {"validation": "validation while training"}


def _times(seconds: Mapping[str, float]) -> list[list[str]]:
    return [[_WHEN.get(name, name), duration(value)] for name, value in seconds.items()]


def _memory(memory: Memory) -> list[list[str]]:
    has = f"{'the GPU' if memory.on_gpu else 'the machine'} has"
    rows = [
        ["base weights", gigabytes(memory.weights)],
        ["control points", gigabytes(memory.points)],
        ["their gradients", gigabytes(memory.gradients)],
        ["AdamW's moments", gigabytes(memory.moments)],
        ["the best state", gigabytes(memory.best)],
        ["in all, without activations", gigabytes(memory.counted)],
        ["peak of the process in these steps", "not known" if memory.peak is None else gigabytes(memory.peak)],
        [has, gigabytes(memory.device.total)],
    ]
    return [*rows, ["free, or held by this process", gigabytes(memory.device.free)]]


def duration(seconds: float) -> str:
    """Seconds in the unit that people would take."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else "under 1 s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# Shares of the whole in words, from the least.
_SHARES = ((0.29, "a quarter"), (0.42, "a third"), (0.58, "half"), (0.71, "two thirds"), (0.86, "three quarters"))


def total_time(seconds: Mapping[str, float]) -> str:
    """The sum of parts, and the part that takes most: ``about 12 min (half of it validation)``."""
    total = sum(seconds.values())
    if total < 1:
        return duration(total)
    part, most = max(seconds.items(), key=lambda entry: entry[1])
    words = next((words for limit, words in _SHARES if most / total < limit), "nearly all")
    return f"about {duration(total)} ({words} of it {part})"


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=visible(title), title_justify="left", box=SIMPLE_HEAD)
    for i, heading in enumerate(headings):
        options: dict[str, Any] = {"justify": "right", "no_wrap": True} if i else {}
        table.add_column(inline(heading), **options)
    for row in rows:
        table.add_row(*(inline(cell) for cell in row))
    return table
