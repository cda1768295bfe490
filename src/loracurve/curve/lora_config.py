"""Which LoRA options a curve can have."""

from __future__ import annotations

import math
import re

import peft

from loracurve.system.errors import UserError

__all__ = ["check_config", "trained_init"]


MOST_RANK = 2**16

# Options of peft.LoraConfig that change the map itself, so that (A, B) alone would not describe the adapter.
_UNSUPPORTED = {
    "use_dora": False,
    "lora_bias": False,
    "use_qalora": False,
    "target_parameters": None,
    "trainable_token_indices": None,
    "layer_replication": None,
    "megatron_config": None,
    "alora_invocation_tokens": None,
    "use_bdlora": None,
    "arrow_config": None,
    "monteclora_config": None,
    "velora_config": None,
    "kasa_config": None,
}


def check_config(config: peft.PeftConfig) -> None:
    """Refuse adapter kinds whose parameters are not plain (A, B) pairs and dense heads; raises UserError."""
    if not isinstance(config, peft.LoraConfig) or config.peft_type != peft.PeftType.LORA:  # AdaLoRA's is derived
        raise UserError(f"expected a LoRA adapter, found PEFT type {config.peft_type}; use peft.LoraConfig")
    for option, plain in _UNSUPPORTED.items():
        if getattr(config, option, plain) not in (plain, None, False, {}, []):
            raise UserError(f"LoRA option {option} is not supported on curves; leave it at {plain}")
    _check_types(config)
    if config.bias != "none":
        raise UserError(f"LoRA option bias={config.bias!r} is not supported on curves; use bias='none'")
    if config.init_lora_weights not in (True, "gaussian"):
        raise UserError(
            f"init_lora_weights={config.init_lora_weights!r} is not supported: curves draw A at random and start B "
            "at 0; use True or 'gaussian'"
        )


# Ways to start that leave the base's weights as they are. The others (pissa, olora, corda, loftq, ...) take from the
# base what they put into the adapter, so that an adapter saved with their name needs a base that no checkpoint holds.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def trained_init(init: bool | str | None) -> bool | str:
    """What `init_lora_weights` of a trained adapter means for a curve through it: how *new* control points are drawn.

    Raises:
        UserError: the adapter was started in a way that changes the base's weights.
    """
    if init not in _PLAIN_INITS:
        raise UserError(
            f"init_lora_weights={init!r} changes the base's weights, which the adapter folder lacks; save it as a "
            "plain adapter (PEFT's path_initial_model_for_weight_conversion)"
        )
    return init if init == "gaussian" else True


def _check_types(config: peft.LoraConfig) -> None:
    """PEFT takes any value and stumbles over it later."""

    def words(value: object) -> bool:
        return isinstance(value, str) or (isinstance(value, list | set) and all(isinstance(v, str) for v in value))

    def plain(value: object) -> bool:  # PEFT takes these for patterns
        return words(value) and all(re.fullmatch(r"[\w.-]+", v) for v in ([value] if isinstance(value, str) else value))  # type: ignore[attr-defined]

    def number(value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    def rank(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_RANK

    def layers(value: object) -> bool:
        listed = value if isinstance(value, list) else [value]
        return all(isinstance(v, int) and 0 <= v < 100_000 for v in listed)

    sound = {
        "r": rank(config.r),
        "lora_alpha": number(config.lora_alpha),
        "lora_dropout": number(config.lora_dropout) and 0 <= config.lora_dropout < 1,
        "use_rslora": isinstance(config.use_rslora, bool),
        "fan_in_fan_out": isinstance(config.fan_in_fan_out, bool),
        "target_modules": config.target_modules is None or words(config.target_modules),
        "exclude_modules": config.exclude_modules is None or words(config.exclude_modules),
        "modules_to_save": config.modules_to_save is None
        or (not isinstance(config.modules_to_save, str) and plain(config.modules_to_save)),
        "layers_to_transform": config.layers_to_transform is None or layers(config.layers_to_transform),
        "layers_pattern": config.layers_pattern is None or plain(config.layers_pattern),
        "rank_pattern": isinstance(config.rank_pattern, dict) and all(map(rank, config.rank_pattern.values())),
        "alpha_pattern": isinstance(config.alpha_pattern, dict) and all(map(number, config.alpha_pattern.values())),
        "base_model_name_or_path": isinstance(config.base_model_name_or_path, str | None),
    }
    for option, fine in sound.items():
        if not fine:
            found = repr(getattr(config, option))
            raise UserError(f"LoRA option {option}: expected a value of LoRA's, found {found[:80]}")
