"""A transformer's blocks on a CPU, over the tokens of all sequences in one matrix [T, D]. What is saved:

- In the last block, only the pooled token of each sequence is a query, and only it goes through the MLP.
- QuickGELU(x) = SiLU(1.702 x) / 1.702. The norm before and the product after absorb the two factors, so that the
  activation is one pass over the widest tensor.
- The operating system clears new memory page by page, which can cost more than the arithmetic. So all blocks work in
  one buffer, and sums are made in place.
- On a CPU without half-precision arithmetic, half-precision weights are multiplied in float32 (half.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip import ops
from miniclip.fast import half, int8
from miniclip.models.transformer import Attention, LayerNorm

# For few rows, as in a single picture or short texts, oneDNN's products are faster than MKL's, which addmm calls.
ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
FEW_ROWS = 128  # measured on an AMD EPYC, two cores: up to 1.6 times as fast as MKL at 50 rows, but not with one row


def run_blocks(
    blocks: nn.ModuleList,
    x: Tensor,
    attend: Callable[[Tensor], Tensor],
    attend_from_pooled: Callable[[Attention, Tensor], Tensor],
    pooled: Tensor,
) -> Tensor:
    """All blocks over the tokens x [T, D], which may change in place; returns the pooled tokens [N, D].

    attend: packed projections [T, 3, H, D / H] -> [T, D], within each sequence.
    attend_from_pooled: a block's attention, tokens [T, D] -> [N, D], what the pooled tokens gather, before out_proj.
    pooled: the row of each sequence's pooled token, [N].
    """
    width = x.shape[1]
    rows = max(len(x), len(pooled))  # equal texts share their tokens, so there may be fewer tokens than texts
    buffer = x.new_empty(rows * max(3 * width, *(block.mlp.c_fc.out_features for block in blocks)))
    if blocks[0].mlp.c_fc.weight.dtype is not x.dtype:
        half.pack([weight for weight in blocks.parameters() if weight.ndim == 2])
    for block in blocks:
        attn, mlp = block.attn, block.mlp
        y = norm(block.ln_1, x)
        if block is blocks[-1]:
            attended, x = attend_from_pooled(attn, y), x[pooled]
        else:
            qkv = _linear(y, attn, attn.in_proj_weight, attn.in_proj_bias, buffer)
            attended = attend(qkv.unflatten(1, (3, attn.heads, -1)))
        _add_linear(x, attended, attn.out_proj)

        if ops.ACTIVATIONS[mlp.activation] is ops.quick_gelu:
            y = norm(block.ln_2, x, 1.702)
            bias = None if mlp.c_fc.bias is None else 1.702 * mlp.c_fc.bias.to(y.dtype)
            hidden = F.silu(_linear(y, mlp.c_fc, mlp.c_fc.weight, bias, buffer), inplace=True)
            _add_linear(x, hidden, mlp.c_proj, 1 / 1.702)
        else:
            hidden = _linear(norm(block.ln_2, x), mlp.c_fc, mlp.c_fc.weight, mlp.c_fc.bias, buffer)
            _add_linear(x, ops.ACTIVATIONS[mlp.activation](hidden), mlp.c_proj)
    return x


def norm(layer: LayerNorm, x: Tensor, scale: float = 1) -> Tensor:
    """scale * layer(x). PyTorch's takes half-precision x with float32 weights on the CPU, and sums in float32."""
    dtype = half.arithmetic(layer.weight)
    weight, bias = (None if p is None else scale * p.to(dtype) for p in (layer.weight, layer.bias))
    return F.layer_norm(x, layer.weight.shape, weight, bias, layer.eps)


def project(x: Tensor, projection: Tensor) -> Tensor:
    """Pooled tokens [N, D] -> embeddings [N, E], in the projection's dtype."""
    return (x @ projection.to(x.dtype)).to(projection.dtype)


def _linear(y: Tensor, layer: nn.Module, weight: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
    """y [T, n_in], the layer's weight [n_out, n_in] -> y W^T + bias [T, n_out], which may be in the buffer."""
    if (integers := int8.packed(layer, y)) is not None:
        return _add_bias(int8.product(y, integers), bias)
    if weight.dtype is not y.dtype:
        return _add_bias(half.product(y, weight), bias)
    if _suits_onednn(y):
        return ONEDNN_LINEAR(y, weight, bias, "none", [], "")
    out = buffer[: len(y) * len(weight)].view(len(y), -1)
    return torch.mm(y, weight.T, out=out) if bias is None else torch.addmm(bias, y, weight.T, out=out)


def _add_linear(x: Tensor, y: Tensor, layer: nn.Linear, scale: float = 1) -> None:
    """x += layer(scale * y), the bias not scaled."""
    if (integers := int8.packed(layer, y)) is not None:
        x.add_(int8.product(y, integers), alpha=scale)
    elif layer.weight.dtype is not y.dtype:
        x.add_(half.product(y, layer.weight), alpha=scale)
    elif _suits_onednn(y):
        x.add_(ONEDNN_LINEAR(y, layer.weight, None, "none", [], ""), alpha=scale)
    else:
        x.addmm_(y, layer.weight.T, alpha=scale)
    _add_bias(x, layer.bias)


def _add_bias(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x.add_(bias)


def _suits_onednn(y: Tensor) -> bool:
    return y.dtype is torch.float32 and 1 < len(y) < FEW_ROWS and ONEDNN_LINEAR is not None
