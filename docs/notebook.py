"""Runs a notebook in percent format and writes it as a page of the site, with what it printed and drew.

python docs/notebook.py examples/session.py docs/session.md
"""

from __future__ import annotations

import contextlib
import io
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


def main(source: str, target: str) -> None:
    """Run `source` and write `target` and, in pictures/ beside it, its figures."""
    import torch
    from matplotlib import rc_context

    import loracurve

    cells = cells_of(Path(source).read_text())
    run(cells)
    out = Path(target)
    pictures = f"pictures/{out.stem}"
    made = f"Made by `python docs/notebook.py {source} {target}` with loracurve {loracurve.__version__}, PyTorch "
    made += f"{torch.__version__.partition('+')[0]} on the CPU, {torch.get_num_threads()} thread."
    out.write_text(page(cells, pictures) + f"\n{made}\n")
    with rc_context({"svg.hashsalt": out.stem, "svg.fonttype": "none"}):
        for number, figure in enumerate((f for cell in cells for f in cell.figures), 1):
            name = out.parent / f"{pictures}-{number}.svg"
            figure.savefig(name, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
