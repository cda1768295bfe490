"""What processes tell each other."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.ranks import together

from loracurve.system.distributed import gathered, is_main, on_main, world
from loracurve.system.errors import UserError


def test_a_fault_of_one_is_a_fault_of_all(tmp_path: Path) -> None:
    def faults(rank: int) -> list[str]:
        said = []

        def fails(on: int, kind: type[Exception]) -> None:
            if rank == on:
                raise kind(f"of {on}")

        for work, kind in (
            (lambda: on_main(lambda: fails(0, UserError)), UserError),
            (lambda: on_main(lambda: fails(0, KeyError)), (KeyError, RuntimeError)),
            (lambda: gathered(lambda: fails(1, UserError)), UserError),
        ):
            with pytest.raises(kind) as error:  # type: ignore[call-overload]
                work()
            said.append(str(error.value))
        on_main(lambda: said.append(f"alone: {world()}"))
        return [*said, str(gathered(lambda: rank)), str(is_main())]

    first, second = together(faults, tmp_path / "ranks")
    assert first == ["of 0", "'of 0'", "of 1", "alone: (0, 1)", "[0, 1]", "True"]
    assert second == ["of 0", "the main process failed: 'of 0'", "of 1", "[0, 1]", "False"]
