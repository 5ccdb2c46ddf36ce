"""The residual attention blocks that the image and the text transformer share. Shape letters: see `miniclip.config`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from miniclip import ops
from miniclip.config import TransformerConfig


class LayerNorm(nn.LayerNorm):
    """Layer normalisation that keeps its own float32 weights and arithmetic in a half-precision model."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class Attention(nn.Module):
    """Multi-head self-attention. The parameters are named as torch.nn.MultiheadAttention's, as in the checkpoints."""

    backend: str | None = None  # see `miniclip.models.clip.set_backend`

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))  # rows: queries, keys, values
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        """x: [N, L, D] -> [N, L, D]."""
        qkv = nn.functional.linear(x, self.in_proj_weight, self.in_proj_bias)
        qkv = qkv.unflatten(-1, (3, self.heads, -1))  # [N, L, 3, H, D / H]
        return self.out_proj(ops.attention(qkv, causal, backend=self.backend))


class MLP(nn.Module):
    """Two linear layers around the activation."""

    def __init__(self, width: int, hidden: int, activation: str):
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.c_proj = nn.Linear(hidden, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(ops.ACTIVATIONS[self.activation](self.c_fc(x)))


class ResidualAttentionBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.attn = Attention(config.width, config.heads)
        self.ln_1 = LayerNorm(config.width)
        self.mlp = MLP(config.width, config.mlp_width, config.activation)
        self.ln_2 = LayerNorm(config.width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks over x [N, L, D]; batch first, where openai/CLIP puts the sequence first.

    length: the L that x must have, so that a caller who permutes to [L, N, D] gets an error; None: any.
    """

    def __init__(self, config: TransformerConfig, causal: bool = False, length: int | None = None):
        super().__init__()
        self.causal, self.length = causal, length
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(config) for _ in range(config.layers))

    def forward(self, x: Tensor, length: int | None = None) -> Tensor:
        """x: [N, L, D] -> [N, L, D]. length: L, where it is another than the tower's."""
        length = length or self.length
        if length is not None and x.shape[1] != length:
            advice = f"expected [N, {length}, D]: batch first, without the permute that openai/CLIP's transformer needs"
            raise ValueError(f"x is {list(x.shape)}; {advice}")
        for block in self.resblocks:
            x = block(x, self.causal)
        return x
