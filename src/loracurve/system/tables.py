"""Tables: Parquet from strangers, and data frames as JSON."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from loracurve.system.errors import UserError, one_line
from loracurve.system.files import atomic_write
from loracurve.system.paths import file_size, opened

__all__ = ["read_table", "records", "write_table"]

# Bytes of a table for each byte of its Parquet file.
LARGEST_RATIO = 1000


def read_table(path: Path) -> pa.Table:
    """Read a Parquet file; raises UserError if it is damaged, or unfolds to far more than lies on the disk."""
    size = file_size(path)
    # Opened here: of a name alone pyarrow would make a URI where it has a colon.
    with opened(path, "a Parquet file") as source:
        try:
            with pq.ParquetFile(source, thrift_string_size_limit=2**26, thrift_container_size_limit=2**20) as file:
                about = file.metadata
                groups = [about.row_group(i).total_byte_size for i in range(about.num_row_groups)]
                # Each row has an id of its own, which compression cannot make away with.
                if about.num_rows > 8 * size or not 0 <= sum(groups) <= LARGEST_RATIO * size:
                    raise UserError(
                        f"{path}: {about.num_rows} rows of {sum(groups)} bytes do not fit into {size} bytes"
                    )
                return file.read()
        except UserError:
            raise
        except (pa.ArrowException, MemoryError, OSError, OverflowError, ValueError) as error:
            raise UserError(f"{path}: damaged ({one_line(error, 160)}); make it again") from error


def write_table(path: Path, table: pa.Table | pd.DataFrame, **options: Any) -> None:
    """Write a table, or a data frame without its index, as Parquet, atomically.

    Args:
        options: of `pyarrow.parquet.write_table`. Default: zstd.
    """
    held = pa.Table.from_pandas(table, preserve_index=False) if isinstance(table, pd.DataFrame) else table

    def write(target: Path) -> None:
        with target.open("wb") as file:
            pq.write_table(held, file, **({"compression": "zstd"} | options))

    atomic_write(path, write)


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a data frame as JSON has them: None for NaN, which pandas makes of missing numbers."""
    rows: list[dict[str, Any]] = frame.to_dict("records")
    return [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in rows]
