"""How every stage follows from the stages before it: `RULES` has one line of code for each kind of stage.

A stage says in its family's table which rule is its own. `trace` computes by them what is no tensor in the model, and
checks the rest by them; `diagnose` replaces them by mistakes. Everything is float32 on the CPU, and
tests/conformance/test_trace.py holds each rule equal to what the model computes.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from miniclip import ops, preprocess
from miniclip.conformance.forward import Rule, Scope

# Pillow's modes, by their number of bands. A picture of another mode has no image.decoded and image.resized.
PICTURE_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def picture(bands: Tensor) -> Image.Image:
    """uint8 [h, w, B] -> a picture of that mode."""
    mode = PICTURE_MODES[bands.shape[2]]
    return Image.frombytes(mode, (bands.shape[1], bands.shape[0]), bands.contiguous().numpy().tobytes())


def bands(image: Image.Image) -> Tensor:
    """The inverse of `picture`."""
    array = np.array(image)
    return torch.from_numpy(array if array.ndim == 3 else array[..., None])


def utf8(texts: list[str]) -> Tensor:
    encoded = b"".join(text.encode("utf-8", "surrogatepass") + b"\xff" for text in texts)
    return torch.tensor(list(encoded), dtype=torch.uint8)


def strings(stage: Tensor) -> list[str]:
    """The inverse of `utf8`."""
    return [text.decode("utf-8", "surrogatepass") for text in bytes(stage.tolist()).split(b"\xff")[:-1]]


def resize(s: Scope, image: Image.Image | None = None, **changes) -> Image.Image:
    config = s.config.preprocess
    options = {"interpolation": config.interpolation, "resize_mode": config.resize_mode} | changes
    return preprocess.resize(image or picture(s["image.decoded"]), config.image_size, **options)


def grid(x: Tensor) -> Tensor:
    """[N, C, h, w] -> [N, h * w, C], row by row."""
    return x.flatten(2).transpose(1, 2)


def with_class_token(s: Scope) -> Tensor:
    patches = grid(s["visual.conv1"])
    return torch.cat([s.weight("visual.class_embedding").expand(len(patches), 1, -1), patches], dim=1)


def with_mean(s: Scope) -> Tensor:
    positions = grid(s.input)
    return torch.cat([positions.mean(dim=1, keepdim=True), positions], dim=1)


def positions(s: Scope) -> Tensor:
    return s.weight("positional_embedding")[: s["text.ids"].shape[1]]


def row(x: Tensor, index: Tensor) -> Tensor:
    """Row `index[n]` of every x[n]."""
    return x[torch.arange(len(x)), index]


def pool_probabilities(s: Scope, scale: float | None = None) -> Tensor:
    q, k = s["visual.attnpool.q"], s["visual.attnpool.k"]
    return (q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)).softmax(-1)


def tower_output(s: Scope) -> Tensor:
    """The image's embedding before it is normalised."""
    return s.input_of("image_embedding")


def shortcut(s: Scope) -> Tensor:
    return s[".downsample.1"] if s.block.endswith(".0") else s.input


def cosines(s: Scope) -> Tensor:
    return s["image_embedding"] @ s["text_embedding"].T


