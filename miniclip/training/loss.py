"""The symmetric contrastive loss, and its gradient for batches whose logits or activations do not fit in memory.

The three losses (the first is `miniclip.ops.contrastive_loss`, the third
`miniclip.training.distributed.sharded_contrastive_loss`) take the same arguments, in the order in which `Embedder`
returns them: `loss = contrastive_loss(*embedder(images, texts))`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel

from miniclip.models.clip import CLIP
from miniclip.ops import contrastive_loss

MAX_LOGIT_SCALE = math.log(100)  # CLIP paper, section 2.5: larger multipliers make training unstable


class Embedder(nn.Module):
    """A CLIP seen as what the losses take: (images, texts) -> unit embeddings of both, and the logits' multiplier.

    It is what DistributedDataParallel must wrap: that reduces gradients only of what its own forward returned, and
    CLIP's forward returns logits.
    """

    def __init__(self, clip: CLIP):
        super().__init__()
        self.clip = clip

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """images [N, 3, R, R], texts [N, L] -> image [N, E], text [N, E], logit_scale, a scalar."""
        image = self.clip.encode_image(images, normalize=True)
        text = self.clip.encode_text(texts, normalize=True)
        return image, text, self.clip.logit_scale.exp()


def chunked_contrastive_loss(image: Tensor, text: Tensor, logit_scale: Tensor, chunk: int) -> Tensor:
    """`contrastive_loss` with the logits of only `chunk` images, against all texts, in memory at a time.

    The same result and gradients, also logit_scale's, for a third more arithmetic: the backward pass computes the
    logits again. The gradients cannot be differentiated again.
    """
    _check_pairs(image, text)
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; expected the number of images whose logits are held at once, at least 1")
    with without_autocast(image):
        dtype = logit_scale.dtype
        return _ChunkedContrastiveLoss.apply(image.to(dtype), text.to(dtype), logit_scale, chunk)


class _ChunkedContrastiveLoss(torch.autograd.Function):
    """Rows of the logits are images, columns texts. Between the passes each softmax is two numbers: its largest logit,
    and its sum of exp(logit - largest).

    One would do, their logsumexp. But its rounding, at a scale of 100 in float32, makes the softmaxes' sums differ from
    1 by so much that the scale's gradient has an error of 1e-4 instead of 6e-6.
    """

    @staticmethod
    def forward(ctx, image: Tensor, text: Tensor, scale: Tensor, chunk: int) -> Tensor:
        row_max, row_sum, pairs = (image.new_empty(len(image)) for _ in range(3))  # pairs: the logits' diagonal
        column_max, column_sum = image.new_full((len(image),), -math.inf), image.new_zeros(len(image))
        for start in range(0, len(image), chunk):
            own = slice(start, start + chunk)
            logits = scale * image[own] @ text.T
            pairs[own] = logits.diagonal(start)
            row_max[own] = logits.amax(1)
            row_sum[own] = (logits - row_max[own, None]).exp_().sum(1)
            new_max = torch.maximum(column_max, logits.amax(0))
            column_sum = column_sum * (column_max - new_max).exp() + logits.sub_(new_max).exp_().sum(0)
            column_max = new_max
        ctx.save_for_backward(image, text, scale, row_max, row_sum, column_max, column_sum)
        ctx.chunk = chunk
        return ((row_max - pairs) + row_sum.log() + (column_max - pairs) + column_sum.log()).mean() / 2

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        image, text, scale, row_max, row_sum, column_max, column_sum = ctx.saved_tensors
        grad_image, grad_text, grad_scale = torch.empty_like(image), torch.zeros_like(text), torch.zeros_like(scale)
        with without_autocast(image):  # which the caller of backward() may have on
            for start in range(0, len(image), ctx.chunk):
                own = slice(start, start + ctx.chunk)
                scaled = scale * image[own]
                logits = scaled @ text.T
                grad_logits = (logits - row_max[own, None]).exp_().div_(row_sum[own, None])
                grad_logits += logits.sub_(column_max).exp_().div_(column_sum)
                grad_logits.diagonal(start).sub_(2)
                grad_logits *= grad / (2 * len(image))
                grad_scaled = grad_logits @ text
                grad_image[own] = scale * grad_scaled
                grad_text.addmm_(grad_logits.T, scaled)
                grad_scale += (image[own] * grad_scaled).sum()
        return grad_image, grad_text, grad_scale, None


def cached_backward(
    model: nn.Module,
    images: Tensor,
    texts: Tensor,
    micro_batch: int,
    loss_fn: Callable[[Tensor, Tensor, Tensor], Tensor] = contrastive_loss,
) -> Tensor:
    """Add the whole batch's gradient to the parameters' .grad with the activations of one micro-batch in memory.

    Gradient caching (Gao et al. 2021): embed everything without graphs, take the loss's gradient with respect to the
    embeddings, then embed each micro-batch again and continue backwards from its share of that gradient. It costs one
    more forward pass. Summing the losses of micro-batches would not do: each would lack the others' negatives.

    model: an Embedder, or DistributedDataParallel around one, which reduces once, with the last micro-batch.
    images, texts: this process's batch. loss_fn: any of the losses; a GradScaler multiplies in here.
    Returns what loss_fn returned, detached.

    Call it inside torch.autocast if that is wanted. On the CPU and CUDA both passes draw the same random numbers.
    BatchNorm in training mode is the exception to "whole batch": it normalises by each micro-batch's statistics, and
    updates the running ones in both passes.
    """
    if micro_batch < 1:
        raise ValueError(f"micro_batch is {micro_batch}; expected the number of pairs to embed at once, at least 1")
    _check_pairs(images, texts)
    batches = list(zip(images.split(micro_batch), texts.split(micro_batch), strict=True))
    with torch.no_grad(), torch.random.fork_rng([images.device] if images.is_cuda else []):
        image, text, scale = zip(*(model(*batch) for batch in batches), strict=True)
    embeddings = [torch.cat(image).requires_grad_(), torch.cat(text).requires_grad_(), scale[0].requires_grad_()]
    loss = loss_fn(*embeddings)
    with without_autocast(images):
        grad_image, grad_text, grad_scale = torch.autograd.grad(loss, embeddings)

    grad_scale /= len(batches)  # the scale takes part in every micro-batch
    gradients = zip(grad_image.split(micro_batch), grad_text.split(micro_batch), strict=True)
    for i, (batch, cached) in enumerate(zip(batches, gradients, strict=True)):
        accumulating = isinstance(model, DistributedDataParallel) and i < len(batches) - 1
        with model.no_sync() if accumulating else contextlib.nullcontext():
            outputs = zip(model(*batch), (*cached, grad_scale), strict=True)
            trained = [pair for pair in outputs if pair[0].requires_grad]  # less a frozen tower, a frozen scale
            with without_autocast(images):
                torch.autograd.backward(*zip(*trained, strict=True))
    return loss.detach()


def clamp_logit_scale(model: CLIP) -> None:
    """Hold the temperature at or above 1/100, in place; after each optimizer step."""
    with torch.no_grad():
        model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)


def without_autocast(x: Tensor) -> torch.autocast:
    """A context in which operations on x's device keep their inputs' dtype."""
    return torch.autocast(x.device.type, enabled=False)


def _check_pairs(image: Tensor, text: Tensor) -> None:
    if len(image) != len(text) or len(image) == 0:
        raise ValueError(f"got {len(image)} images and {len(text)} texts; expected pairs, at least one")
