"""Alignment of adapters, which uses their rescaling freedom (gauge).

(A, B) and (R A, B R^-1) are the same model for every invertible R [r, r], but a straight line or a curve between two
adapters moves when R does. These functions choose R for each adapter and map so that paths join like with like; no
adapter's predictions change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loracurve.curve.config import Alignment
from loracurve.curve.lora_space import ControlPoints
from loracurve.system.errors import UserError

__all__ = ["align", "balanced", "delta_w_gram", "procrustes"]


def balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The balanced (SVD) gauge of one map: B A = U S V^T becomes A = S^1/2 V^T, B = U S^1/2.

    Directions with zero singular value keep A's own directions (what is left of A outside V), so an untrained factor
    does not become a saddle with A = B = 0. Signs are fixed by the largest entry of each row of V^T, so the result
    depends on B A alone wherever its singular values are distinct.

    Args:
        a: [r, n_in]. b: [n_out, r].

    Returns:
        The factors in the new gauge, same shapes and dtype; computed in float64.
    """
    a64, b64 = a.double(), b.double()
    qb, rb = torch.linalg.qr(b64)
    qa, ra = torch.linalg.qr(a64.mT)
    u, s, vt = torch.linalg.svd(rb @ ra.mT, full_matrices=False)
    u, vt = qb @ u, vt @ qa.mT
    kept = int((s > s[0] * 1e-6).sum()) if s[0] > 0 else 0
    if kept == 0:
        return a, b
    sign = torch.sign(vt.gather(1, vt.abs().argmax(1, keepdim=True)))
    root = s[:kept].sqrt()
    v = (sign * vt)[:kept]
    new_a = root[:, None] * v
    new_b = (u * sign.mT)[:, :kept] * root
    if kept < len(a):
        rest = a64 - (a64 @ v.mT) @ v
        _, left, directions = torch.linalg.svd(rest, full_matrices=False)
        missing = len(a) - kept
        own = (left[:, None] * directions)[:missing]
        # A rank above the map's size leaves rows without a direction of their own.
        new_a = torch.cat([new_a, own, own.new_zeros(missing - len(own), a.shape[1])])
        new_b = torch.cat([new_b, new_b.new_zeros(len(b), missing)], dim=1)
    return new_a.to(a.dtype), new_b.to(b.dtype)


def procrustes(a: Tensor, b: Tensor, a0: Tensor, b0: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the factors of one map onto the reference (A0, B0): min_R |R A - A0|^2 + |B R^T - B0|^2 over orthogonal R.

    Solution (orthogonal Procrustes, Schoenemann 1966): U S V^T = svd(A A0^T + B^T B0), R = V U^T.
    """
    u, _, vt = torch.linalg.svd(a.double() @ a0.double().mT + b.double().mT @ b0.double())
    r = vt.mT @ u.mT
    return (r @ a.double()).to(a.dtype), (b.double() @ r.mT).to(b.dtype)


def align(anchors: ControlPoints, alignment: Alignment = "balanced+procrustes") -> ControlPoints:
    """Replace M adapters by equal ones that lie near each other, so that lines between them join like with like.

    (A, B) and (R A, B R^-1) are the same adapter for every invertible R [r, r]: its rescaling freedom (gauge). Here R
    is chosen for each adapter and map. Procrustes alone still depends on how norm is split between A and B; balanced
    and Procrustes together do not depend on the R that the adapters came with. Dense heads have no such freedom and
    stay as they are.

    Args:
        anchors: tensors by PEFT name, leading dimension M (`CurveModel.control_points`).
        alignment: balanced: the norm of B A is split evenly between A and B. procrustes: each adapter is rotated onto
            the one before it. Both, or none.

    Returns:
        New tensors of the same names and shapes, with the same products B A (1e-5 relative in float32).

    Raises:
        UserError: an unknown alignment.
    """
    if alignment not in ("none", "balanced", "procrustes", "balanced+procrustes"):
        raise UserError(f"unknown alignment {alignment!r}; expected none, balanced, procrustes or balanced+procrustes")
    out = {name: tensor.clone() for name, tensor in anchors.items()}
    for name_a, a in out.items():
        if not name_a.endswith("lora_A.weight") or alignment == "none":
            continue
        b = out[name_a.replace("lora_A", "lora_B")]
        for m in range(len(a)):
            if "balanced" in alignment:
                a[m], b[m] = balanced(a[m], b[m])
            if "procrustes" in alignment and m > 0:
                a[m], b[m] = procrustes(a[m], b[m], a[m - 1], b[m - 1])
    return out


def delta_w_gram(points: ControlPoints, scalings: dict[str, float] | None = None) -> Tensor:
    """[K, K] inner products <Delta W_i, Delta W_j>_F summed over maps, from r x r products only.

    Gauge-free: distances between adapters are sqrt(G_ii + G_jj - 2 G_ij). `scalings` maps parameter names of A to
    alpha / r (1 where absent).
    """
    total: Tensor | None = None
    for name, a in points.items():
        if not name.endswith("lora_A.weight"):
            continue
        b, a = points[name.replace("lora_A", "lora_B")].double(), a.double()
        inner = torch.einsum("ior,jos->ijrs", b, b) * torch.einsum("irn,jsn->ijrs", a, a)
        term = inner.sum((2, 3)) * (scalings or {}).get(name, 1.0) ** 2
        total = term if total is None else total + term
    if total is None:
        raise UserError("no LoRA factors found: expected names that end in lora_A.weight")
    return total
