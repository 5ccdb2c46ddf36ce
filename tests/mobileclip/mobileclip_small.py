"""MobileCLIPs of every kind of tower that are small enough for quick tests."""

import torch
import torch.nn.functional as F
from conformance.mobileclip_cases import inputs, weights
from mobileclip_branched import branched_shapes

from miniclip.config import PreprocessConfig, TextConfig, TransformerConfig
from miniclip.mobileclip.config import MCiConfig, MobileCLIPConfig
from miniclip.mobileclip.names import read

SMALL_TEXT = TextConfig(77, 64, TransformerConfig(64, 2, 1, 256, "gelu"))
SMALL_MCI = {
    "batch": MCiConfig(64, (8, 16, 32, 64), (1, 1, 1, 2), 3, (2, 3), "batch"),
    "layer": MCiConfig(64, (8, 16, 32, 64, 128), (1, 1, 1, 1, 2), 4, (), "layer"),
}


def small(norm: str = "batch", text_taps: int = 11) -> MobileCLIPConfig:
    return MobileCLIPConfig(24, SMALL_MCI[norm], SMALL_TEXT, PreprocessConfig(64), causal=False, text_taps=text_taps)


def tiny(**options):
    """Arguments for `build_model`: tensors under our names, and their config."""
    config = small(**options)
    tensors = weights(branched_shapes(config))
    return read(tensors, config, None)[1], config


def texts() -> torch.Tensor:
    """Ids of a short text, and of one that fills the context."""
    ids = torch.zeros(2, 77, dtype=torch.int64)
    ids[0, :3] = torch.tensor([62, 5, 63])
    ids[1, :] = torch.cat([torch.arange(76) % 60, torch.tensor([63])])
    return ids


@torch.no_grad()
def outputs(model, config) -> torch.Tensor:
    """All unit embeddings in one row, float64."""
    embeddings = (model.encode_image(inputs(config.vision.image_size)[0]), model.encode_text(texts()))
    return torch.cat([F.normalize(x.double()).flatten() for x in embeddings])
