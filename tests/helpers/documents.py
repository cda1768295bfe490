"""The documents and what is shown in them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from helpers.places import ROOT

README = (ROOT / "README.md").read_text()
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))),
]


def fenced(language: str, text: str = README) -> Iterator[str]:
    """Blocks ```language of a document."""
    yield from re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str = README) -> list[list[str]]:
    """Shell lines of a document, split at blanks, comments left out."""
    blocks = fenced("(?:bash|sh|console)", text)
    lines = [line.partition("#")[0].split() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]
