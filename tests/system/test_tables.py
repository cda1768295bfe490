"""Parquet files: names are names, with or without a colon."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from loracurve.system.errors import UserError
from loracurve.system.tables import read_table, write_table


@pytest.mark.parametrize("name", ["a.parquet", "a:b", "s3:a", "file:a", "-x"])
def test_a_table_is_read_as_it_was_written(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    frame = pd.DataFrame({"id": ["x", "y"], "nll": [0.5, 1.5]}, index=[7, 8])
    write_table(Path(name), frame)
    assert read_table(Path(name)).to_pydict() == {"id": ["x", "y"], "nll": [0.5, 1.5]}
    assert os.listdir() == [name]
    with open(name, "rb") as file:
        assert pq.ParquetFile(file).metadata.row_group(0).column(0).compression == "ZSTD"


def test_what_is_no_table_is_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "damaged").write_text("PAR1")
    with pytest.raises(UserError, match="damaged: damaged "):
        read_table(tmp_path / "damaged")
    with pytest.raises(UserError, match="expected a Parquet file, found none"):
        read_table(tmp_path / "missing")
    with pytest.raises(UserError, match="expected a Parquet file, found a folder"):
        read_table(tmp_path)
