"""Weights by the headers of their files, compared with the loaded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import tiny
from helpers.tokenizers_made import llama_style

from loracurve.model.base_model import load_base
from loracurve.model.config import ModelConfig
from loracurve.model.weight_files import weights_on_disk


def saved(folder: Path, dtype: torch.dtype, **options: Any) -> str:
    tokenizer = llama_style()
    tiny("llama", dtype, vocabulary=len(tokenizer)).save_pretrained(folder, **options)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("shards", ["5GB", "50KB"])
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float64"])
def test_bytes_are_those_of_the_loaded_weights(dtype: Any, shards: str, tmp_path: Path) -> None:
    name = saved(tmp_path / "base", torch.bfloat16, max_shard_size=shards)
    assert len(list((tmp_path / "base").glob("*.safetensors"))) == 1 or shards == "50KB"
    base, _ = load_base(name, dtype=dtype)
    held = {id(p): p.nbytes for p in base.parameters()}
    assert weights_on_disk(ModelConfig(name, dtype=dtype)) == sum(held.values())


def test_what_no_header_says_is_not_known(tmp_path: Path) -> None:
    name = saved(tmp_path / "base", torch.float32, max_shard_size="50KB")
    assert weights_on_disk(ModelConfig(name, quantise="nf4")) is None, "packed while it is loaded"
    next((tmp_path / "base").glob("*.safetensors")).unlink()
    assert weights_on_disk(ModelConfig(name)) is None
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"\xff" * 100)
    for other in (tmp_path / "damaged", tmp_path / "absent", "nobody/nothing"):
        assert weights_on_disk(ModelConfig(str(other))) is None
