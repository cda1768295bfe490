"""What fuzzing found once is read or refused now; and all targets are as they are said to be."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from fuzz.limits import little_memory, read_or_refused
from fuzz.run import CORPUS, LARGEST_KEPT, quiet, tried
from fuzz.targets import TARGETS, seen, shared_world

FOUND = sorted(p for p in CORPUS.glob("*/*") if p.is_file())


@pytest.fixture(scope="module")
def made() -> Path:
    return shared_world()


@pytest.mark.parametrize("name", TARGETS)
def test_what_was_found_and_some_more(name: str, made: Path, tmp_path: Path) -> None:
    """The real file, all inputs that were faults, and a few new ones, the same in every run."""
    world = Path(shutil.copytree(made, tmp_path / "world"))
    target, draw = TARGETS[name](world), random.Random(name)
    assert quiet(lambda: read_or_refused(target.read, target.seconds)) is None
    whole, before = target.file.read_bytes(), seen(world, target)
    found = [p.read_bytes() for p in FOUND if p.parent.name == name]
    more = [target.mutation(whole, draw) for _ in range(1 if target.seconds > 10 else 5)]
    with target.close, little_memory():
        for content in found + more:
            _, fault = quiet(lambda: tried(target, content, world, before))  # noqa: B023
            assert fault is None, content[:500]


def test_the_corpus_is_small_and_named_after_targets() -> None:
    assert {p.parent.name for p in FOUND} <= TARGETS.keys()
    assert all(p.stat().st_size <= LARGEST_KEPT for p in FOUND)
    assert sum(p.stat().st_size for p in FOUND) < 2**20


def test_a_fault_is_seen(made: Path, tmp_path: Path) -> None:
    """Another exception, a file that is written, and time that runs out."""
    world = Path(shutil.copytree(made, tmp_path / "world"))
    target = TARGETS["index"](world)
    before = seen(world, target)

    def faulty(content: bytes) -> str:
        def read() -> None:
            if content == b"raise":
                raise KeyError("x")
            if content == b"write":
                (world / "run" / "new").write_text("x")
            while content == b"wait":
                pass

        made_up = type(target)(target.file, target.mutation, read, (), 0.2)
        return str(tried(made_up, content, world, before)[1])

    assert faulty(b"raise").startswith("KeyError at ")
    assert faulty(b"wait").startswith("AssertionError at ") and "took more than 0.2 s" in faulty(b"wait")
    assert faulty(b"read") == "None"
    assert faulty(b"write") == f"written: {world / 'run' / 'new'}"
