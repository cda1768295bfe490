"""TRL's `SFTTrainer` that fits a curve, for fine-tuning scripts that exist already.

Give it a `CurveModel` instead of a model and a `peft_config`, and use `CurveSFTTrainer` instead of `SFTTrainer`. Data
sets (text, conversations, prompts with completions), chat templates, truncation and collation are TRL's; loss,
evaluation and saving are those of `training.trainer.CurveTrainer`: `eval_loss` too is what it says there, a mean over
batches weighted by rows, as TRL's own.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from loracurve.model.curve_model import CurveModel
from loracurve.system.errors import UserError
from loracurve.training.trainer import CurveTrainer

__all__ = ["CurveSFTTrainer"]


try:
    from trl import SFTConfig, SFTTrainer
except ImportError as error:
    raise UserError("loracurve.training.sft needs the package trl, found none; pip install 'loracurve[trl]'") from error


class CurveSFTTrainer(CurveTrainer, SFTTrainer):
    """As `CurveTrainer`, on data as `SFTTrainer` takes them.

    SFTConfig's own defaults ask for mixed precision and activation checkpointing, which curves have otherwise: say
    `bf16=False, gradient_checkpointing=False`.

    Args:
        model: a causal language model with a curve in it.
        args: a `trl.SFTConfig`.
        options: as for `CurveTrainer`, and what `SFTTrainer` takes beside `peft_config`. The `processing_class` is
            needed.

    Raises:
        UserError: as `CurveTrainer`; packing without padding, another loss, a `peft_config`, no tokenizer.
    """

    fixed = {
        **CurveTrainer.fixed,
        "loss_type": ("nll", "the loss is the likelihood"),
        "padding_free": (False, "points of a curve are run as further rows of a batch"),
        "activation_offloading": (False, "it is not supported"),
        "use_liger_kernel": (False, "it is not supported"),
        "chat_template_path": (None, "set the tokenizer's chat_template before the model is wrapped"),
    }

    def __init__(self, model: CurveModel, args: SFTConfig, **options: Any) -> None:
        if model.is_classifier:
            raise UserError("expected a causal language model, found a classifier; use CurveTrainer")
        if args.packing and args.packing_strategy != "wrapped":
            raise UserError(
                f"packing_strategy: expected wrapped, found {args.packing_strategy}, which runs without padding"
            )
        if options.get("peft_config") is not None:
            raise UserError("peft_config: expected none, found one; give it to CurveModel.from_config instead")
        if options.get("processing_class") is None:
            raise UserError("processing_class: expected the model's tokenizer, found none")
        base = model.model
        forward = vars(base).get("forward")
        super().__init__(model, args, **options)
        # SFTTrainer has put a forward that leaves out the head over the base's; curves need the logits.
        if forward is None:
            vars(base).pop("forward", None)
        else:
            vars(base)["forward"] = forward

    def _inspected(self, model: CurveModel) -> nn.Module:
        return model.model

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write none: TRL's card describes a model for pipelines. `CurveModel.push_to_hub` writes that of a curve."""
