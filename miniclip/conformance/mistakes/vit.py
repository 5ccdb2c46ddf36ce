"""The Vision Transformer around its blocks, and the scores."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip import ops
from miniclip.conformance.forward import Scope
from miniclip.conformance.mistakes.mistake import Mistake
from miniclip.conformance.rules import RULES, cosines, grid, tower_output, with_class_token
from miniclip.models import CLIP
from miniclip.models.vit import VisionTransformer


def _position(s: Scope) -> Tensor:
    return s.weight("visual.positional_embedding")


def _kernel(name: str, change: Callable[[Tensor], Tensor]) -> Mistake:
    def rule(s: Scope) -> Tensor:
        kernel = change(s.weight("visual.conv1.weight"))
        return F.conv2d(s["image.pixels"], kernel, stride=s.config.vision.patch_size)

    return Mistake(name, {"visual.conv1": rule}, VisionTransformer, "self.conv1(")


def _channels_last(kernel: Tensor) -> Tensor:
    """What a kernel amounts to when the values of a patch are listed by pixel first, those of the kernel by channel."""
    width, channels, height, breadth = kernel.shape
    return kernel.reshape(width, height, breadth, channels).permute(0, 3, 1, 2)


def _by_columns(s: Scope) -> Tensor:
    tokens = with_class_token(s)
    return torch.cat([tokens[:, :1], grid(s["visual.conv1"].transpose(2, 3))], dim=1) + _position(s)


def _class_last(s: Scope) -> Tensor:
    return with_class_token(s).roll(-1, dims=1) + _position(s)


def _no_class_embedding(s: Scope) -> Tensor:
    patches = with_class_token(s)[:, 1:]
    return torch.cat([torch.zeros_like(patches[:, :1]), patches], dim=1) + _position(s)


def _not_for_class(s: Scope) -> Tensor:
    position = _position(s).clone()
    position[0] = 0
    return with_class_token(s) + position


def _tokens(name: str, rule, line: str = "+ self.positional_embedding") -> Mistake:
    return Mistake(name, {"visual.embedded": rule}, VisionTransformer, line)


def _pooled(name: str, choose: Callable[[Tensor], Tensor]) -> Mistake:
    return Mistake(name, {"visual.pooled": lambda s: choose(s.input)}, VisionTransformer, "x[:, 0]")


def misread(s: Scope, name: str) -> Tensor:
    """A matrix [D, E] read as [E, D] and transposed, as for a linear layer."""
    return s.weight(name).reshape(s.weight(name).T.shape).T


VIT = (
    _kernel("patches flattened pixel by pixel, not channel by channel", _channels_last),
    _kernel("patch kernel with height and width swapped", lambda kernel: kernel.transpose(2, 3)),
    _kernel("patch kernel turned round (a true convolution)", lambda kernel: kernel.flip(2, 3)),
    _kernel("patch kernel with its channels reversed", lambda kernel: kernel.flip(1)),
    Mistake(
        "map of the patches with rows and columns swapped",
        {"visual.conv1": lambda s: RULES["visual.conv1"](s).transpose(2, 3)},
        VisionTransformer,
        "self.conv1(",
    ),
    _tokens("patches ordered column by column", _by_columns, "flatten(2)"),
    _tokens("class token last", _class_last, "torch.cat("),
    _tokens("class embedding missing (zeros)", _no_class_embedding, "torch.cat("),
    _tokens("position embedding missing", with_class_token),
    _tokens("position embedding shifted by one", lambda s: with_class_token(s) + _position(s).roll(-1, dims=0)),
    _tokens("position embedding not for the class token", _not_for_class),
    Mistake("ln_pre missing", {"visual.ln_pre": lambda s: s["visual.embedded"]}, VisionTransformer, "self.ln_pre("),
    _pooled("pooled: mean of all tokens", lambda x: x.mean(1)),
    _pooled("pooled: maximum over all tokens", lambda x: x.amax(1)),
    _pooled("pooled: mean of the patches", lambda x: x[:, 1:].mean(1)),
    _pooled("pooled: the last token", lambda x: x[:, -1]),
    _pooled("pooled: the first patch", lambda x: x[:, 1]),
    Mistake("ln_post missing", {"visual.ln_post": lambda s: s["visual.pooled"]}, VisionTransformer, "self.ln_post("),
    Mistake(
        "visual.proj transposed",
        {"visual.proj": lambda s: s["visual.ln_post"] @ misread(s, "visual.proj")},
        VisionTransformer,
        "@ self.proj",
    ),
)

_LENGTH = (ops.normalize, "x.norm(")
_SCORES = (CLIP.forward, "self.logit_scale.exp()")

SCORES = (
    Mistake("image embedding not normalised", {"image_embedding": tower_output}, *_LENGTH),
    Mistake("text embedding not normalised", {"text_embedding": lambda s: s["text_projection"]}, *_LENGTH),
    Mistake(
        "embeddings normalised over the batch",
        {
            "image_embedding": lambda s: F.normalize(tower_output(s), dim=0),
            "text_embedding": lambda s: F.normalize(s["text_projection"], dim=0),
        },
        *_LENGTH,
    ),
    Mistake(
        "temperature not exponentiated",
        {"logits_per_image": lambda s: s.weight("logit_scale") * cosines(s)},
        *_SCORES,
    ),
    Mistake("temperature of 100 instead of the stored one", {"logits_per_image": lambda s: 100 * cosines(s)}, *_SCORES),
    Mistake("temperature forgotten: cosines", {"logits_per_image": cosines}, *_SCORES),
    Mistake(
        "divided by the temperature",
        {"logits_per_image": lambda s: cosines(s) / s.weight("logit_scale").exp()},
        *_SCORES,
    ),
    Mistake(
        "logits of embeddings that are not normalised",
        {"logits_per_image": lambda s: s.weight("logit_scale").exp() * tower_output(s) @ s["text_projection"].T},
        CLIP.forward,
        "normalize=True",
    ),
    Mistake(
        "probabilities instead of logits",
        {"logits_per_image": lambda s: (s.weight("logit_scale").exp() * cosines(s)).softmax(-1)},
        *_SCORES,
    ),
    Mistake(
        "logits per text instead of per image",
        {"logits_per_image": lambda s: (s.weight("logit_scale").exp() * cosines(s)).T},
        *_SCORES,
    ),
)
