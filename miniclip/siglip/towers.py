"""SigLIP: CLIP's blocks in two towers that differ at their ends, and a bias of the scores (Zhai et al. 2023).

Against OpenAI's: no class token and no ln_pre, but a bias in the patch convolution; an attention pool with an MLP
instead of the projection of the class token; a text tower that is not causal, pools its last token, and has a bias in
its projection; an eps of 1e-6 in every LayerNorm. Letters as in `miniclip.config`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip.models.clip import CLIP
from miniclip.models.transformer import MLP, Attention, LayerNorm, Transformer
from miniclip.siglip.config import EPS, SigLIPConfig, SigLIPViTConfig
from miniclip.siglip.tokenizer import TokenizerError, make_tokenizer


class ProbeAttention(Attention):
    """Multi-head attention from one query, the probe, to all tokens."""

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        self.probe = nn.Parameter(torch.empty(width))
        nn.init.normal_(self.probe, std=width**-0.5)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: [N, L, D] -> the probe's query [N, H, 1, D / H], keys and values of all tokens [N, H, L, D / H]."""
        w_q, w_kv = self.in_proj_weight.tensor_split([len(self.probe)])
        b_q, b_kv = self.in_proj_bias.tensor_split([len(self.probe)])
        q = F.linear(self.probe.to(x.dtype), w_q, b_q).expand(x.shape[0], 1, -1).unflatten(-1, (self.heads, -1))
        k, v = F.linear(x, w_kv, b_kv).unflatten(-1, (2, self.heads, -1)).unbind(2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, L, D] -> [N, D]."""
        pooled = F.scaled_dot_product_attention(*self.project(x))  # [N, H, 1, D / H]
        return self.out_proj(pooled.flatten(1))


class AttentionPool(nn.Module):
    """Tokens [N, L, D] -> [N, D]: attention from the probe, then an MLP with a residual connection."""

    def __init__(self, config: SigLIPViTConfig):
        super().__init__()
        transformer = config.transformer
        self.attn = ProbeAttention(transformer.width, transformer.heads)
        self.ln = LayerNorm(transformer.width)
        self.mlp = MLP(transformer.width, transformer.mlp_width, transformer.activation)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(x)
        return x + self.mlp(self.ln(x))


class SigLIPVisionTransformer(nn.Module):
    """Pixels [N, 3, R, R] -> image embeddings [N, D]."""

    def __init__(self, config: SigLIPViTConfig, embed_dim: int):
        super().__init__()
        self.input_resolution = config.image_size
        self.output_dim = embed_dim
        width, grid = config.transformer.width, config.image_size // config.patch_size
        self.conv1 = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size)
        self.positional_embedding = nn.Parameter(torch.empty(grid**2, width))
        self.transformer = Transformer(config.transformer)
        self.ln_post = LayerNorm(width)
        self.pool = AttentionPool(config)
        nn.init.normal_(self.positional_embedding, std=width**-0.5)

    @property
    def blocks(self) -> list[nn.Module]:
        """The modules that run one after another between the first layers and the last: the transformer's blocks."""
        return list(self.transformer.resblocks)

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv1(image).flatten(2).transpose(1, 2)  # [N, (R / P)^2, D], row by row
        x = self.transformer(x + self.positional_embedding.to(x.dtype))
        return self.pool(self.ln_post(x))


class SigLIP(CLIP):
    """Both towers. Tensors have OpenAI's names wherever OpenAI's CLIP has such a tensor.

    A score is the logit of the probability that a picture and a text belong together: sigmoid(score) for each pair.
    """

    towers: ClassVar = {SigLIPViTConfig: SigLIPVisionTransformer}

    def __init__(self, config: SigLIPConfig):
        super().__init__(config)
        self.transformer.causal = False
        self.text_projection_bias = nn.Parameter(torch.zeros(config.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10)))  # where the paper's training starts, with the bias
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))
        if config.text.tokenizer_size:  # a tensor, so that it goes wherever the weights go
            self.register_buffer("tokenizer_file", torch.zeros(config.text.tokenizer_size, dtype=torch.uint8))
        for module in self.modules():
            if isinstance(module, LayerNorm):
                module.eps = EPS

    def tokenize(self, texts: str | Iterable[str], truncate: bool = False) -> Tensor:
        """Token ids int32 [N, L] by the model's own tokenizer; TokenizerError if it has none."""
        text = self.config.text
        if not text.tokenizer_size:
            raise TokenizerError(
                "the model was loaded without its tokenizer: put its spiece.model, tokenizer.model or tokenizer.json "
                "beside its weights, or name one in load(..., tokenizer=)"
            )
        packed = bytes(self.tokenizer_file.cpu().numpy())
        tokenizer = make_tokenizer(packed, text.cleaning, text.end_token, text.pad_token, text.context_length)
        return tokenizer(texts, truncate)

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """As any CLIP's, but every token attends to the padding too: text must be [N, L] as `tokenize` returns it."""
        if isinstance(text, Tensor) and text.shape[1:] != (self.context_length,):
            raise ValueError(
                f"text is {list(text.shape)}; expected [N, {self.context_length}] with the padding: what this model's "
                "own model.tokenize() returns"
            )
        return super().encode_text(text, normalize)

    def text_embedding(self, text: Tensor) -> Tensor:
        """What `encode_text` computes after its checks: ids [N, L] -> [N, E], of any length."""
        dtype = self.text_projection.dtype
        x = self.token_embedding(text).to(dtype) + self.positional_embedding.to(dtype)
        x = self.ln_final(self.transformer(x))
        return x[:, -1] @ self.text_projection + self.text_projection_bias.to(dtype)  # the last token is pooled

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """As any CLIP's, plus logit_bias. The sigmoid of a score is the probability that the two belong together."""
        logits_per_image, _ = super().forward(image, text)
        logits_per_image = logits_per_image + self.logit_bias
        return logits_per_image, logits_per_image.T
