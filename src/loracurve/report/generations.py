"""Generated text with the uncertainty of each token: as coloured text in the terminal and as one HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.text import Text

from loracurve.inference.config import Measure
from loracurve.inference.generation import Generation
from loracurve.report.templates import render_html
from loracurve.system.escaping import visible
from loracurve.system.files import atomic_write

__all__ = ["Measure", "print_generation", "write_generations"]


WORDS = {
    "mutual_information": "mutual information, what the points disagree on",
    "expected_entropy": "expected entropy, what the data leave open",
    "entropy": "entropy, both together",
}

# From white through orange to red: readable under black letters.
_LIGHT, _DARK = (255, 255, 255), (235, 85, 60)


def _highest(generations: Sequence[Generation], measure: str) -> float:
    """The value that gets the full colour, in nats."""
    return max((value for g in generations for value in getattr(g, measure)), default=0.0)


def _share(value: float, highest: float) -> float:
    return min(value / highest, 1.0) if highest > 0 else 0.0


def print_generation(generation: Generation, measure: Measure = "mutual_information") -> None:
    """Print prompt and text, the background of each token the redder the higher its `measure`, and a summary."""
    highest = _highest([generation], measure)
    text = Text().append(visible(generation.prompt), style="dim")
    for piece, value in zip(generation.tokens, getattr(generation, measure), strict=True):
        share = _share(value, highest)
        colour = [round(a + share * (b - a)) for a, b in zip(_LIGHT, _DARK, strict=True)]
        text.append(visible(piece), style=f"black on rgb({colour[0]},{colour[1]},{colour[2]})")
    console = Console(highlight=False, soft_wrap=True)
    console.print(text)
    means = ", ".join(f"{name.replace('_', ' ')} {_mean(generation, name):.3f}" for name in get_args(Measure))
    console.print(f"colour: {measure.replace('_', ' ')}, up to {highest:.3f} nats; mean of each token in nats: {means}")


def _mean(generation: Generation, measure: str) -> float:
    values = getattr(generation, measure)
    return sum(values) / max(len(values), 1)


def write_generations(path: Path, generations: Sequence[Generation], title: str = "generated text") -> None:
    """Write one self-contained HTML file: tokens coloured by a measure that the reader chooses, figures on hovering."""
    scales = {name: _highest(generations, name) for name in get_args(Measure)}
    texts = [{"prompt": g.prompt, "finish": g.finish, "tokens": _tokens(g, scales)} for g in generations]
    page = render_html("generations.html", title=title, texts=texts, words=WORDS, scales=scales)
    atomic_write(path, lambda p: p.write_text(page, encoding="utf-8"))


def _tokens(generation: Generation, scales: dict[str, float]) -> list[dict[str, Any]]:
    columns = (generation.tokens, generation.log_probs, *(getattr(generation, name) for name in scales))
    out = []
    for piece, log_prob, *values in zip(*columns, strict=True):
        named = dict(zip(scales, values, strict=True))
        out.append(
            {
                "piece": piece,
                "log_prob": log_prob,
                "nats": named,
                "shares": {name: _share(value, scales[name]) for name, value in named.items()},
            }
        )
    return out
