"""YAML from strangers: small, shallow, no larger when its aliases are written out, and without tags that name code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from loracurve.system.errors import UserError, one_line

__all__ = ["check_yaml", "read_yaml"]


MOST_BYTES = 2**20

MOST_DEPTH = 50

MOST_NODES = 50_000

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_UPSTREAM = jsonargparse.get_loader("yaml")


def check_yaml(text: str) -> None:
    """Raise yaml.YAMLError where building the values of `text` could cost much memory or time.

    Only events are looked at. An alias counts as the nodes that it repeats, so that a few lines that double each other
    ("billion laughs") are found out before they are built.
    """
    if len(text) > MOST_BYTES:
        raise yaml.YAMLError(f"expected at most {MOST_BYTES >> 10} KiB of YAML, found more")
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []
    nodes = 0
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise yaml.YAMLError(f"alias *{event.anchor}: expected an anchor that ends before it")
            nodes += sizes[event.anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, nodes))
            nodes += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor:
                sizes[anchor] = nodes - before
        elif isinstance(event, yaml.ScalarEvent):
            nodes += 1
            if event.anchor:
                sizes[event.anchor] = 1
        if nodes > MOST_NODES or len(open_nodes) > MOST_DEPTH:
            raise yaml.YAMLError(f"expected at most {MOST_NODES} values, {MOST_DEPTH} levels deep, found more")


def read_yaml(path: Path) -> Any:
    """The values of a YAML file; raises UserError where it is missing, broken or unreasonable."""
    try:
        if not path.is_file() or path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path}: expected a YAML file of at most {MOST_BYTES >> 10} KiB, found none")
        text = path.read_text(encoding="utf-8")
        check_yaml(text)
        return yaml.load(text, Loader=_LOADER)
    except UserError:
        raise
    except (OSError, ValueError, OverflowError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not valid YAML ({one_line(error, 200)})") from error


def _load(text: str) -> Any:
    check_yaml(text)
    value = _UPSTREAM(text)
    # A prompt whose lines all begin with # is a comment to YAML.
    return text if value is None and text.lstrip().startswith("#") else value


jsonargparse.set_loader("yaml", _load, (yaml.YAMLError,))
