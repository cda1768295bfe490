"""The model as PEFT has it, sharing the frozen weights, for libraries that look for ordinary linear layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import peft
import torch
from torch import Tensor, nn

from loracurve.errors import UserError
from loracurve.layers import CurveLayer, OutputHead
from loracurve.model import CurveModel
from loracurve.replication import Replication
from loracurve.tasks import Encoded, Example

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
    wrapped = peft.get_peft_model(plain, config)  # type: ignore[arg-type]
    peft.set_peft_model_state_dict(wrapped, dict(adapter))
    return wrapped.eval()


class AnswerHead(nn.Module):
    """A language-model head for a prompt's last token and the answer tokens only: [1, T, n_in] -> [1, C].

    The other rows of an adapted head change no probability of an answer.

    Args:
        head: the head, adapted by PEFT or not.
        ids: the answer tokens.
    """

    def __init__(self, head: nn.Module, ids: list[int]) -> None:
        super().__init__()
        base = head.get_base_layer() if isinstance(head, peft.tuners.lora.Linear) else head
        self.register_buffer("rows", base.weight.detach()[ids])
        self.register_buffer("bias", None if base.bias is None else base.bias.detach()[ids])
        self.scaling = 0.0
        if isinstance(head, peft.tuners.lora.Linear):
            (name,) = head.lora_A
            self.scaling, self.lora_A = head.scaling[name], head.lora_A[name]
            up = head.lora_B[name].weight.detach()[ids]
            self.lora_B = nn.Linear(up.shape[1], len(ids), bias=False, device=up.device, dtype=up.dtype)
            self.lora_B.weight.data.copy_(up)

    def forward(self, hidden: Tensor) -> Tensor:
        last = hidden[:, -1]
        y = nn.functional.linear(last, self.rows, self.bias)
        return y + self.scaling * self.lora_B(self.lora_A(last.to(self.lora_A.weight.dtype))) if self.scaling else y

    def merged(self) -> nn.Linear:
        """The same as one linear map of the last hidden state, float32."""
        weight = self.rows.float()
        if self.scaling:
            weight = weight + self.scaling * (self.lora_B.weight @ self.lora_A.weight).detach().float()
        return _linear(weight, self.bias)


class ClassLogits(nn.Module):
    """Class logits of single examples: a dict with `input_ids` [1, T] in, [1, C] float32 out.

    An example with fewer choices than classes gives fewer logits.

    Args:
        model, adapter: see `peft_model`.
        encoded: a split of the task, for its scoring and answer tokens.

    Raises:
        UserError: a way of scoring that has no logits of classes.
    """

    def __init__(self, model: CurveModel, adapter: Mapping[str, Tensor], encoded: Encoded) -> None:
        super().__init__()
        if encoded.scoring not in ("answer", "head"):
            raise UserError("expected scoring letter, label or head, which have class logits, found another; change it")
        # Libraries take dtype and device from a module's first parameter, which may be a bfloat16 base weight.
        self.first = nn.Parameter(torch.zeros(0, device=model.device), requires_grad=False)
        self.peft = peft_model(model, adapter)
        base = self.peft.get_base_model()
        self.last: nn.Module
        if encoded.scoring == "answer":
            assert encoded.answer_ids is not None
            head = base.get_output_embeddings()
            name = next(n for n, m in base.named_modules() if m is head)
            self.last = AnswerHead(head, list(encoded.answer_ids))
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, self.last)
        else:
            saved = [m for n, m in base.named_modules() if ".modules_to_save." in n and isinstance(m, nn.Linear)]
            self.last = saved[-1]
        self._seen: Tensor | None = None
        self.last.register_forward_pre_hook(self._see)

    def _see(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._seen = args[0]

    def inputs(self, example: Example) -> dict[str, Tensor]:
        """An example as this module takes it; `labels` [1] is there where the example has one."""
        device = self.first.device
        out = {"input_ids": torch.tensor([example.prompt], device=device)}
        if example.token_types is not None:
            out["token_type_ids"] = torch.tensor([example.token_types], device=device)
        if example.label is not None:
            out["labels"] = torch.tensor([example.label], device=device)
        out["choices"] = torch.tensor(example.n_choices)
        return out

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        given = {k: v for k, v in inputs.items() if k in ("input_ids", "token_type_ids")}
        logits = self.peft(**given, **({"use_cache": False} if isinstance(self.last, AnswerHead) else {})).logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32))[:, : int(inputs["choices"]) or None]

    def features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """What the last linear map sees, [1, n_in] float32."""
        with torch.no_grad():
            self(inputs)
        assert self._seen is not None
        seen = self._seen[:, -1] if isinstance(self.last, AnswerHead) else self._seen
        return seen.detach().float()

    def last_linear(self) -> nn.Linear:
        """A float32 copy of the last linear map, of the answer tokens' rows for a language model."""
        if isinstance(self.last, AnswerHead):
            return self.last.merged()
        assert isinstance(self.last, nn.Linear)
        return _linear(self.last.weight.detach().float(), self.last.bias)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device=weight.device, dtype=weight.dtype)
    linear.weight.data.copy_(weight)
    if bias is not None:
        linear.bias.data.copy_(bias.detach())
    return linear
