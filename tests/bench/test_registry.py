"""Methods of a suite by name."""

from __future__ import annotations

from loracurve.bench.registry import METHODS, method_class, method_name


def test_methods_have_names_options_with_defaults_and_a_way_to_fit() -> None:
    for name in METHODS:
        kind = method_class(name)
        assert callable(kind.fit) and kind.__doc__
        if name != "temperature":
            assert method_name(kind()) == name
