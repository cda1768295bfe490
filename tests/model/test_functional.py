"""Products and casts with gradients of their own."""

from __future__ import annotations

import torch

from loracurve.model.functional import cast_together, grouped_linear


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def test_gradients_through_a_common_cast_are_those_of_each_cast() -> None:
    leaves = [drawn(3, 4, 5).requires_grad_(), drawn(3, 4, 7).requires_grad_(), drawn(2, 2).requires_grad_()]
    copies = cast_together(leaves, torch.bfloat16)
    assert all(torch.equal(c, p.bfloat16()) for c, p in zip(copies, leaves, strict=True))
    loss = (copies[0].float() ** 2).sum() + copies[1].mT.float().cumsum(1).sum()  # the third is not read
    loss.backward()
    expected = [p.detach().clone().requires_grad_() for p in leaves]
    (expected[0].bfloat16().float() ** 2).sum().backward()
    expected[1].bfloat16().mT.float().cumsum(1).sum().backward()
    assert leaves[2].grad is None
    for p, q in zip(leaves[:2], expected[:2], strict=True):
        assert p.grad is not None and torch.equal(p.grad, q.grad) and p.grad.is_contiguous()  # type: ignore[arg-type]


def test_a_grouped_map_and_its_gradients_are_those_of_products() -> None:
    x, a = drawn(3, 6, 5).double().requires_grad_(), drawn(3, 2, 5).double().requires_grad_()
    assert torch.equal(grouped_linear(x, a), torch.bmm(x, a.mT))
    assert torch.autograd.gradcheck(grouped_linear, (x, a))
    assert torch.autograd.gradgradcheck(grouped_linear, (x, a))
    grouped_linear(x, a.detach()).sum().backward()
    assert x.grad is not None
