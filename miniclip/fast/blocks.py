"""A transformer's blocks on a CPU, over the tokens of all sequences in one matrix [T, D]. What is saved:

- In the last block, only the pooled token of each sequence is a query, and only it goes through the MLP.
- QuickGELU(x) = SiLU(1.702 x) / 1.702. The norm before and the product after absorb the two factors.
- Products apply the activation and add the residual themselves (linear.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from miniclip import ops
from miniclip.fast import half
from miniclip.fast.linear import Linear, Norm, linear, norm
from miniclip.fast.pooled import SingleQueryAttention, in_block
from miniclip.models.transformer import ResidualAttentionBlock

QUICK_GELU = 1.702


class Block(NamedTuple):
    """A residual attention block; in the last one `qkv` has a single query for each sequence."""

    norm_1: Norm
    qkv: Linear | SingleQueryAttention
    out: Linear
    norm_2: Norm
    fc: Linear
    activation: str
    proj: Linear


class Arithmetic(NamedTuple):
    """What a tower is computed in."""

    dtype: torch.dtype  # of activations
    product: Callable[..., Linear] = linear  # makes the products of a transformer's blocks


def prepare_blocks(blocks: nn.ModuleList, derive: Callable, arithmetic: Arithmetic) -> list[Block]:
    """What `run_blocks` takes. derive: see `Prepared.get`.

    FBGEMM packs a weight on one core, so that several blocks are packed at a time; oneDNN uses all cores.
    """
    threads = torch.get_num_threads() if blocks[0].mlp.c_fc.weight.dtype in half.EMULATED else 1
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(partial(_prepare, derive, arithmetic), blocks, [*[False] * (len(blocks) - 1), True]))


def _prepare(derive: Callable, arithmetic: Arithmetic, block: ResidualAttentionBlock, is_last: bool) -> Block:
    dtype, make = arithmetic
    attn, mlp, norm_1, norm_2 = block.attn, block.mlp, block.ln_1, block.ln_2
    if is_last:
        qkv = derive(in_block, attn.in_proj_weight, attn.in_proj_bias, attn.heads, dtype)
    else:
        qkv = derive(make, attn.in_proj_weight, attn.in_proj_bias, dtype)
    is_quick = ops.ACTIVATIONS[mlp.activation] is ops.quick_gelu
    factor = QUICK_GELU if is_quick else 1.0
    return Block(
        derive(norm, norm_1.weight, norm_1.bias, norm_1.eps),
        qkv,
        derive(make, attn.out_proj.weight, attn.out_proj.bias, dtype),
        derive(norm, norm_2.weight, norm_2.bias, norm_2.eps, factor),
        derive(make, mlp.c_fc.weight, mlp.c_fc.bias, dtype, 1.0, factor),
        "silu" if is_quick else mlp.activation,
        derive(make, mlp.c_proj.weight, mlp.c_proj.bias, dtype, 1 / factor, 1.0),
    )


def run_blocks(
    blocks: Sequence[Block],
    x: Tensor,
    attend: Callable[[Tensor], Tensor],
    attend_from_pooled: Callable[[SingleQueryAttention, Tensor], Tensor],
    pooled: Tensor,
) -> Tensor:
    """All blocks over the tokens x [T, D], which may be overwritten; returns the pooled tokens [N, D].

    attend: packed projections [T, 3 D] -> [T, D], within each sequence.
    attend_from_pooled: the last block's attention, tokens [T, D] -> [N, D].
    pooled: the row of each sequence's pooled token, [N].
    """
    for block in blocks:
        y = block.norm_1(x)
        if block is blocks[-1]:
            attended, x = attend_from_pooled(block.qkv, y), x[pooled]
        else:
            attended = attend(block.qkv(y))
        x = block.out.add(attended, x)
        x = block.proj.add(block.fc(block.norm_2(x), block.activation), x)
    return x
