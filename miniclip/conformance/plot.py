"""Draw what the image tower attends to. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from miniclip.config import CLIPConfig, ResNetConfig
from miniclip.conformance.files import TraceError
from miniclip.mobileclip.config import MCiConfig


def attention_of(stages: Mapping[str, Tensor], config: CLIPConfig, layer: int | None = None) -> Tensor:
    """How much the first picture's pooled token attends to each place, float32 [H, rows, columns].

    layer: of a ViT, from 0 or from the end with -1; None: the last. Its class token's attention to itself is left out,
    so a map need not sum to 1. A ResNet has one layer, the attention pool, whose query is the mean of the map. An MCi
    tower has attention in its last stages, and no token that is pooled: there it is the mean over all places' queries.
    """
    names = [name for name in stages if name.startswith("visual.") and name.endswith(".attn.probabilities")]
    if isinstance(config.vision, ResNetConfig):
        if layer not in (None, 0, -1):
            raise TraceError(f"layer is {layer}; a ResNet has only one layer of attention, its pool: leave it out")
        names = ["visual.attnpool.probabilities"]
    layer = -1 if layer is None else layer
    if not -len(names) <= layer < len(names):
        raise TraceError(f"layer is {layer}; the image tower has the layers 0 to {len(names) - 1}")
    probabilities = stages[names[layer]][0].float()  # [H, L, L], or [H, 1, L] of a pool
    to_places = probabilities.mean(dim=1) if isinstance(config.vision, MCiConfig) else probabilities[:, 0, 1:]
    side = int(to_places.shape[1] ** 0.5)
    return to_places.unflatten(1, (side, side))


def plot_attention(stages: Mapping[str, Tensor], config: CLIPConfig, output: Path, layer: int | None = None) -> None:
    """Draw the picture as the model sees it, the mean of the heads over it, and each head."""
    from matplotlib.figure import Figure

    maps = attention_of(stages, config, layer)
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
            title += f", {float(weights.sum()):.0%}"
        axis.set_title(title, fontsize=9)
    figure.savefig(output, dpi=150)


def _shown(pixels: Tensor, config: CLIPConfig) -> np.ndarray:
    """Pixels as the bytes they were made of, [R, R, 3]."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (config.preprocess.mean, config.preprocess.std))
    return ((pixels.float() * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
