"""Fetching a curve from the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loracurve.curve import hub as curve_hub


def test_only_the_files_of_a_curve_are_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def fetch(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(curve_hub, "snapshot_download", fetch)
    assert curve_hub.curve_folder("me/curve", "v1") == tmp_path
    assert asked == {
        "name": "me/curve",
        "revision": "v1",
        "allow_patterns": [
            *("curve_config.json", "control_points.safetensors", "base_weights.safetensors"),
            *("unknowns.json", "unknowns.safetensors"),
        ],
    }
