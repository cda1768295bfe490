"""What a model's config declares, in itself or nested, where trying it out (`trials`) would cost too much."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from loracurve.system.errors import UserError

__all__ = ["check_lengths", "numbers_of_experts", "pad_token", "rescaled_from", "text_config", "window_of"]

_ORIGINAL = "original_max_position_embeddings"


def text_config(model: nn.Module) -> Any:
    """The config of a model's language part: its own, of models that take more than text one nested in it."""
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _entries(config: Any) -> Iterator[tuple[Any, str, Any]]:
    """(config, name, value) of all that a config and those nested in it say."""
    for key, value in vars(config).items():
        if hasattr(value, "to_dict"):
            yield from _entries(value)
        else:
            yield config, key, value


def pad_token(model: nn.Module) -> int:
    """The token by which a classifier tells padding from text.

    Raises:
        UserError: its config has none.
    """
    found = (getattr(config, "pad_token_id", None) for config in (text_config(model), model.config))
    pad: Any = next((token for token in found if token is not None), None)
    if pad is None or pad < 0:
        raise UserError(
            f"{type(model).__name__}: expected a padding token in its config, found none; set base.config.pad_token_id "
            "to the tokenizer's"
        )
    return int(pad)


def window_of(config: Any) -> int | None:
    """The shortest attention window, by any attribute called so."""
    found: list[int] = []
    for _, key, value in _entries(config):
        if ("window" in key or "chunk_size" in key) and "pattern" not in key and "layers" not in key:
            found += [v for v in (value if isinstance(value, list | tuple) else [value]) if type(v) is int and v > 0]
    return min(found, default=None)


def numbers_of_experts(config: Any) -> set[int]:
    """How many experts are mixed, by any attribute called so; empty for a model without."""
    return {
        value
        for _, key, value in _entries(config)
        if "expert" in key and "num" in key and "per_tok" not in key and type(value) is int and value > 1
    }


def rescaled_from(config: Any) -> int | None:
    """The length from which on a model scales the positions of a whole batch by its longest row (longrope, dynamic);
    None where rows do not depend on the length of others so."""
    found: list[int] = []
    for own, key, value in _entries(config):
        if key not in ("rope_parameters", "rope_scaling") or not isinstance(value, dict):
            continue
        kinds = [value, *(v for v in value.values() if isinstance(v, dict))]
        names = {kind.get("rope_type", kind.get("type")) for kind in kinds}
        original = next((k[_ORIGINAL] for k in kinds if k.get(_ORIGINAL)), getattr(own, _ORIGINAL, None))
        if "longrope" in names and original:
            found.append(int(original))
        if "dynamic" in names:
            found.append(int(original or own.max_position_embeddings))
    return min(found, default=None)


def check_lengths(config: Any, shortest: int, longest: int) -> None:
    """Refuse rows of which some are scaled by the longest of their batch and others, alone, would not be.

    Raises:
        UserError: as said.
    """
    limit = rescaled_from(config)
    if limit is not None and shortest <= limit < longest:
        raise UserError(
            f"this model scales positions by the longest text of a batch from {limit} tokens on: texts of {shortest} "
            f"and of {longest} tokens would change each other; run them apart, or set max_length to {limit}"
        )
