"""The loss over many processes, started by torchrun, that train as one process on the concatenated batch would."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip.parallel import all_gather, rank
from miniclip.training.loss import without_autocast


def sharded_contrastive_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """This process's rows of `contrastive_loss` over all batches: own images and all texts, own texts and all images.

    image, text: [N, E], this process's, N the same in all; logit_scale: scalar. Returns the mean over own rows; the
    mean of that over processes is the loss of the concatenated batch. With one process it is `contrastive_loss`.

    The factor of the world size W: the mean over own rows is W times their part of the whole loss, and the gather sums
    over processes without dividing, so that each process's backward pass gives W times what its pairs contribute to
    the whole gradient. DistributedDataParallel averages over processes, and thereby divides by W.
    """
    with without_autocast(image):
        both = torch.cat([image, text], dim=1).to(logit_scale.dtype)
        images, texts = all_gather(both).chunk(2, dim=1)  # each [W * N, E]
        image, text = both.chunk(2, dim=1)
        own = rank() * len(both) + torch.arange(len(both), device=both.device)
        image_loss = F.cross_entropy(logit_scale * image @ texts.T, own)
        return (image_loss + F.cross_entropy(logit_scale * text @ images.T, own)) / 2
