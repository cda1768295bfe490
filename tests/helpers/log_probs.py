"""Random and one-hot log-probabilities."""

from __future__ import annotations

import math

import torch


def drawn_log_probs(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)


def random_log_probs(*shape, seed=0, absent=False):
    logits = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if absent:
        logits[..., 0, -1] = -math.inf
    return logits.log_softmax(-1)


def one_hot(*classes, size=3):
    return torch.nn.functional.one_hot(torch.tensor(classes), size).double().log()
