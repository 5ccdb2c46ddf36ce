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


def applies(inputs: Tensor) -> bool:
    """Whether fast forms may run on a batch: there is no gradient, compilation, autocast or function transform."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing() or len(inputs) == 0:
        return False
    device = inputs.device.type
    if type(inputs) is not Tensor or device not in ("cpu", "cuda") or torch.is_autocast_enabled(device):
        return False
    return torch._C._functorch.peek_interpreter_stack() is None  # there is none of torch.func's transforms


def tensors_of(*parts: nn.Module | nn.Parameter) -> list[Tensor] | None:
    """All parameters and buffers of modules, or None if the fast forms might not compute what calling them would.

    That is where a module is not of a known type, is in training mode, or was hooked, replaced, patched, quantised or
    sharded.
    """
    found: list[Tensor] = []
    for part in parts:
        if isinstance(part, nn.Module):
            if not _collect(part, found):
                return None
        elif type(part) is nn.Parameter:
            found.append(part)
        else:
            return None
    return found


def _collect(module: nn.Module, found: list[Tensor]) -> bool:
    """Append the module's tensors; False if it is not as its type has it.

    This runs for every module in every call. It reads attributes from `__dict__`, which is several times as fast as
    nn.Module's __getattr__, and compares tensors by identity only: `==` would compare their elements.
    """
    state, kind = module.__dict__, type(module)
    if FORWARD.get(kind) is not kind.forward or "forward" in state:
        return False
    if state["training"] or state["_forward_hooks"] or state["_forward_pre_hooks"]:
        return False
    for name, parameter in state["_parameters"].items():
        if type(parameter) is nn.Parameter:
            found.append(parameter)
        elif parameter is not None or name != "bias":
            return False
    for buffer in state["_buffers"].values():
        if buffer is None:
            return False
        found.append(buffer)
    for child in state["_modules"].values():  # noqa: SIM110, a generator would cost more than the checks
        if child is not None and not _collect(child, found):
            return False
    return True
