"""How good a model is on pictures it does not train on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip.data.batches import Pictures
from miniclip.models import CLIP
from miniclip.training import augment
from miniclip.zero_shot import topk_accuracy


@dataclass(frozen=True)
class Validation:
    """loss: the mean over batches of pairs, as in training
    image_top1, image_top5: for what share of the pictures the own first caption is the best, or among the best five, of
    all first captions
    text_top1: for what share of the first captions the best picture is one of its own"""

    loss: float
    image_top1: float
    image_top5: float
    text_top1: float


def tokenize_short(model: CLIP, texts: list[str]) -> Tensor:
    """Token ids [N, L]. Where no token attends to a later one, they are cut off after the longest text, which changes
    nothing. Texts longer than the context are truncated, as in openai/CLIP's training."""
    tokens = model.tokenize(texts, truncate=True)
    return tokens[:, : int(tokens.argmax(1).max()) + 1] if model.transformer.causal else tokens


@torch.no_grad()
def validate(
    model: CLIP,
    pictures: Pictures,
    templates: Sequence[str],
    batch_size: int,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Validation:
    """Compare all `pictures` with all their different first captions, each embedded as the mean over the templates.

    The pictures are resized to the model's image size, on white. loss: of unit embeddings [N, E] of a batch of pairs.
    The model is left in eval mode.
    """
    model.eval()
    device, config = model.logit_scale.device, model.config.preprocess
    images, names = [], []
    order = [part.tolist() for part in torch.arange(len(pictures)).split(batch_size)]
    for batch in pictures.batches(order, workers=0):
        names += [captions[0] for captions in batch.captions]
        pixels = augment.none(batch.pixels.to(device), config.image_size, batch.captions, torch.Generator())
        images.append(model.encode_image(augment.normalize(pixels, config), normalize=True).float())
    image = torch.cat(images)
    classes = {name: number for number, name in enumerate(dict.fromkeys(names))}
    text = torch.stack([_embed(model, [t.replace("{}", name) for name in classes], batch_size) for t in templates])
    text = F.normalize(text.mean(0), dim=-1)
    label = torch.tensor([classes[name] for name in names], device=device)

    cosines = image @ text.T
    accuracy = topk_accuracy(cosines, label, ks=(1, 5))
    pairs = zip(image.split(batch_size), text[label].split(batch_size), strict=True)
    losses = [loss(*pair) * len(pair[0]) for pair in pairs]
    return Validation(
        loss=float(sum(losses)) / len(image),
        image_top1=accuracy[1],
        image_top5=accuracy[5],
        text_top1=(label[cosines.argmax(0)] == torch.arange(len(classes), device=device)).float().mean().item(),
    )


def _embed(model: CLIP, texts: list[str], batch_size: int) -> Tensor:
    """Unit embeddings [N, E], float32. `miniclip.embed.embed_texts` would wait for the other processes, which do not
    validate, and refuse long texts."""
    tokens = tokenize_short(model, texts).to(model.logit_scale.device)
    return torch.cat([model.encode_text(part, normalize=True).float() for part in tokens.split(batch_size)])
