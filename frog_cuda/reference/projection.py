"""The orthogonal projection onto the span of tangents."""

from __future__ import annotations

import torch
from torch import Tensor


def cholesky_project(gram: Tensor, derivatives: Tensor, *, rtol: float = 1e-7) -> tuple[Tensor, Tensor]:
    """Coefficients of P_U (Flügel et al., section 3.4): ``c = G^-1 d`` over as many tangents as are linearly independent.

    With tangents scaled to unit length, the one farthest from the span of those taken so far is taken next, until the square of
    that distance is ``rtol`` or less. Those left over get coefficient 0.
    """
    if gram.dim() == 3:
        pairs = [cholesky_project(g, d, rtol=rtol) for g, d in zip(gram, derivatives, strict=True)]
        if not pairs:
            return derivatives.double().clone(), torch.empty(0, dtype=torch.int64)
        return torch.stack([c for c, _ in pairs]), torch.stack([rank for _, rank in pairs])
    g, d = gram.double(), derivatives.double()
    lengths = g.diagonal().sqrt()
    scale = torch.where(lengths > 0, 1 / lengths, 0.0)
    unit = g * (scale[:, None] * scale)
    rest = unit.clone()  # Gram matrix of what the span of the tangents taken so far does not explain
    taken: list[int] = []
    while len(taken) < len(g):
        distance = rest.diagonal().clone()
        distance[taken] = -1
        best = int(distance.argmax())
        if not distance[best] > rtol:
            break
        taken.append(best)
        rest = rest - torch.outer(rest[:, best], rest[best]) / rest[best, best]
    c = torch.zeros_like(d)
    if taken:
        factor = torch.linalg.cholesky(unit[taken][:, taken])
        c[taken] = scale[taken, None] * torch.cholesky_solve(scale[taken, None] * d[taken], factor)
    return c, torch.tensor(len(taken))
