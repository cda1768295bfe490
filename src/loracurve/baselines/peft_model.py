"""The model as PEFT has it, sharing the frozen weights, for libraries that look for ordinary linear layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from loracurve.model.curve_model import CurveModel
from loracurve.model.heads import OutputHead
from loracurve.model.layers import CurveLayer
from loracurve.model.replication import Replication
from loracurve.model.scoring import class_scores
from loracurve.system.errors import UserError
from loracurve.tasks.batching import Batch, collate, tree_mask
from loracurve.tasks.encoding import Encoded

__all__ = ["AnswerHead", "ClassLogits", "peft_model"]


def peft_model(model: CurveModel, adapter: Mapping[str, Tensor]) -> peft.PeftModel:
    """A PEFT model with one adapter (by PEFT name) on the same base; base weights are shared, not copied."""
    kept = {id(t): t for t in (*model.model.parameters(), *model.model.buffers())}
    plain = copy.deepcopy(model.model, kept)
    for module in list(plain.modules()):
        for name, child in list(module.named_children()):
            while isinstance(child, (CurveLayer, OutputHead)):
                child = child.base_layer if isinstance(child, CurveLayer) else child.inner
            setattr(module, name, child)
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(getattr(hook, "__self__", None), Replication):
                del module._forward_pre_hooks[key]
    if hasattr(plain, "peft_config"):
        del plain.peft_config  # left by PEFT's target matching
    config = copy.deepcopy(model.config)
    config.inference_mode = False
    config.base_model_name_or_path = None  # PEFT would warn of the shared model, which has no name of its own
    wrapped: Any = peft.get_peft_model(plain, config)
    peft.set_peft_model_state_dict(wrapped, dict(adapter))
    wrapped.eval()
    return wrapped


class AnswerHead(nn.Module):
    """A language-model head at chosen positions and for the answer tokens only: [1, T, n_in] -> [1, P, C].

    The other rows of an adapted head change no probability of an answer and are frozen.

    Args:
        head: the head, adapted by PEFT or not.
        ids: the answer tokens; None: all tokens.
    """

    positions: Tensor
    """[P], set before each call"""
    further: Tensor
    """answer tokens of this call beyond `ids`, set before each call: rows may have more choices than any in training"""
    weight: Tensor
    bias: Tensor | None
    ids: Tensor
    frozen: Tensor
    lora_A: nn.Linear
    lora_B: nn.Linear

    def __init__(self, head: Any, ids: list[int] | None) -> None:
        super().__init__()
        chosen = slice(None) if ids is None else ids
        adapted: bool = isinstance(head, LoraLayer)
        base = head.get_base_layer() if adapted else head
        self.register_buffer("weight", base.weight.detach())
        self.register_buffer("bias", None if base.bias is None else base.bias.detach())
        size = len(base.weight)
        self.register_buffer("ids", torch.arange(size, device=base.weight.device)[chosen])
        self.further = self.ids[:0]
        self.scaling = 0.0
        if adapted:
            (name,) = head.lora_A
            self.scaling, self.lora_A = head.scaling[name], head.lora_A[name]
            self.register_buffer("frozen", head.lora_B[name].weight.detach())
            up = self.frozen[chosen]
            self.lora_B = nn.Linear(up.shape[1], len(up), bias=False, device=up.device, dtype=up.dtype)
            self.lora_B.weight.data.copy_(up)

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden[:, self.positions]
        ids = torch.cat([self.ids, self.further])
        # All rows in order are the weight itself: no copy of the vocabulary.
        rows = self.weight if len(ids) == len(self.weight) else self.weight[ids]
        y = nn.functional.linear(x, rows, None if self.bias is None else self.bias[ids])
        if not self.scaling:
            return y
        low = self.lora_A(x.to(self.lora_A.weight.dtype))
        return y + self.scaling * torch.cat([self.lora_B(low), low @ self.frozen[self.further].mT], -1)

    def merged(self, ids: Tensor) -> nn.Linear:
        """The head at tokens `ids` as one linear map of the last hidden state, float32."""
        weight = self.weight[ids].float()
        if self.scaling:
            weight = weight + self.scaling * (self.frozen[ids] @ self.lora_A.weight).detach().float()
        return _linear(weight, None if self.bias is None else self.bias[ids])


class ClassLogits(nn.Module):
    """Class scores of single examples: a dict with `input_ids` [1, T] in, [1, C] float32 out.

    An example with fewer choices than classes gives fewer. The texts of choices lie in one row behind their prompt.

    Args:
        model, adapter: see `peft_model`.
        encoded: a split of the task, for its scoring and answer tokens.

    Raises:
        UserError: language modelling; texts of choices with an adapted head, whose curvature would be of the size of
            the vocabulary squared, or with a model that takes no 4-D masks.
    """

    def __init__(self, model: CurveModel, adapter: Mapping[str, Tensor], encoded: Encoded) -> None:
        super().__init__()
        if encoded.scoring == "lm":
            raise UserError("expected a task with classes, found language modelling; choose another")
        if encoded.scoring == "text" and not model.runner.takes_trees(encoded):
            raise UserError("expected a model that takes 4-D masks for scoring text, found none; score letters")
        # Libraries take dtype and device from a module's first parameter, which may be a bfloat16 base weight.
        self.first = nn.Parameter(torch.zeros(0, device=model.device), requires_grad=False)
        self.dtype = model.dtype
        self.peft = peft_model(model, adapter)
        base: Any = self.peft.get_base_model()
        self.last: nn.Module
        if encoded.scoring != "head":
            head = base.get_output_embeddings()
            if encoded.scoring == "text" and isinstance(head, LoraLayer):
                raise UserError("expected no adapter on lm_head with scoring text, found one; take it from the targets")
            name = next(n for n, m in base.named_modules() if m is head)
            self.last = AnswerHead(head, None if encoded.answer_ids is None else list(encoded.answer_ids))
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, self.last)
        else:
            saved = [m for n, m in base.named_modules() if ".modules_to_save." in n and isinstance(m, nn.Linear)]
            self.last = saved[-1]
        self._seen: Tensor | None = None
        self.last.register_forward_pre_hook(self._see)

    def _see(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._seen = args[0]

    def inputs(self, encoded: Encoded, number: int) -> dict[str, Any]:
        """An example of a split as this module takes it."""
        batch = collate(encoded, [number]).to(self.first.device)
        choices = encoded.examples[number].n_choices or len(encoded.classes)
        return {"input_ids": batch.input_ids, "labels": batch.labels, "batch": batch, "choices": choices}

    def forward(self, inputs: Mapping[str, Any]) -> Tensor:
        batch: Batch = inputs["batch"]
        given: dict[str, Any] = {"input_ids": batch.input_ids}
        if batch.token_type_ids is not None:
            given["token_type_ids"] = batch.token_type_ids
        if isinstance(self.last, AnswerHead):
            assert batch.positions is not None
            self.last.positions, given["use_cache"] = batch.positions, False
            self.last.further = self.further(batch)
        if batch.ends is not None:
            given |= {"attention_mask": tree_mask(batch.ends, self.dtype), "position_ids": batch.position_ids}
        logits = self.peft(**given).logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return class_scores(batch, logits.view(1, -1, logits.shape[-1]))[0, :, : inputs["choices"]]

    def further(self, batch: Batch) -> Tensor:
        """The answer tokens of a batch beyond those of training, which come first in both."""
        assert isinstance(self.last, AnswerHead)
        if batch.answer_ids is None:
            return self.last.ids[:0]
        known = len(self.last.ids)
        if not torch.equal(batch.answer_ids[:known], self.last.ids):
            raise UserError("expected the answer tokens of training, found others; put the rows into the task's prompt")
        return batch.answer_ids[known:]

    def features(self, inputs: Mapping[str, Any]) -> Tensor:
        """What the last linear map sees, [1, n_in] float32; not for texts of choices, which are read at many places."""
        with torch.no_grad():
            self(inputs)
        assert self._seen is not None
        seen = self._seen[:, self.last.positions[0]] if isinstance(self.last, AnswerHead) else self._seen
        return seen.detach().float()

    def last_linear(self) -> nn.Linear:
        """A float32 copy of the last linear map, of the answer tokens' rows for a language model."""
        if isinstance(self.last, AnswerHead):
            return self.last.merged(self.last.ids)
        assert isinstance(self.last, nn.Linear)
        return _linear(self.last.weight.detach().float(), self.last.bias)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device=weight.device, dtype=weight.dtype)
    linear.weight.data.copy_(weight)
    if bias is not None:
        linear.bias.data.copy_(bias.detach())
    return linear
