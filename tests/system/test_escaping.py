"""Text comes out of every format as it went in, by the parsers that others read it with."""

from __future__ import annotations

import ast
import csv
import io
import re
import xml.dom.minidom
from html.parser import HTMLParser
from xml.sax.saxutils import escape

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from loracurve.system.escaping import (
    code_block,
    csv_cell,
    inline,
    latex,
    markdown,
    markdown_cell,
    python_literal,
    visible,
)

FUZZ = settings(max_examples=120, deadline=None, derandomize=True, database=None)

# What means something somewhere, more often than letters that mean nothing.
PIECES = [
    *"`*_~[](){}<>#+-=|!\\$&%^:;@'\"/.0a é\n\t\r",
    *(
        "```",
        "~~~",
        "---",
        "***",
        "__",
        "1. ",
        "1) ",
        "- [ ] ",
        "> ",
        "    ",
        "{: onclick=x}",
        "{{ 7*7 }}",
        "{% raw %}",
    ),
    *("<script>alert(1)</script>", "</script>", "<!--", "-->", "<img src=x onerror=alert(1)>", "<javascript:x>"),
    *("[x](javascript:alert(1))", "![x](data:text/html,x)", "[x]: javascript:x", "[x][y]", "](", "&lt;", "&#60;", "&"),
    *("=1+1", "=HYPERLINK(1)", "@SUM(1)", "+1", "\\input{/etc/passwd}", "\\write18{id}", "$\\frac{", "%", "\\\\[2cm]"),
    *("\x1b[2J", "\x1b]0;x\x07", "\x00", "\x9b", "\u202e", "\u2066", "\u2028", "\ufffe", "\ud800", "\u200d", "ag_news"),
]
HOSTILE = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)
TEXTS = st.one_of(HOSTILE, st.text(st.characters(codec=None), max_size=12))


def parsed(source: str) -> list[Token]:
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(source)


def said(token: Token) -> str:
    """The words of an inline token, which must be nothing but words."""
    assert {t.type for t in token.children or ()} <= {"text", "text_special"}, token.content
    return " ".join("".join(t.content for t in token.children or ()).split())


@FUZZ
@given(TEXTS)
def test_hidden_characters_are_seen(text: str) -> None:
    shown = visible(text)
    assert all(c.isprintable() or c in "\t\n" or c.isspace() or ord(c) > 0xAC for c in shown)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)
    xml.dom.minidom.parseString(f"<text>{escape(shown)}</text>".encode())  # as in SVG: XML forbids most of them
    assert visible(shown) == shown
    assert "\n" not in inline(text)


def test_what_is_hidden_is_written_as_in_python() -> None:
    assert visible("a\x1b[2J\u202eb\ud800\tc\r\n") == "a\\x1b[2J\\u202eb\\ud800\tc\\r\n"
    kept = "é 漢字 👩\u200d🔬 می\u200cخواهم"
    assert visible(kept) == kept


@FUZZ
@given(TEXTS)
def test_markdown_renders_as_it_was(text: str) -> None:
    for before, after in (("", ""), ("Words\n", " words\nand more"), ("Words (", ").")):
        tokens = parsed(f"{before}{markdown(text)}{after}")
        if not (text.strip() or before):
            continue
        assert [t.type for t in tokens] == ["paragraph_open", "inline", "paragraph_close"]
        children = tokens[1].children or []
        assert {t.type for t in children} <= {"text", "text_special", "softbreak"}
        whole = "".join(t.content if t.type != "softbreak" else "\n" for t in children)
        assert " ".join(whole.split()) == " ".join(f"{before}{inline(text)}{after}".split())
    kinds = [t.type for t in parsed(f"# {markdown(text)}\n\n- {markdown(text)}\n")]
    assert kinds[:3] == ["heading_open", "inline", "heading_close"] and kinds.count("list_item_open") == 1
    assert {"fence", "html_block", "hr", "code_block", "blockquote_open"}.isdisjoint(kinds)


