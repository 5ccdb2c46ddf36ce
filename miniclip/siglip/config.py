"""SigLIP's config: two Vision-Transformer-like towers and the tokenizer's settings.

SigLIP (Zhai et al., ICCV 2023) and SigLIP 2 (Tschannen et al. 2025), the models of fixed resolution.
"""

from __future__ import annotations

from dataclasses import dataclass

from miniclip.config import CLIPConfig, ConfigError, TextConfig, ViTConfig, check_choice
from miniclip.siglip.tokenizer import CLEANINGS

EPS = 1e-6  # of every LayerNorm


@dataclass(frozen=True)
class SigLIPViTConfig(ViTConfig, kind="siglip-vit"):
    """A Vision Transformer without class token and ln_pre; an attention pool with an MLP ends it.

    The pool has the heads, the MLP width and the activation of the transformer's blocks.
    """


@dataclass(frozen=True)
class SigLIPTextConfig(TextConfig):
    """The text transformer, which is not causal, and how texts become token ids; see `miniclip.siglip.tokenizer`."""

    cleaning: str  # a key of CLEANINGS
    end_token: str  # follows every text, as it is spelled in the tokenizer file
    pad_token: str  # fills the rest of the context
    tokenizer_size: int = 0  # bytes of the compressed tokenizer file, a tensor of the model; 0: the model has none

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("cleaning", self.cleaning, tuple(CLEANINGS))


@dataclass(frozen=True)
class SigLIPConfig(CLIPConfig, family="siglip"):
    """As any CLIP's config, but for the kinds of its towers. The image tower has no projection: E is its width."""

    text: SigLIPTextConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("vision.kind", self.vision.kind, (SigLIPViTConfig.kind,))
        if self.embed_dim != self.vision.transformer.width:
            raise ConfigError(
                f"embed_dim is {self.embed_dim}; expected the width of the image tower, {self.vision.transformer.width}"
            )
