"""Names, notes and prompts as text, whatever a stranger wrote into them: one function for each place they are put.

Everything begins with `visible`: control characters, which end lines, move cursors or are forbidden in XML, and those
that reverse the order of letters on the screen are written out as in Python (`\\x1b`). HTML is escaped by Jinja's
autoescape, YAML by PyYAML, JSON by json; these need no function here.
"""

from __future__ import annotations

import re

__all__ = ["code_block", "csv_cell", "inline", "latex", "markdown", "markdown_cell", "python_literal", "visible"]


# C0 and C1 but tab and newline, halves of surrogate pairs, line separators, embeddings and overrides of direction, byte
# order marks, annotations, tags, and what is no character. Joiners stay: words and emoji are made with them.
_HIDDEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u2028-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb\ufffe\uffff"
    r"\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """Text without characters that do something instead of being seen; tabs and newlines stay."""
    return _HIDDEN.sub(lambda found: ascii(found[0])[1:-1], text)


def inline(text: str) -> str:
    """The same in one line."""
    return visible(" ".join(text.split()))


# What CommonMark, GitHub's tables and Python-Markdown read as more than itself, no matter where it stands: code, links,
# HTML (only < before these is a tag), entities, strikethrough, mathematics, attributes. A star or underline that cannot
# open emphasis stays, and so do the underlines of `ag_news`.
_SPECIAL = re.compile(
    r"[`\[\]~${}]|<(?=[A-Za-z/!?]|$)|&(?=[A-Za-z#]|$)|\\|(?<![^\W_])\*$|\*(?!\s|$)|(?<![^\W_])_|_(?![^\W_])|(?<!\S)#"
)

# What begins a block where it begins a line.
_BLOCK = re.compile(r"[>+=:!*|-]|\d+(?=[.)])")

# Backslashes do not escape these everywhere, and a backslash before a parenthesis begins mathematics on the hub.
_ENTITIES = {"<": "&lt;", "&": "&amp;", "\\": "&#92;"}

_NUMBERS = re.compile(r"[\d\s.,+\-–\[\]%/]*( \*)?")


def markdown(text: str) -> str:
    """Text for a paragraph, heading or list item of Markdown, in one line; it renders as it was.

    Addresses that begin with http or www become links where the renderer makes them of plain text; others never do.
    """
    text = inline(text)
    start = _BLOCK.match(text)
    number = start is not None and start[0].isdecimal()
    rest = _SPECIAL.sub(lambda m: _ENTITIES.get(m[0], f"\\{m[0]}"), text[start.end() :] if start else text)
    if start is None:
        return rest
    return f"{start[0]}\\{rest}" if number else f"\\{start[0]}{rest}"


def markdown_cell(text: str) -> str:
    """Text for a cell of a Markdown table. Numbers and their intervals stay as they are."""
    text = inline(text)
    if _NUMBERS.fullmatch(text):
        return text
    return _SPECIAL.sub(lambda m: _ENTITIES.get(m[0], f"\\{m[0]}"), text).replace("|", r"\|")


def code_block(text: str, language: str = "text") -> str:
    """Text as a fenced block of Markdown, behind a fence that is longer than any in it."""
    text = visible(text)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def python_literal(value: str | int) -> str:
    """A value as Python source, strings in double quotes as formatters write them; raises TypeError for other types."""
    if type(value) not in (str, int):
        raise TypeError(f"expected text or a whole number, found {type(value).__name__}")
    source = repr(value)
    return f'"{source[1:-1]}"' if source.startswith("'") and '"' not in source else source


_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def latex(text: str) -> str:
    """Text for LaTeX, in one line."""
    text = "".join(_LATEX.get(c, c) for c in inline(text))
    # Behind the \\ that ends a row of a table, [ and * would be its arguments.
    return f"{{{text[0]}}}{text[1:]}" if text.startswith(("[", "*")) else text


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def csv_cell(text: str) -> str:
    """Text for a CSV file, with an apostrophe before what a spreadsheet would take for a formula; numbers stay."""
    text = visible(text)
    formula = text.lstrip().startswith(("=", "+", "-", "@", "＝", "＋", "－", "＠")) or text.startswith(("\t", "\n"))
    return f"'{text}" if formula and not _NUMBER.fullmatch(text) else text
