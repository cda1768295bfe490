"""YAML from strangers: small, shallow, no larger when its aliases are written out, and without tags that name code.

Words are read as in YAML 1.2: only true and false are booleans (no is a word, as is a country), numbers are decimal
(1:30, 0o17, 010 and 1_000 are words), there are no dates. A key stands once in its mapping.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from loracurve.system.errors import UserError, one_line
from loracurve.system.paths import file_size, is_file, read_text

__all__ = ["check_yaml", "dump_yaml", "load_yaml", "read_yaml"]


MOST_BYTES = 2**20

MOST_DEPTH = 50

MOST_NODES = 50_000


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Plain values, words as in YAML 1.2."""

    yaml_implicit_resolvers: dict[str | None, list[tuple[str, re.Pattern[str]]]] = {}


class _Dumper(yaml.SafeDumper):
    """Quotes words that either YAML 1.1 or `_Loader` would take for something else: 'no', '1e3'."""


_FRACTION = r"\.[0-9]*(?:[eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+"
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    (
        "float",
        rf"[-+]?(?:(?:0|[1-9][0-9]*)(?:{_FRACTION})|\.[0-9]+(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
):
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})\\Z"), _first)


@dataclass
class _Open:
    """A mapping or list whose end has not come."""

    anchor: str | None
    before: int
    """nodes before it"""
    mapping: bool
    keys: set[str] = field(default_factory=set)
    at_key: bool = True
    """whether its next node is a key"""

    def take(self, event: yaml.Event) -> None:
        """A node of it; raises yaml.YAMLError for a key that it has already."""
        if self.mapping and self.at_key and isinstance(event, yaml.ScalarEvent):
            if event.value in self.keys:
                line = event.start_mark.line + 1
                raise yaml.YAMLError(f"key {one_line(event.value, 60)!r} stands twice, again in line {line}")
            self.keys.add(event.value)
        self.at_key = not self.at_key


def check_yaml(text: str) -> None:
    """Raise yaml.YAMLError where building the values of `text` could cost much memory or time.

    Only events are looked at. An alias counts as the nodes that it repeats, so that a few lines that double each other
    ("billion laughs") are found out before they are built.
    """
    if len(text) > MOST_BYTES:
        raise yaml.YAMLError(f"expected at most {MOST_BYTES >> 10} KiB of YAML, found more")
    sizes: dict[str, int] = {}
    open_nodes: list[_Open] = []
    nodes = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.NodeEvent) and open_nodes:
            open_nodes[-1].take(event)
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise yaml.YAMLError(f"alias *{event.anchor}: expected an anchor that ends before it")
            nodes += sizes[event.anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append(_Open(event.anchor, nodes, isinstance(event, yaml.MappingStartEvent)))
            nodes += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            ended = open_nodes.pop()
            if ended.anchor:
                sizes[ended.anchor] = nodes - ended.before
        elif isinstance(event, yaml.ScalarEvent):
            nodes += 1
            if event.anchor:
                sizes[event.anchor] = 1
        if nodes > MOST_NODES or len(open_nodes) > MOST_DEPTH:
            raise yaml.YAMLError(f"expected at most {MOST_NODES} values, {MOST_DEPTH} levels deep, found more")


def load_yaml(text: str) -> Any:
    """The values of YAML; raises yaml.YAMLError or ValueError where it is broken or unreasonable."""
    check_yaml(text)
    return yaml.load(text, Loader=_Loader)


def dump_yaml(values: Any) -> str:
    """Plain values as YAML, which `load_yaml` and readers of YAML 1.1 read back equal."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def read_yaml(path: Path) -> Any:
    """The values of a YAML file; raises UserError where it is missing, broken or unreasonable."""
    try:
        if not is_file(path) or file_size(path) > MOST_BYTES:
            raise UserError(f"{path}: expected a YAML file of at most {MOST_BYTES >> 10} KiB, found none")
        return load_yaml(read_text(path))
    except UserError:
        raise
    except (OSError, ValueError, OverflowError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not valid YAML ({one_line(error, 200)})") from error


def _load(text: str) -> Any:
    """A file of options, or a word of the command line: what ends in a colon, or looks like a comment, is a text."""
    value = load_yaml(text)
    if isinstance(value, dict) and value and all(inner is None for inner in value.values()):
        return text
    # A prompt whose lines all begin with # is a comment to YAML.
    return text if value is None and text.lstrip().startswith("#") else value


jsonargparse.set_loader("yaml", _load, (yaml.YAMLError,))
