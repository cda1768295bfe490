"""Options of the base model. No torch here: options are read before it is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Dtype", "ModelConfig", "Quantisation"]


Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]

Quantisation = Literal["none", "nf4", "int8"]


@dataclass(frozen=True)
class ModelConfig:
    """The base model."""

    name: str
    """A folder or a name on the hub."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: Dtype = "auto"
    """Dtype of the frozen base weights; `auto` takes the checkpoint's."""
    trust_remote_code: bool = False
    """The model comes with code. It runs only with --trust-remote-code on the command line, which is noted here."""
    quantise: Quantisation = "none"
    """Hold the frozen weights of linear maps in 4 (nf4) or 8 bits (int8) with bitsandbytes. Nothing can then be folded
    into them: no scans, and points are run together."""
    shard: bool = False
    """With several processes, spread the frozen weights of the layers over them (FSDP2) instead of having them whole in
    each."""