RULES: dict[str, Rule] = {
    # the picture
    "image.resized": lambda s: bands(resize(s)),
    "image.cropped": lambda s: torch.from_numpy(
        preprocess.to_pixels(preprocess.center_crop(picture(s["image.resized"]), s.config.preprocess.image_size))
    ),
    "image.pixels": lambda s: preprocess.normalize(
        s["image.cropped"].numpy(), s.config.preprocess.mean, s.config.preprocess.std
    )[None],
    # the ViT
    "visual.conv1": lambda s: s.conv(s["image.pixels"], "visual.conv1", stride=s.config.vision.patch_size),
    "visual.embedded": lambda s: with_class_token(s) + s.weight("visual.positional_embedding"),
    "visual.ln_pre": lambda s: s.layer_norm(s["visual.embedded"], "visual.ln_pre"),
    "visual.pooled": lambda s: s.input[:, 0],
    "visual.ln_post": lambda s: s.layer_norm(s["visual.pooled"], "visual.ln_post"),
    "visual.proj": lambda s: s["visual.ln_post"] @ s.weight("visual.proj"),
    # a block of either transformer
    "resblock.ln_1": lambda s: s.layer_norm(s.input, ".ln_1"),
    "resblock.attn.q": lambda s: s.projected(0),
    "resblock.attn.k": lambda s: s.projected(1),
    "resblock.attn.v": lambda s: s.projected(2),
    "resblock.attn.probabilities": lambda s: (s.scores() * s[".attn.q"].shape[-1] ** -0.5 + s.mask()).softmax(-1),
    "resblock.attn.context": lambda s: (s[".attn.probabilities"] @ s[".attn.v"]).transpose(1, 2).flatten(2),
    "resblock.attn.out_proj": lambda s: s.linear(s[".attn.context"], ".attn.out_proj"),
    "resblock.residual": lambda s: s.input + s[".attn.out_proj"],
    "resblock.ln_2": lambda s: s.layer_norm(s[".residual"], ".ln_2"),
    "resblock.mlp.c_fc": lambda s: s.linear(s[".ln_2"], ".mlp.c_fc"),
    "resblock.mlp.activation": lambda s: ops.ACTIVATIONS[s.stack.activation](s[".mlp.c_fc"]),
    "resblock.mlp.c_proj": lambda s: s.linear(s[".mlp.activation"], ".mlp.c_proj"),
    "resblock": lambda s: s[".residual"] + s[".mlp.c_proj"],
    # the ResNet
    "stem.conv1": lambda s: s.conv(s["image.pixels"], "visual.conv1", stride=2, padding=1),
    "stem.bn1": lambda s: s.batch_norm(s["visual.conv1"], "visual.bn1"),
    "stem.relu1": lambda s: F.relu(s["visual.bn1"]),
    "stem.conv2": lambda s: s.conv(s["visual.relu1"], "visual.conv2", padding=1),
    "stem.bn2": lambda s: s.batch_norm(s["visual.conv2"], "visual.bn2"),
    "stem.relu2": lambda s: F.relu(s["visual.bn2"]),
    "stem.conv3": lambda s: s.conv(s["visual.relu2"], "visual.conv3", padding=1),
    "stem.bn3": lambda s: s.batch_norm(s["visual.conv3"], "visual.bn3"),
    "stem.relu3": lambda s: F.relu(s["visual.bn3"]),
    "stem.avgpool": lambda s: F.avg_pool2d(s["visual.relu3"], 2),
    "bottleneck.downsample.-1": lambda s: F.avg_pool2d(s.input, s.stride),
    "bottleneck.downsample.0": lambda s: s.conv(
        s[".downsample.-1"] if s.stride > 1 else s.input, ".downsample.0"
    ),
    "bottleneck.downsample.1": lambda s: s.batch_norm(s[".downsample.0"], ".downsample.1"),
    "bottleneck.conv1": lambda s: s.conv(s.input, ".conv1"),
    "bottleneck.bn1": lambda s: s.batch_norm(s[".conv1"], ".bn1"),
    "bottleneck.relu1": lambda s: F.relu(s[".bn1"]),
    "bottleneck.conv2": lambda s: s.conv(s[".relu1"], ".conv2", padding=1),
    "bottleneck.bn2": lambda s: s.batch_norm(s[".conv2"], ".bn2"),
    "bottleneck.relu2": lambda s: F.relu(s[".bn2"]),
    "bottleneck.avgpool": lambda s: F.avg_pool2d(s[".relu2"], s.stride),
    "bottleneck.conv3": lambda s: s.conv(s[".avgpool" if s.stride > 1 else ".relu2"], ".conv3"),
    "bottleneck.bn3": lambda s: s.batch_norm(s[".conv3"], ".bn3"),
    "bottleneck": lambda s: F.relu(s[".bn3"] + shortcut(s)),
    "visual.attnpool.embedded": lambda s: with_mean(s) + s.weight("visual.attnpool.positional_embedding"),
    "visual.attnpool.q": lambda s: s.cut(s.linear(s["visual.attnpool.embedded"][:, :1], "visual.attnpool.q_proj")),
    "visual.attnpool.k": lambda s: s.cut(s.linear(s["visual.attnpool.embedded"], "visual.attnpool.k_proj")),
    "visual.attnpool.v": lambda s: s.cut(s.linear(s["visual.attnpool.embedded"], "visual.attnpool.v_proj")),
    "visual.attnpool.probabilities": pool_probabilities,
    "visual.attnpool.context": lambda s: (s["visual.attnpool.probabilities"] @ s["visual.attnpool.v"]).flatten(1),
    "visual.attnpool.c_proj": lambda s: s.linear(s["visual.attnpool.context"], "visual.attnpool.c_proj"),
    "image_embedding": lambda s: ops.normalize(s.input),
    # the text
    "text.ids": lambda s: s.tokenize(strings(s["text.utf8"]), truncate=True),
    "token_embedding": lambda s: s.weight("token_embedding.weight")[s["text.ids"].long()],
    "text.embedded": lambda s: s["token_embedding"] + positions(s),
    "ln_final": lambda s: s.layer_norm(s.input, "ln_final"),
    "text.pooled": lambda s: row(s["ln_final"], s["text.ids"].argmax(-1)),
    "text_projection": lambda s: s["text.pooled"] @ s.weight("text_projection"),
    "text_embedding": lambda s: ops.normalize(s["text_projection"]),
    "logits_per_image": lambda s: s.weight("logit_scale").exp() * cosines(s),
    "biased logits_per_image": lambda s: s.weight("logit_scale").exp() * cosines(s) + s.weight("logit_bias"),
}  # fmt: skip
