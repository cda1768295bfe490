"""The last hidden states of a model: what its last linear map turns into logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loracurve.model.heads import OutputHead
from loracurve.model.routes import Route
from loracurve.model.trials import trial_tokens
from loracurve.system.errors import UserError
from loracurve.tasks.batching import Batch

__all__ = ["LastMap", "States"]


@dataclass(frozen=True)
class States:
    """Last hidden states of the E examples of a batch at n points, float32 (float64 for a float64 base)."""

    read: Tensor
    """[n, E, d], where the answer is read: at the last token of a prompt, at the place that a classifier pools from, at
    each token before a target (`lm`)"""
    choices: Tensor | None = None
    """[n, E, C, d], the mean over each choice's own scored tokens (`text`); 0 where there is no such choice"""

    def at(self, points: slice) -> States:
        """The same at some of the points."""
        return States(self.read[points], None if self.choices is None else self.choices[points])

    @classmethod
    def cat(cls, parts: Sequence[States]) -> States:
        """Join along the points."""
        choices = [part.choices for part in parts if part.choices is not None]
        return cls(torch.cat([part.read for part in parts]), torch.cat(choices) if choices else None)


class LastMap:
    """Finds the linear map whose outputs are a model's logits, and watches what it sees.

    Args:
        model: in evaluation mode, as the base alone; it is called once.
        route: turned on by `watched`; each pass leaves `seen`.

    Raises:
        UserError: no linear map gives the logits.
    """

    module: nn.Module
    scale: float | None
    """logits over the map's outputs; None where they are not proportional (soft-capping)"""

    def __init__(self, model: nn.Module, route: Route, device: torch.device) -> None:
        found: list[tuple[nn.Module, Tensor]] = []
        lm = [m for m in model.modules() if isinstance(m, OutputHead)]

        def note(module: nn.Module, _: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                found.append((module, output))

        hooks = [m.register_forward_hook(note) for m in lm or model.modules()]
        try:
            with torch.no_grad():
                logits = model(input_ids=trial_tokens(model, 2, 7, device)).logits
        finally:
            for hook in hooks:
                hook.remove()
        self.route, self.is_classifier = route, not lm
        if lm:
            ((self.module, output),) = found
            self.scale = _scale(output, logits)
        else:
            # A curve layer ends after the layer inside it.
            giving = [m for m, y in found if _holds(y, logits) and _is_linear(m)]
            if not giving:
                raise UserError(
                    f"{type(model).__name__}: its logits are not what one linear map gives, so nothing says which "
                    "hidden state they come from; Gaussians and familiarity need one"
                )
            self.module, self.scale = giving[-1], 1.0
        self.module.register_forward_hook(self._note)

    def _note(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not self.route.watched:
            return None
        if self.is_classifier and output.dim() == 3:
            output = _told_apart(output)
        self.route.seen = args[0], output
        return output

    def states(self, batch: Batch, logits: Tensor, replicas: int) -> States:
        """What was seen in the pass that gave these logits of a batch's replicas."""
        assert self.route.seen is not None
        seen, output = self.route.seen
        self.route.seen = None
        if self.is_classifier:
            if seen.dim() == 3:
                # Where its own output is the pooled one, whatever the model pools by.
                place = (output - logits[:, None].to(output.dtype)).abs().amax(-1).argmin(1)
                seen = seen[torch.arange(len(seen), device=seen.device), place]
            return States(_precise(seen).view(replicas, -1, seen.shape[-1]))
        flat = seen.reshape(replicas, -1, seen.shape[-1])
        if batch.state_positions is None:
            assert batch.positions is not None
            return States(_precise(flat[:, batch.positions]))
        assert batch.state_owners is not None and batch.choice_lengths is not None
        examples, width = batch.choice_lengths.shape
        owners, size = batch.state_owners, examples * (width + 1) + 1
        own = _precise(flat[:, batch.state_positions])
        total = own.new_zeros(replicas, size, own.shape[-1]).index_add(1, owners, own)
        count = own.new_zeros(size).index_add(0, owners, own.new_ones(len(owners)))
        mean = total / count.clamp_min(1)[:, None]
        choices, prompts = mean[:, : examples * width], mean[:, examples * width : -1]
        return States(prompts, choices.view(replicas, examples, width, -1))

    def rows(self, size: int, token_ids: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The map itself where the route lies, weight and bias [C, size + 1], found by what it gives for unit vectors.

        Args:
            size: n_in.
            token_ids: [C] outputs of a language-model head; None: all.
        """
        inputs = torch.cat(
            [torch.eye(size, dtype=dtype, device=device), torch.zeros(1, size, dtype=dtype, device=device)]
        )
        if not self.is_classifier:
            self.route.positions = self.route.position_rows = torch.arange(size + 1, device=device)
            self.route.token_ids = token_ids
            inputs = inputs[:, None]
        with torch.no_grad():
            found = self.module(inputs).reshape(size + 1, -1).double()
        bias = found[-1:]
        return torch.cat([found[:-1] - bias, bias]).mT * (1.0 if self.scale is None else self.scale)


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _is_linear(module: nn.Module) -> bool:
    layer: Any = getattr(module, "base_layer", module)
    return isinstance(layer, nn.Linear)


def _holds(output: Tensor, logits: Tensor) -> bool:
    """Whether an output is the logits, or has them at one of its places."""
    if output.dim() not in (2, 3) or output.shape[-1] != logits.shape[-1] or len(output) != len(logits):
        return False
    difference = (output.reshape(len(logits), -1, logits.shape[-1]) - logits[:, None]).abs().amax(-1)
    return bool((difference.amin(1) <= 1e-6 * logits.abs().max()).all())


def _told_apart(output: Tensor) -> Tensor:
    """Outputs [R, T, C] whose places differ where all were 0, by as much for every class.

    A head at coefficients of 0, which the untouched base has, gives 0 at every place, and nothing would say which of
    them the model pools. Its probabilities stay equal.
    """
    silent = ~output.flatten(1).any(1)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[output.element_size()]
    # Neighbouring floats: whole numbers from 257 on would be the same ones in bfloat16.
    one = torch.ones(output.shape[1], dtype=output.dtype, device=output.device)
    place = (one.view(bits) + torch.arange(len(one), dtype=bits, device=output.device)).view(output.dtype)
    return output + silent[:, None, None] * place[:, None]


def _scale(output: Tensor, logits: Tensor) -> float | None:
    """The number that all logits are over all outputs, if there is one."""
    y, z = output.double(), logits.double()
    scale = float((y * z).sum() / y.square().sum())
    half = output.dtype in (torch.bfloat16, torch.float16)
    return scale if bool((z - scale * y).abs().max() <= (1e-2 if half else 1e-5) * z.abs().max()) else None
