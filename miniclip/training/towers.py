"""What training asks of an image tower, whatever its kind."""

from __future__ import annotations

from torch import nn

from miniclip.errors import UsageError
from miniclip.models import CLIP

# Parameters of a tower itself that are used after its last block.
HEAD = ("proj", "proj_bias", "text_projection", "text_projection_bias", "logit_bias")


def blocks_of(tower: nn.Module, purpose: str) -> list[nn.Module]:
    """The blocks of an image tower, in the order in which they run. UsageError if it does not name them."""
    blocks = getattr(tower, "blocks", None)
    if not blocks:
        raise UsageError(f"{purpose} needs an image tower that lists its `blocks`; {type(tower).__name__} does not")
    return list(blocks)


def layers_above(model: CLIP) -> dict[str, int]:
    """For each parameter, how many layers lie between it and the end of its tower.

    0 for the projection and what else follows the last block, 1 for the last block (in a ResNet: stage), and one more
    than the first block for the embeddings and the first convolutions.
    """
    image = _layers_above(model.visual, blocks_of(model.visual, "--layer-decay"))
    text = _layers_above(model, list(model.transformer.resblocks))
    return text | {f"visual.{name}": count for name, count in image.items()} | {"logit_scale": 0}


def _layers_above(tower: nn.Module, blocks: list[nn.Module]) -> dict[str, int]:
    """Submodules run in the order in which the tower names them; parameters of its own come first, except HEAD."""
    inside = {id(parameter): len(blocks) - i for i, block in enumerate(blocks) for parameter in block.parameters()}
    above = {name: 0 if name in HEAD else len(blocks) + 1 for name, _ in tower.named_parameters(recurse=False)}
    behind = False
    for child, module in tower.named_children():
        counts = {name: inside.get(id(parameter)) for name, parameter in module.named_parameters()}
        holds_blocks = any(counts.values())
        outside = 0 if behind and not holds_blocks else len(blocks) + 1
        above |= {f"{child}.{name}": count or outside for name, count in counts.items()}
        behind |= holds_blocks
    return above
