"""CLIP in plain NumPy, written from tests/conformance/README.md: every stage of both towers, ViT and ModifiedResNet.

    miniclip convert tiny-ViT tiny-ViT.safetensors
    miniclip trace --model tiny-ViT --image cat.png --text "a cat" -o golden.safetensors
    python examples/port_numpy.py tiny-ViT.safetensors golden.safetensors mine.safetensors
    miniclip compare golden.safetensors mine.safetensors

From the golden file it takes only what a port starts from: the decoded picture (without one, the pixels) and token ids.
Arithmetic is float32, the activation QuickGELU and heads are 64 wide, as in OpenAI's models.
"""

from __future__ import annotations

import json
import sys

import numpy as np
from port_picture import prepare

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "u1"}
EPS = np.float32(1e-5)  # of LayerNorm and of BatchNorm
HEAD_WIDTH = 64

Weights = dict[str, np.ndarray]


class Stages(dict):
    """The tensors recorded so far. `stages(name, x)` records x under a name, and gives it back."""

    def __call__(self, name: str, value: np.ndarray) -> np.ndarray:
        self[name] = value
        return value


# Files


def read_safetensors(path: str) -> dict[str, np.ndarray]:
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        data = file.read()
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            tensors[name] = np.frombuffer(data[start:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def write_safetensors(tensors: dict[str, np.ndarray], path: str) -> None:
    header, chunks, position = {}, [], 0
    for name, tensor in tensors.items():
        dtype = next(key for key, code in DTYPES.items() if np.dtype(code) == tensor.dtype)
        chunks.append(tensor.tobytes())
        end = position + len(chunks[-1])
        header[name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + b"".join(chunks))


# What the towers are made of


def linear(x: np.ndarray, w: Weights, name: str) -> np.ndarray:
    return x @ w[f"{name}weight"].T + w[f"{name}bias"]


def layer_norm(x: np.ndarray, w: Weights, name: str) -> np.ndarray:
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPS) * w[f"{name}.weight"] + w[f"{name}.bias"]


def batch_norm(x: np.ndarray, w: Weights, name: str) -> np.ndarray:
    mean, var, weight, bias = (
        w[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / np.sqrt(var + EPS) * weight + bias


def convolve(x: np.ndarray, weight: np.ndarray, stride: int = 1, padding: int = 0) -> np.ndarray:
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], axis=(2, 3))
    return np.einsum("nchwij,ocij->nohw", windows[:, :, ::stride, ::stride], weight, optimize=True)


def average_pool(x: np.ndarray, side: int) -> np.ndarray:
    n, channels, height, width = x.shape
    return x.reshape(n, channels, height // side, side, width // side, side).mean(axis=(3, 5))


def quick_gelu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(np.float32(-1.702) * x))


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).sum(axis=-1, keepdims=True))


def split_heads(x: np.ndarray) -> np.ndarray:
    """[N, L, D] -> [N, H, L, d]"""
    return x.reshape(*x.shape[:2], -1, HEAD_WIDTH).transpose(0, 2, 1, 3)


def attend(stages: Stages, name: str, q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool) -> np.ndarray:
    """q, k, v: [N, L, D] -> [N, L of q, D]"""
    q, k, v = (stages(f"{name}.{letter}", split_heads(x)) for letter, x in zip("qkv", (q, k, v), strict=True))
    scores = q @ k.swapaxes(2, 3) / np.float32(np.sqrt(HEAD_WIDTH))
    if causal:
        scores = np.where(np.tri(scores.shape[-1], dtype=bool), scores, np.float32("-inf"))
    context = stages(f"{name}.probabilities", softmax(scores)) @ v
    return context.transpose(0, 2, 1, 3).reshape(len(q), q.shape[2], -1)


def transformer(stages: Stages, w: Weights, prefix: str, x: np.ndarray, causal: bool) -> np.ndarray:
    layer = 0
    while f"{prefix}{layer}.ln_1.weight" in w:
        block = f"{prefix}{layer}"
        norm = stages(f"{block}.ln_1", layer_norm(x, w, f"{block}.ln_1"))
        q, k, v = np.split(linear(norm, w, f"{block}.attn.in_proj_"), 3, axis=-1)
        context = stages(f"{block}.attn.context", attend(stages, f"{block}.attn", q, k, v, causal))
        attention = stages(f"{block}.attn.out_proj", linear(context, w, f"{block}.attn.out_proj."))
        x = stages(f"{block}.residual", x + attention)
        norm = stages(f"{block}.ln_2", layer_norm(x, w, f"{block}.ln_2"))
        hidden = stages(f"{block}.mlp.c_fc", linear(norm, w, f"{block}.mlp.c_fc."))
        hidden = stages(f"{block}.mlp.activation", quick_gelu(hidden))
        x = stages(block, x + stages(f"{block}.mlp.c_proj", linear(hidden, w, f"{block}.mlp.c_proj.")))
        layer += 1
    return x


# The image towers: pixels [N, 3, R, R] -> embeddings [N, E], not yet of unit length


def vit(stages: Stages, w: Weights, pixels: np.ndarray) -> np.ndarray:
    kernel = w["visual.conv1.weight"]
    patches = stages("visual.conv1", convolve(pixels, kernel, stride=kernel.shape[-1]))
    patches = patches.reshape(*patches.shape[:2], -1).transpose(0, 2, 1)
    class_token = np.broadcast_to(w["visual.class_embedding"], (len(patches), 1, patches.shape[2]))
    x = np.concatenate([class_token, patches], axis=1) + w["visual.positional_embedding"]
    x = stages("visual.ln_pre", layer_norm(stages("visual.embedded", x), w, "visual.ln_pre"))
    x = transformer(stages, w, "visual.transformer.resblocks.", x, causal=False)
    x = stages("visual.ln_post", layer_norm(stages("visual.pooled", x[:, 0]), w, "visual.ln_post"))
    return stages("visual.proj", x @ w["visual.proj"])


