"""Safetensors files: the bytes that the library writes, bounded before they are parsed."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loracurve.system.errors import UserError
from loracurve.system.files import write_json
from loracurve.system.tensors import MOST_TENSORS, read_tensors, write_tensors


def test_files_are_those_of_the_library(tmp_path: Path) -> None:
    made = torch.Generator().manual_seed(0)
    tensors = {
        "b.half": torch.randn(3, 5, generator=made).to(torch.bfloat16),
        "a.wide": torch.randn(2, 2, generator=made, dtype=torch.float64),
        'name "ä"': torch.randn(4, generator=made).half(),
        "number": torch.tensor(3.0),
        "none": torch.zeros(0, 4),
        "turned": torch.randn(3, 4, generator=made).T,
        "count": torch.tensor([1, 2]),
        "flag": torch.tensor([True, False, True]),
    }
    write_tensors(tmp_path / "ours.safetensors", tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "theirs.safetensors", {"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    found = load_file(tmp_path / "ours.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_all_files_have_the_permissions_of_new_ones(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(1)})
    write_json(tmp_path / "a.json", 1)
    (tmp_path / "plain").touch()
    assert len({stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}) == 1


def with_header(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def test_headers_are_bounded_before_they_are_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 400_000
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    many = json.dumps({f"t{i}": entry for i in range(count)}).encode()
    huge = b"{" + b" " * 400 * MOST_TENSORS
    monkeypatch.setattr("loracurve.system.tensors.load_file", lambda _: pytest.fail("parsed"))
    with pytest.raises(UserError, match=f"at most {MOST_TENSORS} tensors, found {count}$"):
        read_tensors(with_header(tmp_path / "many.safetensors", many))
    with pytest.raises(UserError, match="header of at most 40000000 bytes"):
        read_tensors(with_header(tmp_path / "huge.safetensors", huge))
    (tmp_path / "cut.safetensors").write_bytes((2**62).to_bytes(8, "little"))
    with pytest.raises(UserError, match="damaged safetensors file"):
        read_tensors(tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match="expected at most 2 tensors, found 3"):
        read_tensors(
            with_header(tmp_path / "few.safetensors", json.dumps({f"t{i}": entry for i in range(3)}).encode()), 2
        )
    with pytest.raises(UserError, match="expected a safetensors file, found a folder"):
        read_tensors(tmp_path)