@FUZZ
@given(st.lists(TEXTS, min_size=3, max_size=3))
def test_cells_of_markdown_stay_in_their_columns(texts: list[str]) -> None:
    row = "| " + " | ".join(markdown_cell(t) for t in texts) + " |"
    tokens = parsed(f"{row}\n|---|---|---|\n{row}\n\nAfter\n")
    cells = [tokens[i + 1] for i, t in enumerate(tokens) if t.type in ("th_open", "td_open")]
    assert [said(c) for c in cells] == [" ".join(inline(t).split()) for t in texts] * 2
    assert tokens[-3].type == "paragraph_open"


def test_plain_names_and_numbers_stay_readable_in_markdown() -> None:
    for text in (
        "ag_news",
        "anchored, 2 segments",
        "-0.0121 [-0.0140, +0.0103] *",
        "t*",
        "> 10",
        "NLL <= worst",
        "AT&T 1",
    ):
        assert markdown_cell(text) == text.replace("&T", "&amp;T")
    assert markdown("3. x") == r"3\. x" and markdown("- a*b*") == r"\- a\*b*"
    assert markdown_cell("a|b\\") == r"a\|b&#92;"


@FUZZ
@given(TEXTS)
def test_code_blocks_end_where_they_should(text: str) -> None:
    fence, *_ = tokens = parsed(f"{code_block(text)}\n\nAfter\n")
    assert fence.type == "fence" and fence.info == "text" and fence.content == f"{visible(text)}\n"
    assert [t.type for t in tokens[1:]] == ["paragraph_open", "inline", "paragraph_close"]


@FUZZ
@given(st.one_of(TEXTS, st.integers()))
def test_python_reads_its_literals_back(value: str | int) -> None:
    source = python_literal(value)
    assert ast.literal_eval(source) == value and "\n" not in source and visible(source) == source
    assert all(
        isinstance(n, ast.Expr | ast.Constant | ast.UnaryOp | ast.USub | ast.Module | ast.Load)
        for n in ast.walk(ast.parse(source))
    )


def test_other_values_are_no_python_literals() -> None:
    assert python_literal("org/tiny") == '"org/tiny"' and python_literal('"') == "'\"'" and python_literal(-3) == "-3"
    for value in (1.5, True, None, ["x"]):
        with pytest.raises(TypeError, match="expected text or a whole number"):
            python_literal(value)  # type: ignore[arg-type]


def typeset(source: str) -> str:
    """What LaTeX prints of text with escapes; whatever else it would act on fails."""
    printed, rest = "", source
    while rest:
        found = re.match(
            r"\\text(backslash|asciitilde|asciicircum)\{\}|\\([&%$#_{}])|\{([\[*])\}|([^\\&%$#_{}~^])", rest
        )
        assert found, rest
        name, escaped, grouped, plain = found.groups()
        printed += {"backslash": "\\", "asciitilde": "~", "asciicircum": "^"}.get(name, escaped or grouped or plain)
        rest = rest[found.end() :]
    return printed


@FUZZ
@given(TEXTS)
def test_latex_prints_what_was_written(text: str) -> None:
    assert typeset(latex(text)) == inline(text)
    assert not latex(text).startswith(("[", "*"))


@FUZZ
@given(st.lists(TEXTS, min_size=2, max_size=2))
def test_cells_of_csv_hold_no_formulas(texts: list[str]) -> None:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerow([csv_cell(t) for t in texts])
    (row,) = csv.reader(io.StringIO(file.getvalue()))
    for cell, text in zip(row, texts, strict=True):
        assert cell.removeprefix("'") == visible(text).removeprefix("'")
        number = re.fullmatch(r"[+-]?[\d.]+(e[+-]?\d+)?", cell, flags=re.I)
        assert number or not cell.lstrip().startswith(("=", "+", "-", "@"))


def test_numbers_in_csv_stay_numbers() -> None:
    assert [csv_cell(t) for t in ("-0.5", "+1e-3", ".5", "-", "=1", " @x", "-1+1", "a=1")] == [
        *("-0.5", "+1e-3", ".5", "'-", "'=1", "' @x", "'-1+1", "a=1")
    ]


@FUZZ
@given(TEXTS)
def test_visible_text_can_be_written_to_any_file(text: str) -> None:
    visible(text).encode()
    parser = HTMLParser()
    tags: list[str] = []
    parser.handle_starttag = lambda tag, _: tags.append(tag)  # type: ignore[method-assign]
    parser.feed(f"<p>{escape(visible(text))}</p>")
    assert tags == ["p"]
