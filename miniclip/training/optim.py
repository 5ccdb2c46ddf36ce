"""The optimizer, its learning rates, and which parameters are frozen."""

from __future__ import annotations

import math

import torch
from torch import nn

from miniclip.models import CLIP
from miniclip.training.gradient_cache import Embedder
from miniclip.training.options import TrainOptions
from miniclip.training.towers import layers_above


def freeze(model: CLIP, options: TrainOptions) -> None:
    """Compute no gradients for the towers and BatchNorms that the options freeze. The temperature is always trained,
    and so is a SigLIP's logit bias."""
    for name, parameter in model.named_parameters():
        tower = "image" if name.startswith("visual.") else "text"
        if tower in options.freeze and name not in ("logit_scale", "logit_bias"):
            parameter.requires_grad_(False)
    for module in _batch_norms(model) if options.freeze_batchnorm else []:
        module.requires_grad_(False)


def training_mode(model: CLIP, options: TrainOptions) -> None:
    """`model.train()`, except for BatchNorms that are frozen, alone or with their tower: in training mode they would
    normalise by each batch's statistics, and update their running ones."""
    model.train()
    for module in _batch_norms(model) if options.freeze_batchnorm or "image" in options.freeze else []:
        module.eval()


def _batch_norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def build_optimizer(embedder: Embedder, options: TrainOptions) -> torch.optim.AdamW:
    """AdamW with the CLIP paper's betas for ViTs (table 18). Vectors and scalars (gains, biases, the class embedding,
    the temperature) have no weight decay. "lr_scale" of a group is its learning rate relative to the highest.

    Epsilon is 1e-8. The paper's 1e-6 is for batches of 32,768; in small ones many tokens have gradients below it.
    """
    above = layers_above(embedder.clip) if options.layer_decay != 1 else {}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in embedder.named_parameters():
        if parameter.requires_grad:
            decay = options.weight_decay if parameter.ndim >= 2 else 0.0
            lr_scale = options.layer_decay ** above.get(name.removeprefix("clip."), 0)
            groups.setdefault((lr_scale, decay), []).append(parameter)
    settings = [{"params": p, "lr_scale": scale, "weight_decay": decay} for (scale, decay), p in groups.items()]
    return torch.optim.AdamW(settings, lr=options.lr, betas=(0.9, 0.98), eps=1e-8, fused=True)


def learning_rate(step: int, total: int, options: TrainOptions) -> float:
    """It rises linearly to `lr` over `warmup` steps, or a tenth of all steps if that is less, and then falls along half
    a cosine to 0 at `total`."""
    warmup = min(options.warmup, total // 10)
    if step < warmup:
        return options.lr * (step + 1) / warmup
    return options.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
