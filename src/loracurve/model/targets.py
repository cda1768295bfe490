"""Which modules of a model a LoRA config means, by their names: PEFT's rules, with a bound on what patterns cost."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

import peft
import regex
from torch import nn

from loracurve.model.declared import numbers_of_experts
from loracurve.system.errors import UserError, one_line

__all__ = ["named_targets"]

logger = logging.getLogger("loracurve")

ALL_LINEAR = "all-linear"

# Of matching one pattern with one name; patterns that people write take microseconds.
SECONDS = 2.0

_PLAIN = re.compile(r"[\w.\-]+")


def named_targets(config: peft.LoraConfig, model: nn.Module) -> peft.LoraConfig:
    """A copy of a config whose patterns are spelt out as the names of this model's modules, so that nobody matches them
    again: PEFT would for as long as they take, and other programs that read adapters know no patterns.

    `all-linear` stays a word unless layers are chosen or the model mixes experts, whose routers and fused weights are
    left out then, as the field does.

    Raises:
        UserError: a pattern that is none, or that takes for ever.
    """
    out = copy.deepcopy(config)
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(out.target_modules, str):
        if out.target_modules.lower() == ALL_LINEAR:
            _spell_out_all_linear(out, model)
        else:
            out.target_modules = _matching(out.target_modules, names, "target_modules")
    if isinstance(out.exclude_modules, str):
        out.exclude_modules = _matching(out.exclude_modules, names, "exclude_modules")
    out.rank_pattern = _by_name(out.rank_pattern or {}, names, "rank_pattern")
    out.alpha_pattern = _by_name(out.alpha_pattern or {}, names, "alpha_pattern")
    return out


def _spell_out_all_linear(config: peft.LoraConfig, model: nn.Module) -> None:
    sizes = numbers_of_experts(model.config)
    if not sizes and config.layers_to_transform is None:
        return
    find_head: Any = getattr(model, "get_output_embeddings", None)
    head = None if find_head is None else find_head()
    linear = {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and module is not head
    }
    classifier = config.task_type == peft.TaskType.SEQ_CLS
    routers = [n for n, m in linear.items() if sizes and getattr(m, "out_features", None) in {1, *sizes}]
    chosen = [n for n in linear if n not in routers and not (classifier and n in ("score", "classifier"))]
    if config.layers_to_transform is not None:
        wanted = config.layers_to_transform
        layers = {wanted} if isinstance(wanted, int) else set(wanted)
        chosen = [n for n in chosen if (found := re.search(r"\.(\d+)\.", n)) and int(found[1]) in layers]
        config.layers_to_transform = None
    if sizes:
        fused = [n for n, m in model.named_modules() if any(p.dim() == 3 for p in m.parameters(recurse=False))]
        logger.info(
            "all-linear: routers and fused experts stay as they are (%s, ...)", (fused + routers or ["none"])[0]
        )
    config.target_modules = chosen


def _matching(pattern: str, names: Iterable[str], option: str) -> list[str]:
    compiled = _compiled(pattern, option)
    found = [name for name in names if _match(compiled, name, option)]
    if not found:
        raise UserError(
            f"{option}: expected a regular expression that fits whole names of this model's modules, found "
            f"{pattern[:80]!r}, which fits none"
        )
    return found


def _by_name(values: Mapping[str, Any], names: Iterable[str], option: str) -> dict[str, Any]:
    """A pattern table of PEFT with a pattern for each name of a module, where its keys are more than names."""
    if all(_PLAIN.fullmatch(key) for key in values):
        return dict(values)
    compiled = {key: _compiled(rf"(.*\.)?({key})$", option) for key in values}
    found = {}
    for name in names:
        key = next((key for key, pattern in compiled.items() if _match(pattern, name, option)), None)
        if key is not None:
            found[re.escape(name)] = values[key]
    return found


def _compiled(pattern: str, option: str) -> Any:
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise UserError(
            f"{option}: expected a regular expression, found {pattern[:80]!r} ({one_line(error)})"
        ) from None


def _match(compiled: Any, name: str, option: str) -> bool:
    try:
        return compiled.fullmatch(name, timeout=SECONDS) is not None
    except TimeoutError:
        raise UserError(
            f"{option}: expected a regular expression that can be matched, found {compiled.pattern[:80]!r}, which "
            f"takes more than {SECONDS:g} s for {name}; name the modules in a list"
        ) from None
