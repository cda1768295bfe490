"""A `transformers.Trainer` that fits a curve, for training scripts that exist already.

Change two lines of such a script: wrap the base by `CurveModel` instead of `peft.get_peft_model`, and use
`CurveTrainer` instead of `Trainer`. `loracurve.fit` does more: packing, perturbations, weight decay, CUDA
graphs.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput

from loracurve.curve.config import Sampling, check_sampling
from loracurve.curve.files import load_curve
from loracurve.curve.lora_space import column
from loracurve.curve.sampling import sample_points
from loracurve.inference.information import mixture_log_probs, negative_log_likelihood
from loracurve.model.attention import without_cudnn_attention
from loracurve.model.curve_model import CurveModel
from loracurve.system.errors import UserError
from loracurve.system.randomness import generator
from loracurve.tasks.encoding import UNLABELLED
from loracurve.training.config import ObjectiveConfig, resolve_tau
from loracurve.training.micro_batches import validation_points
from loracurve.training.objective import objective

__all__ = ["CurveTrainer"]


# Options of TrainingArguments that would be ignored or do something else here: what they must be, and what to do.
_FIXED = {
    "weight_decay": (0.0, "it would act on control points and not on points of the curve; use loracurve.fit"),
    "label_smoothing_factor": (0.0, "the loss is the likelihood"),
    "gradient_checkpointing": (False, "turn it on at the base, before that is wrapped"),
    "fp16": (False, "load the base in float16"),
    "bf16": (False, "load the base in bfloat16; control points stay float32"),
    "neftune_noise_alpha": (None, "noise on embeddings is not supported"),
}


class CurveTrainer(Trainer):
    """Minimises the mean negative log-likelihood at random points of a curve, drawn anew for each micro-batch.

    Evaluation and prediction are of the model average: logits are its log-probabilities, and `eval_loss` is its NLL in
    nats (of the averaged probabilities, not the points' mean NLL), put together as `Trainer` does: the mean over the
    labels of each batch, then over batches, weighted by their rows. That is the NLL per label where every row has as
    many; else a label counts more in a batch with few of them, and the figure depends on how rows are batched. Saving
    writes a curve folder, for `CurveModel.from_pretrained`, also into each checkpoint, from which
    `resume_from_checkpoint` goes on. Micro-batches count equally in accumulation, however many labels they have.

    Args:
        model: a causal language model or classifier with a curve in it; frozen control points stay as they are.
        args: as for `Trainer`.
        points: points of the curve at which each micro-batch is run.
        sampling: how they are drawn (`curve.sampling.sample_points`), but not arc-length.
        evaluation_points: points of the average, equally spaced.
        objective: a diversity term; None: none.
        options: whatever else `Trainer` takes: data sets, data collator, compute_metrics, callbacks, ...

    Raises:
        UserError: options that would do something else here, several GPUs in one process, a curve whose control points
            depend on each other (closed, one factor shared), evaluation points that are all anchors.
    """

    fixed: ClassVar[Mapping[str, tuple[Any, str]]] = _FIXED

    def __init__(
        self,
        model: CurveModel,
        args: TrainingArguments,
        *,
        points: int = 1,
        sampling: Sampling = "stratified",
        evaluation_points: int = 7,
        objective: ObjectiveConfig | None = None,
        **options: Any,
    ) -> None:
        check_sampling(sampling, points)
        if sampling == "arc-length":
            raise UserError("sampling: expected another than arc-length, which loracurve.fit has; use stratified")
        for name, (wanted, advice) in self.fixed.items():
            if getattr(args, name) != wanted:
                raise UserError(f"{name}: expected {wanted}, found {getattr(args, name)}; {advice}")
        if options.get("compute_loss_func") is not None:
            raise UserError("compute_loss_func: expected none, the loss is the likelihood at points of the curve")
        if args.n_gpu > 1:
            raise UserError(f"expected one GPU for each process, found {args.n_gpu}; start with torchrun or accelerate")
        if any(tie is not None for tie in model.dependences):
            raise UserError("expected control points that are free, found closed or shared ones; use loracurve.fit")
        super().__init__(model=self._inspected(model), args=args, **options)
        self.model = self.model_wrapped = self.callback_handler.model = model
        self.curve, self.points, self.sampling = model, points, sampling
        self.objective_config = objective or ObjectiveConfig()
        self.tau = resolve_tau(self.objective_config, None)
        self.grid, _ = validation_points(evaluation_points, model.spec)
        # What Trainer would find by looking at CurveModel.forward, which takes anything.
        self.label_names = ["labels"]
        self._signature_columns: Any = [*inspect.signature(model.model.forward).parameters, "label", "label_ids"]
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = False
        self._drawn = (-1, 0)
        # Trainer asks the model's config for these (the second one to align special tokens), which PEFT's don't have.
        vars(model.config)["to_json_string"] = lambda: json.dumps(model.config.to_dict(), default=sorted)
        base: Any = model.model
        vars(model.config)["get_text_config"] = base.config.get_text_config
        if not model.spec.mask.all():
            for factor in model.factors:
                mask = column(model.spec.mask, factor)
                factor.register_hook(lambda gradient, mask=mask: gradient * mask)

    def _inspected(self, model: CurveModel) -> nn.Module:
        """The model as the Trainer above this one wants to see it while it is set up."""
        return model

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective at freshly drawn points while training, else the NLL of the average over the grid."""
        if inputs.get("labels") is None:
            raise UserError("expected labels in every batch, found none; use a data collator that makes them")
        log_probs = self._log_probs(model, inputs, self._draw() if model.training else self.grid)
        labels = inputs["labels"]
        if self.curve.is_classifier:
            rows = log_probs
        else:
            rows, labels = log_probs[:, :, :-1].flatten(1, 2), labels[:, 1:].flatten()
        if model.training:
            loss, _ = objective(rows, labels, self.objective_config, tau=self.tau)
            return (loss, CausalLMOutput(loss=loss, logits=log_probs)) if return_outputs else loss
        known = labels != UNLABELLED
        loss = negative_log_likelihood(mixture_log_probs(rows[:, known]), labels[known]).mean()
        return (loss, CausalLMOutput(loss=loss, logits=mixture_log_probs(log_probs))) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As `Trainer`'s, with attention kernels whose gradients are finite."""
        with without_cudnn_attention():
            loss: Tensor = super().training_step(*args, **kwargs)
        return loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """As `Trainer`'s; without labels the average's log-probabilities alone."""
        if inputs.get("labels") is not None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with torch.no_grad():
            average = mixture_log_probs(self._log_probs(model, self._prepare_inputs(inputs), self.grid))
        return None, None if prediction_loss_only else average, None

    def _log_probs(self, model: nn.Module, inputs: dict[str, Any], t: Tensor) -> Tensor:
        """[n, N, C], of language models [n, N, T, V], float32."""
        without = {name: value for name, value in inputs.items() if name != "labels"}
        if not self.curve.is_classifier:
            without["use_cache"] = False
        return model(t=t, **without).logits.float().log_softmax(-1).unflatten(0, (len(t), -1))

    def _draw(self) -> Tensor:
        """Points of this micro-batch, a function of seed, step, micro-batch and process."""
        step = self.state.global_step
        self._drawn = (step, self._drawn[1] + 1 if self._drawn[0] == step else 0)
        draw = generator(self.args.seed, "trainer", *self._drawn, self.args.process_index)
        return sample_points((self.points,), self.sampling, draw)

    # ---- saving and resuming: the curve instead of the whole model

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        self.curve.save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        _, spec, points = load_curve(resume_from_checkpoint)
        if spec != self.curve.spec:
            raise UserError(f"{resume_from_checkpoint}: expected a curve of the same shape, found {spec}")
        self.curve.copy_points(points)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))
