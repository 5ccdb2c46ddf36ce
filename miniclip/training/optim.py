"""The optimizer, its learning rates, and which parameters are frozen."""

from __future__ import annotations

import math

import torch
from torch import nn

from miniclip.models import CLIP
from miniclip.training.gradient_cache import Embedder
from miniclip.training.muon import Muon
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
    With a learning rate of Muon's own, the matrices inside the towers are trained by Muon.
    """
    above = layers_above(embedder.clip) if options.layer_decay != 1 else {}
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in embedder.named_parameters():
        if parameter.requires_grad:
            decay = options.weight_decay if parameter.ndim >= 2 else 0.0
            lr_scale = options.layer_decay ** above.get(name.removeprefix("clip."), 0)
            muon = bool(options.muon_lr) and _is_matrix(name, parameter)
            if muon:
                lr_scale *= options.muon_lr / options.lr
            groups.setdefault((lr_scale, decay, muon), []).append(parameter)
    names = ("lr_scale", "weight_decay", "muon")
    settings = [{"params": parameters, **dict(zip(names, key, strict=True))} for key, parameters in groups.items()]
    optimizer = Muon if options.muon_lr else torch.optim.AdamW
    return optimizer(settings, lr=options.lr, betas=(0.9, 0.98), eps=1e-8, fused=True)


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon trains it: a weight that multiplies all of its input. The attention pool's queries and keys, which
    only choose among places, would take a tenth of a step of a small ResNet."""
    others = ("embedding", "attnpool.q_proj", "attnpool.k_proj")
    return parameter.ndim in (2, 4) and not any(other in name for other in others)


def learning_rate(step: int, total: int, options: TrainOptions) -> float:
    """It rises linearly to `lr` over `warmup` steps, or a tenth of all steps if that is less, and then falls along half
    a cosine to 0 at `total`."""
    warmup = min(options.warmup, total // 10)
    if step < warmup:
        return options.lr * (step + 1) / warmup
    return options.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