def convolution(stages: Stages, w: Weights, x: np.ndarray, scope: str, n: int, stride: int = 1, padding: int = 0):
    """The n-th convolution under `scope`, with the BatchNorm and the ReLU that follow it."""
    conv, norm, relu = f"{scope}.conv{n}", f"{scope}.bn{n}", f"{scope}.relu{n}"
    x = stages(conv, convolve(x, w[f"{conv}.weight"], stride, padding))
    return stages(relu, np.maximum(stages(norm, batch_norm(x, w, norm)), 0))


def bottleneck(stages: Stages, w: Weights, x: np.ndarray, block: str, stride: int) -> np.ndarray:
    shortcut = x
    if f"{block}.downsample.0.weight" in w:
        if stride > 1:
            shortcut = stages(f"{block}.downsample.-1", average_pool(x, stride))
        shortcut = stages(f"{block}.downsample.0", convolve(shortcut, w[f"{block}.downsample.0.weight"]))
        shortcut = stages(f"{block}.downsample.1", batch_norm(shortcut, w, f"{block}.downsample.1"))
    x = convolution(stages, w, x, block, 1)
    x = convolution(stages, w, x, block, 2, padding=1)
    if stride > 1:
        x = stages(f"{block}.avgpool", average_pool(x, stride))
    x = stages(f"{block}.conv3", convolve(x, w[f"{block}.conv3.weight"]))
    return stages(block, np.maximum(stages(f"{block}.bn3", batch_norm(x, w, f"{block}.bn3")) + shortcut, 0))


def resnet(stages: Stages, w: Weights, pixels: np.ndarray) -> np.ndarray:
    x = convolution(stages, w, pixels, "visual", 1, stride=2, padding=1)
    x = convolution(stages, w, x, "visual", 2, padding=1)
    x = convolution(stages, w, x, "visual", 3, padding=1)
    x = stages("visual.avgpool", average_pool(x, 2))
    for layer in (1, 2, 3, 4):
        number = 0
        while f"visual.layer{layer}.{number}.conv1.weight" in w:
            stride = 2 if layer > 1 and number == 0 else 1
            x = bottleneck(stages, w, x, f"visual.layer{layer}.{number}", stride)
            number += 1
    pool = "visual.attnpool"
    x = x.reshape(*x.shape[:2], -1).transpose(0, 2, 1)
    x = np.concatenate([x.mean(axis=1, keepdims=True), x], axis=1) + w[f"{pool}.positional_embedding"]
    x = stages(f"{pool}.embedded", x)
    q, k, v = (linear(t, w, f"{pool}.{name}_proj.") for name, t in (("q", x[:, :1]), ("k", x), ("v", x)))
    context = stages(f"{pool}.context", attend(stages, pool, q, k, v, causal=False)[:, 0])
    return stages(f"{pool}.c_proj", linear(context, w, f"{pool}.c_proj."))


# The text tower, and the two together


def encode_text(stages: Stages, w: Weights, ids: np.ndarray) -> np.ndarray:
    """Token ids [N, L] -> embeddings [N, E], not yet of unit length."""
    x = stages("token_embedding", w["token_embedding.weight"][ids])
    x = stages("text.embedded", x + w["positional_embedding"][: ids.shape[1]])
    x = transformer(stages, w, "transformer.resblocks.", x, causal=True)
    x = stages("ln_final", layer_norm(x, w, "ln_final"))
    pooled = stages("text.pooled", x[np.arange(len(x)), ids.argmax(axis=1)])
    return stages("text_projection", pooled @ w["text_projection"])


def forward(w: Weights, inputs: dict[str, np.ndarray]) -> Stages:
    """All stages that follow from the inputs: `image.decoded` or `image.pixels`, and `text.ids`."""
    w = {name: tensor.astype(np.float32) for name, tensor in w.items()}
    stages = Stages()
    tower = vit if "visual.proj" in w else resnet
    if "image.decoded" in inputs:
        prepare(stages, stages("image.decoded", inputs["image.decoded"]), image_size(w))
    elif "image.pixels" in inputs:
        stages("image.pixels", inputs["image.pixels"])
    if "image.pixels" in stages:
        stages("image_embedding", unit(tower(stages, w, stages["image.pixels"])))
    if "text.ids" in inputs:
        stages("text_embedding", unit(encode_text(stages, w, stages("text.ids", inputs["text.ids"]))))
    if "image_embedding" in stages and "text_embedding" in stages:
        cosines = stages["image_embedding"] @ stages["text_embedding"].T
        stages("logits_per_image", np.exp(w["logit_scale"]) * cosines)
    return stages


def image_size(w: Weights) -> int:
    """The side of the square that the image tower takes; both kinds cut it into a grid."""
    if "visual.proj" in w:
        cell, positions = w["visual.conv1.weight"].shape[-1], len(w["visual.positional_embedding"])
    else:
        cell, positions = 32, len(w["visual.attnpool.positional_embedding"])
    return cell * round((positions - 1) ** 0.5)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: port_numpy.py WEIGHTS.safetensors GOLDEN.safetensors OUTPUT.safetensors")
    weights, golden, output = sys.argv[1:]
    write_safetensors(forward(read_safetensors(weights), read_safetensors(golden)), output)
