"""Weights of MobileCLIPs made from names, and what the goldens of mobileclip_outputs.safetensors hold.

Made as in seeded.py, but with rules of their own: the names are those of the published files, Apple's or OpenCLIP's, so
a tensor that is read under a wrong name has wrong values, and the outputs show it. The scales of the branches are small
enough for the activations of 50 blocks to stay small.
"""

import hashlib
import json
import math
import re

import torch
from conformance.seeded import tensor, text
from torch import Tensor

# Model: whose names its file has, and whose code made the golden.
CASES = {
    "MobileCLIP-S0": "apple",
    "MobileCLIP-S1": "apple",
    "MobileCLIP-S2": "apple",
    "MobileCLIP-B": "apple",
    "MobileCLIP2-S0": "openclip",
    "MobileCLIP2-S2": "openclip",
    "MobileCLIP2-B": "openclip",
    "MobileCLIP2-S3": "openclip",
    "MobileCLIP2-S4": "openclip",
    "MobileCLIP2-L-14": "openclip",
}

EMBEDDINGS = r"(pos_embed|positional_embedding|cls_token|token_embedding\.weight|embedding_layer\.weight)$"


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A state dict of these shapes, of Apple's or OpenCLIP's names."""
    result = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            result[name] = torch.tensor(0)
        elif re.search(r"logit_scale$", name):
            result[name] = tensor(name, shape, 2.5, 0.5)
        elif "layer_scale" in name:
            result[name] = tensor(name, shape, 0.1, 0.05)
        elif re.search(EMBEDDINGS, name):
            result[name] = tensor(name, shape, 0.0, 0.04 if name.endswith("weight") else 0.2)
        elif name.endswith("running_var"):
            result[name] = tensor(name, shape, 1.0, 0.5)
        elif name.endswith(("bias", "running_mean")):
            result[name] = tensor(name, shape, 0.0, 0.1)
        elif len(shape) == 1:  # of a norm
            result[name] = tensor(name, shape, 1.0, 0.3)
        else:
            used_as_x_at_p = name.endswith(("head.proj", "classifier.proj", "projection_layer", "text_projection"))
            fan_in = shape[0] if used_as_x_at_p else math.prod(shape[1:])
            result[name] = tensor(name, shape, 0.0, math.sqrt(3 / fan_in))
    return result


def inputs(size: int) -> tuple[Tensor, Tensor]:
    """One picture [1, 3, size, size] in [0, 1], and token ids [2, 77]."""
    return tensor("image", (1, 3, size, size), 0.5, 0.5), text(2, 77, 49408)


def digest(shapes: dict[str, tuple[int, ...]]) -> str:
    """Of the names and shapes of a file."""
    listed = sorted((name, list(shape)) for name, shape in shapes.items())
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()
