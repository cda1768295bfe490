"""YAML and JSON of strangers: words stay words, keys stand once, what is written is read back equal."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from loracurve.system.errors import UserError
from loracurve.system.files import read_json
from loracurve.system.yaml_files import dump_yaml, load_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((word, word) for word in ("no", "yes", "on", "off", "y", "NO", "1:30", "0o17", "017", "0x1F", "1_000")),
        *((word, word) for word in ("2024-01-01", "=", "5e", "1.2.3", "12e4567a", "1e+")),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("3", 3),
        ("-3", -3),
        ("0", 0),
        ("1e3", 1000.0),
        ("1.5E-3", 0.0015),
        (".5", 0.5),
        ("-1.", -1.0),
        (".inf", math.inf),
        ("'3'", "3"),
        ("!!str 3", "3"),
    ],
)
def test_words(text: str, value: Any) -> None:
    found = load_yaml(f"a: {text}")["a"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("steps: 1\nsteps: 2", "steps", 2),
        ("a:\n  b: 1\n  c: 2\n  b: 1", "b", 4),
        ("- {a: 1, 'a': 1}", "a", 1),
        ("a: [1, {b: {c: 1}, d: 2,\n b: 3}]", "b", 2),
        ("a: &x {b: 1}\nc: *x\nc: *x", "c", 3),
        ("1: a\n'1': b", "1", 2),
    ],
)
def test_a_key_stands_once(text: str, key: str, line: int, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        read_yaml(tmp_path / "x.yaml")
    assert str(caught.value) == f"{tmp_path}/x.yaml: not valid YAML (key '{key}' stands twice, again in line {line})"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: {b: 1}\nb: {b: 2, a: 3}", {"a": {"b": 1}, "b": {"b": 2, "a": 3}}),
        ("a: a\nb: b", {"a": "a", "b": "b"}),
        ("- {a: 1}\n- {a: 2}", [{"a": 1}, {"a": 2}]),
        ("a: &x {b: 1, c: 2}\nd: {<<: *x, b: 3}", {"a": {"b": 1, "c": 2}, "d": {"b": 3, "c": 2}}),
        ("a: [a, [a, a]]", {"a": ["a", ["a", "a"]]}),
    ],
)
def test_other_keys_may_be_alike(text: str, value: Any) -> None:
    assert load_yaml(text) == value


def test_a_field_of_json_stands_once(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": 1, "b": {"c": 1, "c": 2}}')
    with pytest.raises(UserError, match="x.json: not valid JSON .*the field 'c' stands twice"):
        read_json(tmp_path / "x.json")


def test_what_is_written_is_read_back_equal_here_and_elsewhere() -> None:
    words = [
        "no",
        "yes",
        "1:30",
        "0o17",
        "017",
        "1_000",
        "1e3",
        "5e12345",
        "2024-01-01",
        "=",
        "<<",
        "null",
        "~",
        "true",
    ]
    values = {
        "a": [*words, ".5", ".inf", "3", "-", "", " ", "#", "a: b", "ß"],
        "b": [1e-8, 1e20, 0.1, -3, True, None, math.inf],
        "no": {},
    }
    assert load_yaml(dump_yaml(values)) == values
    assert yaml.safe_load(dump_yaml(values)) == values
