"""Plain transformers with plain PEFT, one unpadded row at a time: what the library has to be equal to."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conformance.families import Family
from loracurve.tasks.encoding import Encoded, Example

GROWN = 2
"""tokens that a grown vocabulary has more than the base's checkpoint"""


def adapter_config(family: Family, base: nn.Module, kind: str) -> peft.LoraConfig:
    """The adapter of one kind that a user would ask PEFT for."""
    task = peft.TaskType.CAUSAL_LM if family.kind == "causal" else peft.TaskType.SEQ_CLS
    options: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": family.targets, "task_type": task}
    if kind == "patterns":
        found = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options))
        leaves = sorted({n.rpartition(".")[2] for n, m in found.named_modules() if isinstance(m, LoraLayer)})
        options |= {"rank_pattern": {leaves[0]: 2}, "alpha_pattern": {leaves[-1]: 16}}
    elif kind == "rslora":
        options["use_rslora"] = True
    elif kind == "saved":
        options["modules_to_save"] = [family.saved or head_name(base)]
    elif kind == "dora":
        options["use_dora"] = True
    return peft.LoraConfig(**options)


def head_name(base: nn.Module) -> str:
    """The last part of the output layer's name."""
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    for name, module in base.named_modules():
        if module is head or (head is None and name in ("score", "classifier")):
            return name.rpartition(".")[2]
    return [name for name, _ in base.named_children()][-1]


def make_adapters(family: Family, base: nn.Module, kind: str, folder: Path) -> list[Path]:
    """Three adapters as PEFT saves them: two of random factors and, last, their average."""
    made = []
    config = adapter_config(family, base, kind)
    for seed in range(2):
        torch.manual_seed(seed)
        model = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.15)
            elif parameter.requires_grad and "lora_" not in name:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder / str(seed), save_embedding_layers=True if kind == "grown" else "auto")
        made.append(folder / str(seed))
    shutil.copytree(made[0], folder / "mean")
    one, other = (load_file(path / "adapter_model.safetensors") for path in made)
    mean = {name: (tensor + other[name]) / 2 for name, tensor in one.items()}
    save_file(mean, folder / "mean" / "adapter_model.safetensors", metadata={"format": "pt"})
    return [made[0], folder / "mean", made[1]]


def with_adapter(base: nn.Module, folder: Path) -> peft.PeftModel:
    """A copy of the base with an adapter, by PEFT alone, in evaluation mode and the base's precision."""
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()


@torch.no_grad()
def logits(model: nn.Module, ids: Sequence[int], types: Sequence[int] | None = None) -> Tensor:
    """[T, V], or [C] of a classifier."""
    inputs = {"input_ids": torch.tensor([list(ids)])}
    if types is not None:
        inputs["token_type_ids"] = torch.tensor([list(types)])
    return model(**inputs).logits[0].double()


def continuation(model: nn.Module, example: Example, choice: Sequence[int]) -> Tensor:
    """[n] log-probabilities of a choice's tokens behind the prompt."""
    ids = [*example.prompt, *choice]
    log_probs = logits(model, ids[:-1]).log_softmax(-1)
    start = len(example.prompt) - 1
    return log_probs[start:].gather(-1, torch.tensor(choice)[:, None])[:, 0]


def log_probs(model: nn.Module, encoded: Encoded, window: int | None = None) -> Tensor:
    """What a prediction of each example has to be: [E, C], -inf where a choice is not there; of language modelling
    [tokens, 1], the log-probability of each target token."""
    if encoded.scoring == "head":
        return torch.stack([logits(model, e.prompt, e.token_types) for e in encoded.examples]).log_softmax(-1)
    if encoded.scoring == "answer":
        assert encoded.answer_ids is not None
        out = torch.full((len(encoded), len(encoded.answer_ids)), -torch.inf, dtype=torch.float64)
        for row, example in zip(out, encoded.examples, strict=True):
            count = example.n_choices or len(encoded.answer_ids)
            row[:count] = logits(model, example.prompt)[-1, list(encoded.answer_ids)[:count]]
        return out.log_softmax(-1)
    if encoded.scoring == "text":
        out = torch.full((len(encoded), encoded.most_choices), -torch.inf, dtype=torch.float64)
        for row, example in zip(out, encoded.examples, strict=True):
            for c, choice in enumerate(example.choices):
                row[c] = continuation(model, example, choice).sum()
        return out.log_softmax(-1)
    return torch.cat([continuation(model, e, e.choices[0]) for e in encoded.examples])[:, None]


@torch.no_grad()
def greedy(model: nn.Module, ids: Sequence[int], new: int) -> list[tuple[int, float]]:
    """Tokens and log-probabilities of greedy decoding, the whole text again at each token."""
    text, out = list(ids), []
    for _ in range(new):
        last = logits(model, text)[-1].log_softmax(-1)
        token = int(last.argmax())
        out.append((token, float(last[token])))
        text.append(token)
    return out
