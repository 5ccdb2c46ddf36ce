"""Matrix products of eight-bit integers, an opt-in for CPUs that are slow at half precision: `load(..., dtype="int8")`.

The weights of the transformers' blocks are rounded to int8, each row with a scale of its own, and so are the
activations, each token with its own, while they are computed. All else stays float32, and so does what the model holds:
its parameters, its state dict, and the towers as `model.fast = False` runs them.

How close embeddings stay depends on the weights: tiny-ViT's keep a cosine of 0.9995 and more with their float32 ones;
of models with random weights 0.9986 was seen. Compare yours before you rely on it.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from miniclip.models.transformer import Attention, ResidualAttentionBlock

ENGINES = ("x86", "fbgemm", "onednn")  # PyTorch's, in the order in which they are tried


def quantize(model: nn.Module) -> nn.Module:
    """Let inference on the CPU multiply in int8, in place. Weights that are edited later count after another call.

    Takes a quarter of the blocks' memory more. A ModifiedResNet has no blocks: only the model's texts become faster.
    Raises ValueError for a model that is not float32 on a CPU, or where PyTorch has no such products.
    """
    blocks = [module for module in model.modules() if type(module) is ResidualAttentionBlock]
    if any(p.dtype is not torch.float32 or p.device.type != "cpu" for p in model.parameters()):
        raise ValueError('expected a float32 model on the CPU: load(name, device="cpu", dtype=torch.float32)')
    engine = next((name for name in ENGINES if name in torch.backends.quantized.supported_engines), None)
    if engine is None or not blocks:
        there = f"got {len(blocks)} blocks and {', '.join(torch.backends.quantized.supported_engines)}"
        raise ValueError(f"int8 needs transformer blocks and one of PyTorch's engines {', '.join(ENGINES)}; {there}")
    torch.backends.quantized.engine = engine
    for block in blocks:
        block.attn.int8 = _pack(block.attn.in_proj_weight)
        for layer in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
            layer.int8 = _pack(layer.weight)
    return model


@torch.no_grad()
def _pack(weight: Tensor):
    """Float32 [n_out, n_in] -> int8 in the order that the processor reads it."""
    scales = weight.abs().amax(dim=1).double().clamp_min(1e-30) / 127
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch means to replace its quantised tensors, but has not yet, on CPUs
        zeros = torch.zeros(len(weight), dtype=torch.int64)
        rounded = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    return torch.ops.quantized.linear_prepack(rounded, None)


def packed(layer: Attention | nn.Linear, x: Tensor):
    """What `quantize` made of the layer's weight, if it is to be used for x."""
    return layer.__dict__.get("int8") if x.dtype is torch.float32 and x.device.type == "cpu" else None


def product(x: Tensor, weight) -> Tensor:
    """x [T, n_in] times a packed weight's transpose, [T, n_out].

    PyTorch has one scale for all of x. CLIP's tokens differ in size, so each is brought to the same range first, which
    halves the loss of cosine. Of the eight bits one stays unused: older processors' sums of products overflow with it.
    """
    size = x.abs().amax(dim=1, keepdim=True).clamp_min_(1e-30)
    return torch.ops.quantized.linear_dynamic(x / size, weight, reduce_range=True).mul_(size)
