"""Messages of errors."""

from __future__ import annotations

from loracurve.system.errors import one_line


def test_messages_are_one_printable_line() -> None:
    assert one_line("a\n b\x1b[31m\ud800") == "a b\\x1b[31m\\ud800"
    assert len(one_line("x" * 10_000)) == 600 and one_line("x" * 10_000).endswith("...")
