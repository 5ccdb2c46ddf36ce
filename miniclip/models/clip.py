"""CLIP: an image tower and a text tower that embed into one space (Radford et al. 2021, figure 3)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from miniclip import ops, tokenizer
from miniclip.config import CLIPConfig, ResNetConfig, VisionConfig, ViTConfig, from_arguments
from miniclip.kernels.dispatch import check_backend
from miniclip.models.resnet import ModifiedResNet
from miniclip.models.text import TextTransformer
from miniclip.models.transformer import Attention
from miniclip.models.vit import VisionTransformer


class CLIP(TextTransformer):
    """Both towers. The state dict has exactly the names and shapes of OpenAI's checkpoints.

    There the text tower's tensors stand at the top level, beside `visual.*` and `logit_scale`. That is why CLIP *is* a
    TextTransformer that has an image tower, rather than having both.

    A family with other image towers is a subclass, with `towers` of its own.
    """

    towers: ClassVar[dict[type[VisionConfig], type[nn.Module]]] = {
        ViTConfig: VisionTransformer,
        ResNetConfig: ModifiedResNet,
    }

    def __init__(self, config: CLIPConfig):
        super().__init__(config.text, config.embed_dim)
        self.config = config
        self.visual = self.towers[type(config.vision)](config.vision, config.embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # the logarithm of the temperature's inverse
        self.register_parameter("logit_bias", None)  # in a family that has it, the sigmoid of a score is a probability

    @classmethod
    def from_arguments(cls, *arguments: Any, **named: Any) -> CLIP:
        """A new model with random weights, from the arguments of openai/CLIP's constructor, in its order or by name.

            CLIP.from_arguments(
                embed_dim=512, image_resolution=32, vision_layers=(2, 2, 2, 2), vision_width=32,
                vision_patch_size=None, context_length=77, vocab_size=49408,
                transformer_width=512, transformer_heads=8, transformer_layers=6,
            )

        Also activation="gelu", and mean and std of the pixels: (0.5, 0.5, 0.5) for both maps pixels to [-1, 1]. As
        there, the model is in training mode. `miniclip.config.from_arguments` has the details. ConfigError names the
        argument that is wrong.
        """
        return cls(from_arguments(*arguments, **named))

    @property
    def dtype(self) -> torch.dtype:
        """What the towers compute in, and return."""
        return self.text_projection.dtype

    def tokenize(self, texts: str | Iterable[str], truncate: bool = False) -> Tensor:
        """Token ids int32 [N, L] for `encode_text`, by the model's own tokenizer; see `miniclip.tokenizer.tokenize`."""
        return tokenizer.tokenize(texts, self.context_length, truncate)

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Embed pixels.

        image: float [N, 3, R, R] as `preprocess` gives them, of any float dtype, on the model's device.
        Returns [N, E] in the model's dtype, of unit length if `normalize`. TypeError or ValueError for anything else.
        """
        size = self.visual.input_resolution
        expected = f"expected float pixels [N, 3, {size}, {size}]: stack what preprocess() returns for each picture"
        if not isinstance(image, Tensor):
            raise TypeError(f"image is of type {type(image).__name__}; {expected}")
        if image.ndim != 4 or image.shape[1:] != (3, size, size) or not image.is_floating_point():
            raise ValueError(f"image is {image.dtype} {list(image.shape)}; {expected}")
        embedding = self.image_embedding(image.to(self.dtype))
        return ops.normalize(embedding) if normalize else embedding

    def image_embedding(self, image: Tensor) -> Tensor:
        """What `encode_image` computes after its checks: pixels in the model's dtype -> [N, E], of any length."""
        return self.visual(image)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Score every image against every text.

        Returns (logits_per_image [N_images, N_texts], logits_per_text, its transpose): cosines times exp(logit_scale).
        """
        image_embedding = self.encode_image(image, normalize=True)
        text_embedding = self.encode_text(text, normalize=True)
        logits_per_image = self.logit_scale.exp() * image_embedding @ text_embedding.T
        return logits_per_image, logits_per_image.T


def convert_weights(model: CLIP, dtype: torch.dtype) -> CLIP:
    """Cast a model in place, as OpenAI's checkpoints are stored.

    In float16 or bfloat16 only the matrices and the biases added to them are cast: convolutions, linear layers,
    attention and the two projections. Embeddings, norms and the temperature stay float32. Any other float dtype is
    taken by all of the model.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    model.to(torch.float32 if half else dtype)
    if half:
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.to(dtype)
            elif isinstance(module, Attention):
                module.in_proj_weight.data = module.in_proj_weight.data.to(dtype)
                module.in_proj_bias.data = module.in_proj_bias.data.to(dtype)
        for projection in (getattr(model, "text_projection", None), getattr(model.visual, "proj", None)):
            if isinstance(projection, nn.Parameter):  # some towers end in a linear layer instead
                projection.data = projection.data.to(dtype)
    return model


def set_backend(model: CLIP, backend: str | None) -> CLIP:
    """Choose what attention runs as, in place: "torch", "triton", or None, whichever was measured to be faster.

    Raises ValueError if the model can't run Triton's kernels: they need a GPU, float16 or bfloat16, and Triton. A model
    that is moved to a CPU afterwards runs in PyTorch there, whatever its backend.
    """
    check_backend(backend, model.logit_scale.device, model.dtype)
    for module in model.modules():
        if isinstance(module, Attention):
            module.backend = backend
    return model
