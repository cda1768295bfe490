"""From logits to class scores, and whether a model can score packed rows at all."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loracurve.tasks.batching import Batch, tree_mask

__all__ = ["class_scores", "takes_tree_masks"]


def class_scores(batch: Batch, logits: Tensor) -> Tensor:
    """[n, P, V or C] read-outs -> [n, E, C] class scores, by the batch's way of scoring."""
    if batch.scoring == "answer":
        if batch.choice_mask is not None:
            logits = logits.masked_fill(~batch.choice_mask, -torch.inf)
        return logits
    if batch.scoring == "text":
        assert batch.targets is not None and batch.owner is not None and batch.choice_lengths is not None
        n, p, _ = logits.shape
        chosen = logits.gather(-1, batch.targets.expand(n, p)[..., None])[..., 0] - logits.logsumexp(-1)
        size = batch.choice_lengths.numel()
        total = chosen.new_zeros(n, size + 1).index_add(1, batch.owner, chosen)[:, :size]
        total = total.view(n, *batch.choice_lengths.shape)
        if batch.normalise == "mean":
            total = total / batch.choice_lengths.clamp_min(1)
        return total.masked_fill(batch.choice_lengths == 0, -torch.inf)
    return logits


@torch.no_grad()
def takes_tree_masks(model: nn.Module, dtype: torch.dtype, device: torch.device) -> bool:
    """Try a small packed row: whether branches behind one prefix score as the branches do alone.

    In half precision deep models differ from themselves by more than any fixed bound, so there the difference is held
    against the one that a row without the mask makes.

    Args:
        model: a causal language model in evaluation mode; it is called as it stands.
    """
    config = model.config
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or [])
    if sliding or getattr(config, "is_encoder_decoder", False):
        return False
    row = torch.tensor([[1, 2, 3, 4, 5, 6, 7]], device=device)
    places = torch.tensor([[0, 1, 2, 3, 4, 3, 4]], device=device)

    def branches(ends: list[int]) -> Tensor:
        mask = tree_mask(torch.tensor([ends], device=device), dtype)
        logits = model(input_ids=row, attention_mask=mask, position_ids=places, use_cache=False).logits
        return logits[0, [4, 6]].float()

    try:
        tree, chain = branches([7, 7, 7, 5, 5, 7, 7]), branches([7] * 7)
        apart = model(input_ids=row[0, [[0, 1, 2, 3, 4], [0, 1, 2, 5, 6]]], use_cache=False).logits[:, -1].float()
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    if dtype in (torch.bfloat16, torch.float16):
        return bool((tree - apart)[1].norm() < 0.25 * (chain - apart)[1].norm())  # the second branch sees the first
    return bool((tree - apart).abs().max() < 1e-3 * apart.std().clamp_min(1e-6))
