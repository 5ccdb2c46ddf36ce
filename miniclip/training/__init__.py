"""Training: the contrastive loss in its several forms, and what makes many processes train as one."""

from miniclip.training.distributed import is_main, rank, setup, sharded_contrastive_loss, world_size
from miniclip.training.loss import (
    MAX_LOGIT_SCALE,
    Embedder,
    cached_backward,
    chunked_contrastive_loss,
    clamp_logit_scale,
    contrastive_loss,
)

__all__ = [
    "MAX_LOGIT_SCALE",
    "Embedder",
    "cached_backward",
    "chunked_contrastive_loss",
    "clamp_logit_scale",
    "contrastive_loss",
    "is_main",
    "rank",
    "setup",
    "sharded_contrastive_loss",
    "world_size",
]
