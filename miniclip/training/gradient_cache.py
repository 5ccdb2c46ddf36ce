"""The gradient of a batch whose activations do not fit in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from miniclip.errors import UsageError
from miniclip.models import CLIP
from miniclip.training.loss import contrastive_loss, without_autocast


class Embedder(nn.Module):
    """A CLIP whose output is what the losses take: (images, texts) -> unit embeddings of both, and the logits' scalars.

    DistributedDataParallel must wrap this, because it reduces the gradients only of what its own forward returned, and
    CLIP's forward returns logits. logit_bias: where that of the loss starts, unless the model has one of its own, which
    is then trained; None: the loss has none.
    """

    def __init__(self, clip: CLIP, logit_bias: float | None = None):
        super().__init__()
        self.clip = clip
        self.has_bias = logit_bias is not None
        new = self.has_bias and clip.logit_bias is None
        bias = nn.Parameter(torch.full_like(clip.logit_scale, logit_bias)) if new else None
        self.register_parameter("logit_bias", bias)
        if clip.logit_bias is not None:
            clip.logit_bias.requires_grad_(self.has_bias)

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, ...]:
        """images [N, 3, R, R], texts [N, L] -> image [N, E], text [N, E], the scalars of `scalars`."""
        image = self.clip.encode_image(images, normalize=True)
        text = self.clip.encode_text(texts, normalize=True)
        return image, text, *self.scalars()

    def scalars(self) -> tuple[Tensor, ...]:
        """The logits' scale, and their bias if the loss has one."""
        scale = self.clip.logit_scale.exp()
        if not self.has_bias:
            return (scale,)
        return scale, self.clip.logit_bias if self.logit_bias is None else self.logit_bias


def cached_backward(
    model: nn.Module,
    images: Tensor,
    texts: Tensor,
    micro_batch: int,
    loss_fn: Callable[..., Tensor] = contrastive_loss,
) -> Tensor:
    """Add the whole batch's gradient to the parameters' .grad with the activations of one micro-batch in memory.

    Gradient caching (Gao et al. 2021): embed everything without graphs, compute the loss's gradient with respect to the
    embeddings, then embed each micro-batch again and backpropagate its part of that gradient. It takes one more forward
    pass. A sum of the losses of micro-batches would be another loss, without the negatives between micro-batches.

    model: an Embedder, or DistributedDataParallel around one, which reduces once, with the last micro-batch.
    images, texts: this process's batch. loss_fn: a function of what the model returns, multiplied by a GradScaler's
    factor if there is one.
    Returns what loss_fn returned, detached.

    Call it inside torch.autocast if that is wanted. On the CPU and CUDA both passes draw the same random numbers.
    BatchNorm in training mode is the exception to "whole batch": it normalises by each micro-batch's statistics, and
    updates the running ones in both passes.
    """
    if micro_batch < 1:
        raise UsageError(f"micro_batch is {micro_batch}; expected the number of pairs to embed at once, at least 1")
    if len(images) != len(texts) or len(images) == 0:
        raise UsageError(f"got {len(images)} images and {len(texts)} texts; expected pairs, at least one")
    batches = list(zip(images.split(micro_batch), texts.split(micro_batch), strict=True))
    with torch.no_grad(), torch.random.fork_rng([images.device] if images.is_cuda else []):
        image, text, *scalars = zip(*(model(*batch) for batch in batches), strict=True)
    scalars = [copies[0] for copies in scalars]
    embeddings = [x.requires_grad_() for x in (torch.cat(image), torch.cat(text), *(x.detach() for x in scalars))]
    loss = loss_fn(*embeddings)
    with without_autocast(images):
        grad_image, grad_text, *grad_scalars = torch.autograd.grad(loss, embeddings)

    shares = [grad / len(batches) for grad in grad_scalars]  # the scalars take part in every micro-batch
    gradients = zip(grad_image.split(micro_batch), grad_text.split(micro_batch), strict=True)
    for i, (batch, cached) in enumerate(zip(batches, gradients, strict=True)):
        accumulating = isinstance(model, DistributedDataParallel) and i < len(batches) - 1
        with model.no_sync() if accumulating else contextlib.nullcontext():
            outputs = zip(model(*batch), (*cached, *shares), strict=True)
            trained = [pair for pair in outputs if pair[0].requires_grad]  # all but a frozen tower or scale
            with without_autocast(images):
                torch.autograd.backward(*zip(*trained, strict=True))
    return loss.detach()
