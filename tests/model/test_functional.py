"""Products and casts with gradients of their own."""

from __future__ import annotations

import pytest
import torch

from loracurve.model.functional import BaseMap, Mixing, cast_together, grouped_linear, linear_maps, mixing


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


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("way", ["rows", "windows", "one point", "points"])
def test_maps_of_one_input_and_their_gradients_are_those_of_the_formula(way: str, dropped: bool) -> None:
    groups = {"rows": 1, "windows": 2, "one point": 1, "points": 3}[way]
    x = drawn(groups, 4, 5).double().requires_grad_()
    z = (x.detach() + 1).requires_grad_() if dropped else x
    weights, biases = [drawn(6, 5).double(), drawn(3, 5).double()], [None, drawn(3).double()]
    given = drawn(groups, 4, 2).double().requires_grad_()
    size = 5 if way in ("rows", "windows") else groups
    a, b = ([drawn(size, 2, n).double().requires_grad_() for n in ns] for ns in ((5, 5, 5), (6, 3, 2)))
    mix = Mixing(0.5)
    c = torch.eye(groups).double()
    if way in ("rows", "windows"):
        c = drawn(groups * 2, size).double()
        if way == "windows":  # rows of a segment use its control points
            c[:2, 3:], c[2:, :2] = 0, 0
        mix = mixing(c, 0.5, groups, 2)

    def together(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, z, given, *factors = tensors
        bases = [*(BaseMap(w, o) for w, o in zip(weights, biases, strict=True)), BaseMap(output=given)]
        found = linear_maps(x, x if not dropped else z, mix, bases, factors[:3], factors[3:])
        return tuple(y.reshape(groups * 4, -1) for y in found)

    inputs = (x, z, given, *a, *b)
    whole = c.repeat_interleave(2, 0) if way in ("rows", "windows") else c.repeat_interleave(4, 0)
    flat, seen = x.flatten(0, 1), z.flatten(0, 1)
    outputs = [flat @ weights[0].T, flat @ weights[1].T + biases[1], given.flatten(0, 1)]
    for y, base, f, g in zip(together(*inputs), outputs, a, b, strict=True):
        one = [torch.einsum("k,kri->ri", t, f) for t in whole]
        two = [torch.einsum("k,kro->ro", t, g) for t in whole]
        update = torch.stack([u.T @ (v @ row) for u, v, row in zip(two, one, seen, strict=True)])
        torch.testing.assert_close(y, base + 0.5 * update)
    if not dropped:
        inputs = (x, z.detach(), given, *a, *b)
    assert torch.autograd.gradcheck(together, inputs)
    (first,) = torch.autograd.grad(together(*inputs)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_what_a_map_gives_may_be_changed_in_place() -> None:
    x, a, b = drawn(1, 4, 5).requires_grad_(), drawn(1, 2, 5).requires_grad_(), drawn(1, 2, 6).requires_grad_()
    weight = drawn(6, 5)
    for bases in ([BaseMap(weight)], [BaseMap(weight), BaseMap(weight)]):
        count = len(bases)
        y = linear_maps(x, x, Mixing(1.0), bases, [a] * count, [b] * count)[0].view(2, 2, 6)
        y /= 2
        (found,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(found[0], (weight + b[0].mT @ a[0]).sum(0).expand(4, 5) / 2)
