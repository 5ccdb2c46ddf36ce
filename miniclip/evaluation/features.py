"""The embeddings of a data set's pictures, kept in a folder if wanted, so that they are computed once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from miniclip.data.lists import DataError, Example
from miniclip.embed import Rejected, embed_images
from miniclip.io import save_tensors
from miniclip.models import CLIP

CACHE_VERSION = 1  # to be raised when the same model and pictures give other embeddings


def embed_examples(
    model: CLIP,
    preprocess: Callable[[Image.Image], Tensor],
    examples: Sequence[Example],
    background: str | None = None,
    cache: str | Path | None = None,
) -> tuple[Tensor, Rejected]:
    """Unit embeddings float32 [N, E] of the pictures, on the CPU, without the rejected ones; see `embed_images`.

    background: see `on_background`; None: whatever `preprocess` makes of transparent pictures
    cache: a folder in which the result is kept and found again, by a hash of the image tower's weights, of how pictures
    are prepared, and of the pictures: their pixels, or of files the path, size and time of the last change

    DataError if no picture can be read, and for a damaged file in the cache.
    """

    def prepare(image: Image.Image) -> Tensor:
        return preprocess(on_background(image, background) if background else image)

    def embed() -> tuple[Tensor, Rejected]:
        embeddings, rejected = embed_images(model, prepare, [example.image for example in examples])
        if not len(embeddings):
            raise DataError(f"none of the {len(examples)} pictures can be read; the first: {rejected[0]}")
        return embeddings, rejected

    if cache is None:
        return embed()
    key = _content_hash(model, f"{preprocess} {background}", examples)
    file = Path(cache) / f"{key}.safetensors"
    if file.exists():
        try:
            with safe_open(file, "pt") as tensors:
                rejected = json.loads(tensors.metadata()["rejected"])
                return tensors.get_tensor("images"), {int(index): why for index, why in rejected.items()}
        except Exception as error:  # whatever safetensors makes of it
            raise DataError(f"{file} is damaged: {error}; delete it, and it is made again") from error
    embeddings, rejected = embed()
    file.parent.mkdir(parents=True, exist_ok=True)
    save_tensors({"images": embeddings}, file, {"rejected": json.dumps(rejected)})
    return embeddings, rejected


def _content_hash(model: CLIP, preparation: str, examples: Sequence[Example]) -> str:
    digest = hashlib.sha256(repr((CACHE_VERSION, model.config.vision, preparation)).encode())
    for name, tensor in model.visual.state_dict().items():
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for example in examples:
        image = example.image
        if isinstance(image, Image.Image):
            digest.update(repr((image.mode, image.size)).encode() + image.tobytes())
        elif image.is_file():
            state = image.stat()
            digest.update(repr((str(image.resolve()), state.st_size, state.st_mtime_ns)).encode())
        else:
            digest.update(repr((str(image), "missing")).encode())
    return digest.hexdigest()


def on_background(image: Image.Image, colour: str) -> Image.Image:
    """A picture without its transparency, over a colour as Pillow names it; any other picture as it is.

    `preprocess` alone drops the transparency, as openai/CLIP does: most drawings then stand on black.
    """
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, colour), image).convert("RGB")
