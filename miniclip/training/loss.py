"""The losses that `miniclip train --loss` can choose from, whole, in chunks, and over several processes.

A loss is a function of some of the pairs of a batch, and of all its pairs. A process calls it with its own pairs and
those of all processes; a chunk is treated in the same way. The mean over pairs is the loss of the batch. A new loss is
such a function, and a row of LOSSES.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from miniclip.errors import UsageError
from miniclip.kernels.dispatch import use_kernel
from miniclip.models import CLIP
from miniclip.parallel import all_gather, rank, world_size

MAX_LOGIT_SCALE = math.log(100)  # CLIP paper, section 2.5: larger multipliers make training unstable


class Pairs(NamedTuple):
    """Unit embeddings, each [N, E]: row i of both is a pair."""

    image: Tensor
    text: Tensor


def softmax_loss(own: Pairs, every: Pairs, first: int, logit_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE (CLIP paper, figure 3): each image picks its text among all, each text its image.

    own: n of the N pairs in `every`, from the row `first` on. logit_scale: the multiplier of the cosines. Returns the
    mean over own pairs: ln N if the model can't tell the pairs apart.
    """
    target = torch.arange(first, first + len(own.image), device=own.image.device)
    image_logits = logit_scale * own.image @ every.text.T  # [n, N]
    text_logits = image_logits.T if own is every else logit_scale * own.text @ every.image.T
    return (F.cross_entropy(image_logits, target) + F.cross_entropy(text_logits, target)) / 2


def sigmoid_loss(own: Pairs, every: Pairs, first: int, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """The pairwise sigmoid loss (Zhai et al. 2023, SigLIP, algorithm 1): for each image and each text a binary
    classification, whether they are a pair.

    Arguments as of `softmax_loss`; logit_bias is added to the logits. Returns the sum over all texts, and of that the
    mean over own images.
    """
    logits = -(logit_scale * own.image @ every.text.T + logit_bias)  # [n, N], of "they do not belong together"
    logits.diagonal(first).neg_()
    return -F.logsigmoid(logits).sum() / len(logits)


def triton_loss(own: Pairs, every: Pairs, first: int, logit_scale: Tensor) -> Tensor:
    """`softmax_loss` of a whole batch on a GPU by a Triton kernel, of embeddings rounded to bfloat16."""
    if own is not every:
        raise UsageError("the triton loss takes a whole batch; leave out --chunk and torchrun, or take --loss softmax")
    return contrastive_loss(own.image.bfloat16(), own.text.bfloat16(), logit_scale, backend="triton")


def _sigmoid_at_chance(count: int) -> float:
    """The least `sigmoid_loss` of `count` pairs whose logits are all the same."""
    return math.log(count) - (count - 1) * math.log1p(-1 / count) if count > 1 else 0.0


class Loss(NamedTuple):
    """A row of LOSSES.

    function   see `softmax_loss`
    bias       where the logit bias starts, which the function then takes too; None: the loss has none
    chance     number of pairs in a batch -> the loss of a model that can't tell them apart
    """

    function: Callable[..., Tensor]
    bias: float | None = None
    chance: Callable[[int], float] = math.log


LOSSES = {
    "softmax": Loss(softmax_loss),
    "sigmoid": Loss(sigmoid_loss, bias=-10.0, chance=_sigmoid_at_chance),
    "triton": Loss(triton_loss),
}


def contrastive_loss(image: Tensor, text: Tensor, logit_scale: Tensor, *, backend: str | None = None) -> Tensor:
    """`softmax_loss` of a whole batch, a scalar.

    image, text: [N, E], of unit length; row i of both is a pair. logit_scale: scalar tensor, exp(model.logit_scale), in
    whose dtype everything is computed, also under autocast. backend: see `miniclip.ops`; the kernel has no N x N matrix
    in memory.
    """
    _check_pairs(image, text)
    if use_kernel("contrastive_loss", backend, image, text, logit_scale):
        from miniclip.kernels.contrastive_loss import contrastive_loss as kernel

        return kernel(image, text, logit_scale)
    return whole_loss(softmax_loss, image, text, logit_scale)


def whole_loss(loss: Callable[..., Tensor], image: Tensor, text: Tensor, *scalars: Tensor) -> Tensor:
    """A loss of all pairs of this process, image and text [N, E], in the dtype of the scalars: the logits' scale, and
    for some losses their bias."""
    _check_pairs(image, text)
    with without_autocast(image):
        pairs = Pairs(image.to(scalars[0].dtype), text.to(scalars[0].dtype))
        return loss(pairs, pairs, 0, *scalars)


def sharded_loss(loss: Callable[..., Tensor], image: Tensor, text: Tensor, *scalars: Tensor, chunk: int = 0) -> Tensor:
    """A loss of this process's pairs against those of all processes; the mean of that over processes is the loss of the
    concatenated batch. With one process and without chunks it is `whole_loss`.

    image, text: [N, E], N the same in all processes; scalars: as of `whole_loss`. chunk: how many pairs' logits are in
    memory at once, 0 for all: the same result for more arithmetic, because the backward pass computes the logits again.

    The gradient has a factor of the world size W: the mean over own rows is W times their part of the whole loss, and
    the gather sums over processes without dividing, so that each process's backward pass gives W times what its pairs
    contribute to the whole gradient. DistributedDataParallel averages over processes, and thereby divides by W.
    """
    if world_size() == 1 and not chunk:
        return whole_loss(loss, image, text, *scalars)
    _check_pairs(image, text)
    if chunk < 0:
        raise UsageError(f"chunk is {chunk}; expected the number of pairs whose logits are held at once, or 0 for all")
    with without_autocast(image):
        both = torch.cat([image, text], dim=1).to(scalars[0].dtype)
        every = Pairs(*all_gather(both).chunk(2, dim=1))  # each [W * N, E]
        again = partial(checkpoint, loss, use_reentrant=False, preserve_rng_state=False)
        total, first = 0, rank() * len(both)
        for part in both.split(chunk or len(both)):
            own = Pairs(*part.chunk(2, dim=1))
            total = total + (again if chunk else loss)(own, every, first, *scalars) * (len(part) / len(both))
            first += len(part)
        return total


def clamp_logit_scale(model: CLIP) -> None:
    """Hold the temperature at or above 1/100, in place; after each optimizer step. A SigLIP's has no bound."""
    if model.logit_bias is None:
        with torch.no_grad():
            model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)


def without_autocast(x: Tensor) -> torch.autocast:
    """A context in which operations on x's device keep their inputs' dtype."""
    return torch.autocast(x.device.type, enabled=False)


def _check_pairs(image: Tensor, text: Tensor) -> None:
    if len(image) != len(text) or len(image) == 0:
        raise UsageError(f"got {len(image)} images and {len(text)} texts; expected pairs, at least one")
