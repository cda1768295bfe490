"""Runs a notebook in percent format and writes it as a page of the site and for Jupyter, with what it printed and drew.

python docs/notebook.py examples/session.py docs/session.md examples/session.ipynb
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Cell:
    """A cell and, once it has run, its output."""

    source: str
    is_text: bool
    printed: str = ""
    figures: list[Any] = field(default_factory=list)


def cells_of(text: str) -> list[Cell]:
    """The cells of a file in percent format: `# %% [markdown]` begins text in comments, `# %%` code."""
    parts = re.split(r"^# %%(.*)\n", text, flags=re.MULTILINE)
    out = []
    for kind, body in zip(parts[1::2], parts[2::2], strict=True):
        is_text = kind.strip() == "[markdown]"
        source = re.sub(r"^# ?", "", body, flags=re.MULTILINE) if is_text else body
        out.append(Cell(source.strip("\n"), is_text))
    return out


def run(cells: list[Cell]) -> dict[str, Any]:
    """Run the code cells one after the other; returns their names. Figures are taken off and closed after each cell."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        if cell.is_text:
            continue
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(cell.source, f"cell {number}", "exec"), names)
        cell.printed = printed.getvalue()
        cell.figures = [plt.figure(i) for i in plt.get_fignums()]
        plt.close("all")
    return names


def page(cells: list[Cell], pictures: str) -> str:
    """The notebook as Markdown; figures are `pictures`-1.svg, `pictures`-2.svg, ..."""
    parts, number = [], 0
    for cell in cells:
        if cell.is_text:
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        if cell.printed:
            parts.append(f"```text\n{cell.printed.rstrip()}\n```")
        for _ in cell.figures:
            number += 1
            parts.append(f"![Figure {number} of this session]({pictures}-{number}.svg)")
    return "\n\n".join(parts) + "\n"


def jupyter(cells: list[Cell], pictures: list[str]) -> str:
    """The notebook in Jupyter's format 4.5, its figures as SVG."""
    drawn, out = iter(pictures), []
    for number, cell in enumerate(cells):
        made: dict[str, Any] = {"id": f"cell-{number}", "metadata": {}, "source": cell.source.splitlines(keepends=True)}
        if cell.is_text:
            out.append(made | {"cell_type": "markdown"})
            continue
        shown: list[dict[str, Any]] = []
        if cell.printed:
            shown.append({"output_type": "stream", "name": "stdout", "text": cell.printed.splitlines(keepends=True)})
        for _ in cell.figures:
            data = {"image/svg+xml": next(drawn).splitlines(keepends=True)}
            shown.append({"output_type": "display_data", "metadata": {}, "data": data})
        out.append(made | {"cell_type": "code", "execution_count": None, "outputs": shown})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook = {"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": kernel}, "cells": out}
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def main(source: str, target: str, notebook: str) -> None:
    """Run `source`; write `target` with its figures in pictures/ beside it, and `notebook` with everything in it."""
    import torch
    from matplotlib import rc_context

    import loracurve

    cells = cells_of(Path(source).read_text())
    run(cells)
    out = Path(target)
    pictures = f"pictures/{out.stem}"
    made = f"Made by `python docs/notebook.py {source} {target} {notebook}` with loracurve {loracurve.__version__}, "
    made += f"PyTorch {torch.__version__.partition('+')[0]} on the CPU, {torch.get_num_threads()} thread."
    out.write_text(page(cells, pictures) + f"\n{made}\n")
    drawn = []
    with rc_context({"svg.hashsalt": out.stem, "svg.fonttype": "none"}):
        for number, figure in enumerate((f for cell in cells for f in cell.figures), 1):
            name = out.parent / f"{pictures}-{number}.svg"
            figure.savefig(name, bbox_inches="tight", metadata={"Date": None})
            drawn.append(name.read_text())
    Path(notebook).write_text(jupyter(cells, drawn))


if __name__ == "__main__":
    main(*sys.argv[1:])
