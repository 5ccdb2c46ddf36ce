"""Draw what the image tower attends to. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from miniclip.config import CLIPConfig
from miniclip.conformance.files import TraceError


def attention_of(stages: Mapping[str, Tensor], layer: int | None = None) -> Tensor:
    """How much the first picture's pooled token attends to each place, float32 [H, rows, columns].

    layer: from 0, or from the end with -1, among the image tower's layers with attention; None: the last. The attention
    of a class token (in an attention pool, of the mean) to itself is left out, so a map need not sum to 1. A tower
    without such a token gets the mean over all places' queries.
    """
    name, _ = _layer(stages, layer)
    probabilities = stages[name][0].float()  # [H, L, L], or [H, 1, L] of a pool
    side = isqrt(probabilities.shape[-1])
    if _has_no_token(probabilities):
        return probabilities.mean(dim=1).unflatten(1, (side, side))
    return probabilities[:, 0, 1:].unflatten(1, (side, side))


def _layer(stages: Mapping[str, Tensor], layer: int | None) -> tuple[str, str]:
    """The stage that has the layer's attention, and which layer that is."""
    names = [name for name in stages if name.startswith("visual.") and name.endswith(".probabilities")]
    if not names:
        raise TraceError("the image tower has no layer of attention that could be drawn")
    layer = -1 if layer is None else layer
    if not -len(names) <= layer < len(names):
        raise TraceError(f"layer is {layer}; the image tower has attention in the layers 0 to {len(names) - 1}")
    last = len(names) - 1
    return names[layer], f"layer {layer % len(names)} (0 to {last})" if last else "the only layer that has any"


def _has_no_token(probabilities: Tensor) -> bool:
    """Whether attention [..., H, L, L] is between places alone, without a class token or mean."""
    return isqrt(probabilities.shape[-1]) ** 2 == probabilities.shape[-1]


def _about(stages: Mapping[str, Tensor], layer: int | None) -> str:
    name, which = _layer(stages, layer)
    if _has_no_token(stages[name]):
        return f"Attention to each place, mean of all queries, {which}"
    return f"Attention of the pooled token, {which}; what is not on patches is on the token itself"


def plot_attention(stages: Mapping[str, Tensor], config: CLIPConfig, output: Path, layer: int | None = None) -> None:
    """Draw the picture as the model sees it, the mean of the heads over it, and each head."""
    from matplotlib.figure import Figure

    maps = attention_of(stages, layer)
    panels = [("picture", None), ("mean of heads", maps.mean(0)), *((f"head {i}", x) for i, x in enumerate(maps))]
    columns = min(len(panels), 5)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(2.2 * columns, 2.5 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    picture = _shown(stages["image.pixels"][0], config)
    side = picture.shape[0]
    for axis in axes:
        axis.set_axis_off()
    for axis, (title, weights) in zip(axes, panels, strict=False):
        axis.imshow(picture, extent=(0, side, side, 0))
        if weights is not None:
            how = {"cmap": "inferno", "alpha": 0.6, "interpolation": "bilinear", "vmin": 0}
            axis.imshow(weights.numpy(), extent=(0, side, side, 0), **how)
            title += f": {float(weights.sum()):.0%} on patches"
        axis.set_title(title, fontsize=9)
    figure.suptitle(f"{_about(stages, layer)}; each panel has its own colour scale", fontsize=9)
    figure.savefig(output, dpi=150)


def _shown(pixels: Tensor, config: CLIPConfig) -> np.ndarray:
    """Pixels as the bytes they were made of, [R, R, 3]."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (config.preprocess.mean, config.preprocess.std))
    return ((pixels.float() * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
