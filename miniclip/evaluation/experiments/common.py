"""What the experiments share: pictures as a model embeds them, shares with their intervals, tables and pages."""

from __future__ import annotations

import math
import random
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from miniclip import ops
from miniclip.data.datasets import class_names
from miniclip.data.lists import Example
from miniclip.evaluation.features import embed_examples, on_background
from miniclip.models import CLIP
from miniclip.preprocess import open_image
from miniclip.zero_shot import zero_shot_weights

Z = 1.959964  # standard deviations on either side of the middle hold 95% of a normal distribution


@dataclass(frozen=True)
class Study:
    """The pictures of a data set, their classes, and what a model makes of them."""

    name: str  # of the model
    model: CLIP
    examples: list[Example]  # N, without those that can't be read
    classes: list[str]  # C, sorted; also those that have no picture here
    targets: Tensor  # int64 [N], each picture's class
    images: Tensor  # float32 [N, E], of unit length, on the CPU
    rejected: list[str]  # why pictures could not be read

    @property
    def scale(self) -> float:
        """What the model multiplies cosines by to get logits; 100 in OpenAI's models."""
        return self.model.logit_scale.exp().item()


def embed_study(
    name: str,
    model: CLIP,
    preprocess: Callable[[Image.Image], Tensor],
    examples: Sequence[Example],
    limit: int | None = None,
    background: str | None = None,
    seed: int = 0,
) -> Study:
    """Embed a data set's pictures, or `limit` of them that `seed` chooses; the classes are those of all examples.

    background: see `embed_examples`. DataError if no picture can be read.
    """
    classes = sorted(class_names(examples))
    number = {name: i for i, name in enumerate(classes)}
    chosen = random.Random(seed).sample(examples, limit) if limit and limit < len(examples) else list(examples)
    images, faults = embed_examples(model, preprocess, chosen, background)
    kept = [example for i, example in enumerate(chosen) if i not in faults]
    targets = torch.tensor([number[example.captions[0]] for example in kept])
    return Study(name, model, kept, classes, targets, images, list(faults.values()))


def each_template(model: CLIP, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """The unit embedding of every prompt, float32 [templates, E, C]: what `ensemble` takes the mean of."""
    prompts = [template.replace("{}", name) for template in templates for name in classes]
    weights = zero_shot_weights(model, prompts, ["{}"])  # as if each prompt were a class of its own
    return weights.view(-1, len(templates), len(classes)).transpose(0, 1)


def ensemble(weights: Tensor) -> Tensor:
    """The unit mean [E, C] of unit vectors [templates, E, C] (CLIP paper, section 3.1.4)."""
    return ops.normalize(weights.mean(0).T).T


def share(right: Tensor) -> dict[str, float]:
    """How many of `right` (bool [N]) are true, as a share in 0..1, with its 95% interval."""
    low, high = wilson(int(right.sum()), len(right))
    return {"share": right.double().mean().item(), "low": low, "high": high}


def wilson(count: int, total: int) -> tuple[float, float]:
    """The 95% interval of the share count / total (Wilson 1927).

    It holds for few pictures too, and near 0 and 1, where a bootstrap shrinks to nothing. It says how much the share
    may differ on other pictures *of the same kind*, and nothing about pictures of another.
    """
    middle = (count + Z**2 / 2) / (total + Z**2)
    half = Z / (total + Z**2) * math.sqrt(count * (total - count) / total + Z**2 / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


def percent(figure: dict[str, float]) -> tuple[str, str]:
    """A share and its interval, as two cells of a table."""
    return f"{figure['share']:.2%}", f"{figure['low']:.1%} to {figure['high']:.1%}"


def columns(headings: Sequence[str], rows: Sequence[Sequence[object]], left: int = 1) -> str:
    """A plain-text table: the first columns, as many as `left`, to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (headings, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        aligned = [cell.ljust(width) for cell, width in zip(row[:left], widths, strict=False)]
        aligned += [cell.rjust(width) for cell, width in zip(row[left:], widths[left:], strict=True)]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def picture_of(example: Example) -> Image.Image:
    """As it is drawn on a page: RGB, on white where it is transparent."""
    image = example.image if isinstance(example.image, Image.Image) else open_image(example.image)
    return on_background(image, "white").convert("RGB")


def fold(text: str, width: int = 18) -> str:
    """A name in lines that fit beside or under a picture, at most three."""
    return "\n".join(textwrap.wrap(text, width, max_lines=3, placeholder="..."))


def plain_ticks(axis) -> None:
    """Numbers as 0.1, 1, 10 on a logarithmic axis, not as powers."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def frame(axis, colour: str | None = None) -> None:
    """Around a picture: nothing, or a line in a colour."""
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(colour is not None)
    axis.spines[:].set(color=colour, linewidth=2.5)
