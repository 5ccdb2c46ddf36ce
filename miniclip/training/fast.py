"""Changes to a model's modules with which a training step takes less time or memory; the results are the same."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from miniclip.fast.rates import MIN_SPEEDUP, matrix_rate
from miniclip.models import CLIP
from miniclip.models.transformer import MLP
from miniclip.training.towers import blocks_of


def fuse_quick_gelu(model: CLIP) -> None:
    """Let the MLPs compute quick_gelu as SiLU: x sigmoid(1.702 x) = SiLU(1.702 x) / 1.702.

    The matrix products apply both factors at no cost. Two passes over the widest tensor of a block remain, one forward
    and one backward, instead of eight; on a CPU that saves a fifth of a training step. `MLP.forward` is the plain form.
    """
    for module in model.modules():
        if isinstance(module, MLP) and module.activation == "quick_gelu":
            module.forward = partial(_mlp_forward, module)


def _mlp_forward(mlp: MLP, x: Tensor) -> Tensor:
    rows = x.flatten(0, -2)
    hidden = torch.addmm(mlp.c_fc.bias, rows, mlp.c_fc.weight.T, beta=1.702, alpha=1.702)
    out = torch.addmm(mlp.c_proj.bias, F.silu(hidden), mlp.c_proj.weight.T, alpha=1 / 1.702)
    return out.unflatten(0, x.shape[:-1])


def convolve_channels_last(model: CLIP) -> None:
    """Keep the maps of a convolutional image tower as [N, h, w, C] in memory: convolutions are a quarter faster on a
    CPU, and tensor cores need that format."""
    if sum(isinstance(module, nn.Conv2d) for module in model.visual.modules()) > 1:
        model.visual.to(memory_format=torch.channels_last)


def bfloat16_is_faster(device: torch.device) -> bool:
    """Whether products of bfloat16 matrices are at least MIN_SPEEDUP times as fast as float32's, as measured now."""
    rates = [matrix_rate(dtype, device) for dtype in (torch.bfloat16, torch.float32)]
    return rates[0] > MIN_SPEEDUP * rates[1]


def checkpoint_activations(model: CLIP) -> None:
    """Keep only the input of each block, and compute its activations again in the backward pass: a third more
    arithmetic, and memory for the activations of about one block instead of all."""
    for block in (*model.transformer.resblocks, *blocks_of(model.visual, "--activation-checkpointing")):
        for module in block if isinstance(block, nn.Sequential) else [block]:
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)
