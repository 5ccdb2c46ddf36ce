"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): an optimizer for weights that are matrices."""

from __future__ import annotations

import torch
from torch import Tensor

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a, b, c of `orthogonalize`, as published
ITERATIONS = 5


class Muon(torch.optim.AdamW):
    """The groups with "muon": True change by their orthogonalised momentum, all others as AdamW changes them.

    Such a group holds weights [O, I], and weights of convolutions [O, C, k, k], which count as [O, C k k]. A packed
    [3 D, D] counts as three matrices. The result is that of torch.optim.Muon, which takes [O, I] alone; matrices of the
    same shape are computed together here.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        overflow = getattr(self, "found_inf", None)  # torch.amp.GradScaler's: leave this step out
        for group in [group for group in self.param_groups if group["muon"]]:
            if overflow is None or not overflow:
                self._change_matrices(group)
            for weight in group["params"]:
                weight.grad = None  # AdamW leaves it out
        super().step(closure)

    def _change_matrices(self, group: dict) -> None:
        same_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
        for weight in (each for each in group["params"] if each.grad is not None):
            state = self.state[weight]
            if not state:
                state |= {"momentum": torch.zeros_like(weight), "step": torch.zeros(())}  # AdamW loads no state without
            momentum = state["momentum"].lerp_(weight.grad, 1 - MOMENTUM)
            change = weight.grad.lerp(momentum, MOMENTUM).flatten(1)  # Nesterov's
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            parts = 3 if len(change) == 3 * change.shape[1] else 1
            for part, matrix in zip(weight.chunk(parts), change.chunk(parts), strict=True):
                same_shape.setdefault(tuple(matrix.shape), []).append((part, matrix))
        for (rows, columns), pairs in same_shape.items():
            changes = orthogonalize(torch.stack([matrix for _, matrix in pairs]))
            for (part, _), change in zip(pairs, changes, strict=True):
                part.sub_(change.reshape(part.shape), alpha=group["lr"] * max(1.0, rows / columns) ** 0.5)


def orthogonalize(x: Tensor) -> Tensor:
    """Matrices [N, rows, columns] with the same singular vectors, and all singular values about 1 (0.7 to 1.2).

    Each iteration maps the singular values s to a s + b s^3 + c s^5, in bfloat16.
    """
    a, b, c = COEFFICIENTS
    tall = x.shape[1] > x.shape[2]
    y = (x.mT if tall else x).bfloat16()
    y = y / y.flatten(1).norm(dim=1)[:, None, None].clamp(min=1e-7)  # no singular value above 1
    for _ in range(ITERATIONS):
        square = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(square, square, square, beta=b, alpha=c), y, beta=a)
    return (y.mT if tall else y).to(x.dtype)
