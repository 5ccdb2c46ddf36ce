"""The transformers as inference runs them on a GPU, where most of the cost is in passes over memory and in launches.

- Each layer norm goes with the residual sum before it, and QuickGELU with the bias before it, in one kernel where
  `miniclip.kernels.dispatch` says so. Elsewhere QuickGELU(x) = SiLU(1.702 x) / 1.702, and the products before and after
  it scale for free.
- Many short texts are packed one after the other, without padding. Others are cut to the longest, rounded up to a
  multiple of 8, because cuDNN plans its attention anew for each length, which takes longer than the padding.
- The host waits for the GPU once, for the lengths of the texts.

A ModifiedResNet runs in its plain form. With each BatchNorm folded into the convolution before it, PyTorch would launch
a kernel for the bias in place of the BatchNorm's, which moves as many bytes. A layer norm without the residual sum's
kernel is three launches, because PyTorch's takes half-precision x only with half-precision weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip import ops
from miniclip.fast.ops import add_layer_norm, attention_varlen, bias_quick_gelu
from miniclip.kernels.dispatch import use_kernel
from miniclip.models.text import TextTransformer
from miniclip.models.transformer import MLP
from miniclip.models.vit import VisionTransformer


def image_embedding(tower: VisionTransformer, image: Tensor) -> Tensor:
    """Pixels [N, 3, R, R] in the tower's dtype -> embeddings [N, E], as `tower(image)`."""
    grid = tower.conv1(image).flatten(2).transpose(1, 2)  # [N, L - 1, D]
    class_token = tower.class_embedding.to(grid.dtype).expand(len(grid), 1, -1)
    x = torch.cat([class_token, grid], dim=1) + tower.positional_embedding.to(grid.dtype)
    count, length, width = x.shape
    blocks = tower.transformer.resblocks

    def attend(qkv: Tensor) -> Tensor:
        sequences = qkv.unflatten(0, (count, length))
        return ops.attention(sequences, tower.transformer.causal, backend=blocks[0].attn.backend).flatten(0, 1)

    first = torch.arange(0, count * length, length, device=x.device)
    return tower.ln_post(run_blocks(blocks, tower.ln_pre(x.view(-1, width)), attend, first)) @ tower.proj


def text_embedding(tower: TextTransformer, text: Tensor, whole: bool = False) -> Tensor:
    """Token ids [N, L] -> embeddings [N, E], as the plain form; `tower.transformer` must be causal.

    whole: compute padding too, and don't wait for the GPU, which can't be done while a CUDA graph is captured.
    """
    blocks, positions = tower.transformer.resblocks, tower.positional_embedding
    attn, end = blocks[0].attn, text.argmax(dim=-1)
    longest, tokens = (text.shape[1], 0) if whole else lengths(end)
    starts = F.pad((end + 1).cumsum(0, dtype=torch.int32), (1, 0))
    no_tokens = attn.in_proj_weight.new_empty(0, 3, attn.heads, positions.shape[1] // attn.heads)
    if tokens and use_kernel("attention_varlen", attn.backend, no_tokens, starts, longest):
        owner = torch.repeat_interleave(end + 1, output_size=tokens)  # [T], the text of each token
        position = torch.arange(tokens, device=text.device) - starts[owner]
        text, positions, pooled = text[owner, position], positions[position], starts[1:] - 1

        def attend(qkv: Tensor) -> Tensor:
            return attention_varlen(qkv, starts, longest, causal=True, backend=attn.backend)
    else:
        text = text[:, : rounded_up(longest)]
        length = text.shape[1]
        positions = positions[:length]
        pooled = torch.arange(0, len(text) * length, length, device=text.device) + end

        def attend(qkv: Tensor) -> Tensor:
            sequences = qkv.unflatten(0, (-1, length))
            return ops.attention(sequences, causal=True, backend=attn.backend).flatten(0, 1)

    dtype = tower.text_projection.dtype
    x = F.embedding(text, tower.token_embedding.weight).to(dtype) + positions.to(dtype)
    x = run_blocks(blocks, x.view(-1, x.shape[-1]), attend, pooled)
    return tower.ln_final(x) @ tower.text_projection


def cut(text: Tensor) -> Tensor:
    """Texts [N, L] without most of the padding that all of them have."""
    return text[:, : rounded_up(lengths(text.argmax(dim=-1))[0])]


def rounded_up(length: int) -> int:
    """To a multiple of 8."""
    return -(-length // 8) * 8


def lengths(end: Tensor) -> tuple[int, int]:
    """The longest text's number of tokens and the sum of all; `end` [N]: the places of the end-of-text tokens."""
    last, total = torch.stack([end.max(), end.sum()]).tolist()
    return last + 1, total + len(end)


def run_blocks(blocks: nn.ModuleList, x: Tensor, attend: Callable[[Tensor], Tensor], pooled: Tensor) -> Tensor:
    """All blocks over the tokens x [T, D] of all sequences; returns the pooled tokens [N, D].

    attend: packed projections [T, 3, H, D / H] -> [T, D], within each sequence.
    pooled: the row of each sequence's pooled token, [N].
    """
    first, backend = blocks[0].ln_1, blocks[0].attn.backend
    y = ops.layer_norm(x, first.weight, first.bias, first.eps)
    for block, after in zip(blocks, [*blocks[1:], None], strict=True):
        attn = block.attn
        attended = attend(F.linear(y, attn.in_proj_weight, attn.in_proj_bias).unflatten(1, (3, attn.heads, -1)))
        if after is None:
            attended, x = attended[pooled], x[pooled]
        norm = block.ln_2
        x, y = add_layer_norm(attn.out_proj(attended), x, norm.weight, norm.bias, norm.eps, backend=backend)
        y = run_mlp(block.mlp, y, backend)
        if after is not None:
            norm = after.ln_1
            x, y = add_layer_norm(y, x, norm.weight, norm.bias, norm.eps, backend=backend)
    return x + y


def run_mlp(mlp: MLP, y: Tensor, backend: str | None) -> Tensor:
    """y [T, D] -> [T, D], as `mlp(y)`."""
    inner, outer = mlp.c_fc, mlp.c_proj
    if ops.ACTIVATIONS[mlp.activation] is not ops.quick_gelu or inner.bias is None or outer.bias is None:
        return mlp(y)
    hidden = y.new_empty(len(y), inner.out_features)
    if use_kernel("bias_quick_gelu", backend, hidden, inner.bias):
        torch.mm(y, inner.weight.T, out=hidden)
        return outer(bias_quick_gelu(hidden, inner.bias, backend=backend))
    hidden = F.silu(torch.addmm(1.702 * inner.bias, y, inner.weight.T, alpha=1.702, out=hidden), inplace=True)
    return torch.addmm(outer.bias, hidden, outer.weight.T, alpha=1 / 1.702)
