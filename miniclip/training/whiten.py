"""Initial weights for a ViT's patch embedding that respond to edges as well as to colours."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from miniclip.errors import UsageError
from miniclip.models.vit import VisionTransformer


@torch.no_grad()
def whiten_patches(visual: nn.Module, pixels: Tensor) -> None:
    """Set the patch embedding to the principal components of the patches of `pixels` [N, 3, R, R].

    Components with little variance are strengthened: the standard deviation of each output is the fourth root of its
    component's variance. If there are fewer components than outputs, the other outputs stay as they are. Pixels of a
    patch are so alike that a random embedding hardly responds to more than the mean colour. UsageError if the tower is
    not a ViT.
    """
    if not isinstance(visual, VisionTransformer):
        kind = type(visual).__name__
        raise UsageError(f"--whiten-patches needs a VisionTransformer as image tower; this one is a {kind}")
    weight = visual.conv1.weight  # [D, 3, P, P]
    side = weight.shape[-1]
    patches = torch.nn.functional.unfold(pixels, side, stride=side).transpose(1, 2).flatten(0, 1).double()
    patches = patches - patches.mean(0)
    variance, components = torch.linalg.eigh(patches.T @ patches / len(patches))  # ascending
    variance, components = variance.flip(0)[: len(weight)], components.flip(1)[:, : len(weight)]
    floor = 1e-3 * variance[0] / len(variance)  # smaller variances are noise
    rows = (components * (variance + floor) ** -0.25).T
    rows *= 0.5 / (patches @ rows.T).std()  # about that of the usual random start
    weight[: len(rows)] = rows.unflatten(1, weight.shape[1:]).to(weight)
