"""When the fast forms apply: whether they compute what calling the modules would, with no visible difference."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from miniclip.models.resnet import AttentionPool, Bottleneck, ModifiedResNet
from miniclip.models.transformer import MLP, Attention, LayerNorm, ResidualAttentionBlock, Transformer
from miniclip.models.vit import VisionTransformer

# The modules whose arithmetic the fast forms repeat, each with its forward as it was when this file was imported.
FORWARD: dict[type[nn.Module], Callable] = {
    kind: kind.forward
    for kind in (
        *(VisionTransformer, Transformer, ResidualAttentionBlock, Attention, MLP, LayerNorm),
        *(ModifiedResNet, Bottleneck, AttentionPool),
        *(nn.ModuleList, nn.Sequential, nn.Linear, nn.Embedding, nn.Conv2d, nn.BatchNorm2d, nn.AvgPool2d, nn.Identity),
    )
}


def applies(inputs: Tensor, *parts: nn.Module) -> bool:
    """Whether the fast forms may compute what calling `parts` on a batch would.

    They may not with gradients, in training, while torch.compile or torch.jit traces, under autocast, on other devices
    than a CPU or a GPU, nor when any module was hooked, replaced, patched, quantised or sharded.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing() or len(inputs) == 0:
        return False
    device = inputs.device.type
    if type(inputs) is not Tensor or device not in ("cpu", "cuda") or torch.is_autocast_enabled(device):
        return False
    return all(map(is_untouched, parts))


def is_untouched(module: nn.Module | None) -> bool:
    """Whether every module in it is of a known type, in eval mode, and runs its type's forward and nothing else.

    This runs for every module in every call. It reads attributes from `__dict__`, which is several times as fast as
    nn.Module's __getattr__, and compares tensors by identity only: `==` would compare their elements.
    """
    if module is None:
        return True
    state, kind = module.__dict__, type(module)
    if FORWARD.get(kind) is not kind.forward or "forward" in state:
        return False
    if state["training"] or state["_forward_hooks"] or state["_forward_pre_hooks"]:
        return False
    for name, parameter in state["_parameters"].items():
        if type(parameter) is not nn.Parameter and not (parameter is None and name == "bias"):
            return False
    for buffer in state["_buffers"].values():
        if buffer is None:
            return False
    for child in state["_modules"].values():  # noqa: SIM110, a generator would cost more than the checks
        if not is_untouched(child):
            return False
    return True
