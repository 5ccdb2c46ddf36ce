"""The causal text transformer (GPT-2's architecture, Radford et al. 2019, with CLIP's projection on top)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from miniclip import ops
from miniclip.config import TextConfig
from miniclip.models.transformer import LayerNorm, Transformer


class TextTransformer(nn.Module):
    """Token ids [N, L] -> text embeddings [N, E]."""

    def __init__(self, config: TextConfig, embed_dim: int):
        super().__init__()
        self.context_length = config.context_length
        self.vocab_size = config.vocab_size
        width = config.transformer.width
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, width))
        self.transformer = Transformer(config.transformer, causal=True, length=config.context_length)
        self.ln_final = LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, embed_dim))
        self._initialize()

    def _initialize(self) -> None:
        """Normal weights, narrower where branches add up over the depth; biases are left as PyTorch starts them."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        width, depth = self.ln_final.weight.shape[0], len(self.transformer.resblocks)
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * depth) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * depth) ** -0.5)
        nn.init.normal_(self.text_projection, std=width**-0.5)

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Embed token ids.

        text: integers [N, L] as `tokenize` gives them, L <= context_length, on the model's device.
        Returns [N, E] in the model's dtype, of unit length if `normalize`. TypeError or ValueError for anything else;
        on a GPU, ids outside the vocabulary make all later work of the process fail.
        """
        expected = f"expected integer token ids [N, L] with L <= {self.context_length}: what tokenize() returns"
        if not isinstance(text, Tensor):
            raise TypeError(f"text is of type {type(text).__name__}; {expected}")
        if text.ndim != 2 or text.shape[1] > self.context_length or text.is_floating_point():
            raise ValueError(f"text is {text.dtype} {list(text.shape)}; {expected}")
        try:
            embedding = self.text_embedding(text)
        except IndexError as error:
            found = f"from {text.min()} to {text.max()}"
            raise ValueError(f"text has ids {found}; this model's are from 0 to {self.vocab_size - 1}") from error
        return ops.normalize(embedding) if normalize else embedding

    def text_embedding(self, text: Tensor) -> Tensor:
        """What `encode_text` computes after its checks: ids [N, L] -> [N, E], of any length."""
        dtype = self.text_projection.dtype
        x = self.token_embedding(text).to(dtype)
        x = x + self.positional_embedding[: text.shape[1]].to(dtype)
        x = self.ln_final(self.transformer(x, length=x.shape[1]))
        # The output at the end-of-text token is pooled. The padding after it has no influence: attention is causal.
        return x[torch.arange(x.shape[0], device=x.device), self.end_of_text(text)] @ self.text_projection

    def end_of_text(self, text: Tensor) -> Tensor:
        """The place of the end-of-text token, [N]: its id is the largest; argmax takes its first occurrence."""
        return text.argmax(dim=-1)
