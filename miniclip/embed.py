"""Embeddings of many pictures or texts, batch by batch, with a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from miniclip.models import CLIP
from miniclip.preprocess import Preprocess, open_image
from miniclip.tokenizer import tokenize

Rejected = dict[int, str]  # index of an input that can't be used: why


def embed_images(
    model: CLIP, preprocess: Preprocess, paths: Sequence[str | Path], batch_size: int = 32
) -> tuple[Tensor, Rejected]:
    """Unit embeddings of image files, float32 [N, E] on the CPU, in order, without the rejected ones."""

    def encode(batch: list[Tensor]) -> Tensor:
        return model.encode_image(torch.stack(batch).to(model.logit_scale.device), normalize=True)

    return _embed(paths, lambda path: preprocess(open_image(path)), encode, batch_size, "images")


def embed_texts(model: CLIP, texts: Sequence[str], batch_size: int = 256) -> tuple[Tensor, Rejected]:
    """Unit embeddings of texts, float32 [N, E] on the CPU, in order, without the rejected ones: those too long."""

    def encode(batch: list[Tensor]) -> Tensor:
        tokens = torch.cat(batch)
        longest = int(tokens.argmax(dim=-1).max()) + 1  # padding has no influence, and most texts are short
        return model.encode_text(tokens[:, :longest].to(model.logit_scale.device), normalize=True)

    return _embed(texts, lambda text: tokenize(text, model.context_length), encode, batch_size, "texts")


@torch.inference_mode()
def _embed(
    inputs: Sequence,
    prepare: Callable[..., Tensor],
    encode: Callable[[list[Tensor]], Tensor],
    batch_size: int,
    unit: str,
) -> tuple[Tensor, Rejected]:
    embeddings: list[Tensor] = []
    rejected: Rejected = {}
    batch: list[Tensor] = []
    with tqdm(total=len(inputs), unit=f" {unit}", disable=None) as progress:
        for i, item in enumerate(inputs):
            try:
                batch.append(prepare(item))
            except (ValueError, RuntimeError) as error:  # ImageError, or a text of too many tokens
                rejected[i] = str(error)
            if len(batch) == batch_size or (batch and i == len(inputs) - 1):
                embeddings.append(encode(batch).float().cpu())
                batch = []
            progress.update()
    return torch.cat(embeddings) if embeddings else torch.empty(0, 0), rejected
