"""One model on one data set: the figures as a dict, as a table, and some answers as a page of pictures."""

from __future__ import annotations

import random
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from miniclip.embed import embed_images, embed_texts
from miniclip.evaluation.datasets import class_names
from miniclip.evaluation.retrieval import recall
from miniclip.evaluation.zero_shot import EvaluationError, classify, expand_templates, shares, zero_shot_weights
from miniclip.models import CLIP
from miniclip.preprocess import open_image
from miniclip.training.data import Example

TASKS = ("zero-shot", "retrieval")


def evaluate(
    model: CLIP,
    preprocess: Callable[[Image.Image], Tensor],
    examples: Sequence[Example],
    templates: Sequence[str] = ("{}",),
    classes: Sequence[str] | None = None,
    tasks: Sequence[str] = TASKS,
    background: str | None = None,
) -> dict:
    """Measure a model; the result is ready for JSON.

    templates: prompts with {} for the name, or names of sets of them, see `prompts.py`
    classes: the names to choose from; None: those of the examples. Examples of another name are left out of both tasks.
    background: see `on_background`; None: whatever `preprocess` makes of transparent pictures

        pictures, left_out   how many were measured, and how many have a name that is not in `classes`
        rejected             why pictures could not be read, and captions not be encoded, a line each
        zero_shot            classes (their number), templates, top1 and top5 in 0..1, and predictions: each picture's
                             image, name, predicted name, and rank of its own name, 1 being the best
        retrieval            captions (their number), distinct_captions, image_to_text and text_to_image, each with
                             recall@1, recall@5 and recall@10 in 0..1

    EvaluationError if no picture can be used, or a prompt can't.
    """
    classes = class_names(examples) if classes is None else list(dict.fromkeys(classes))
    known = set(classes)
    kept = [example for example in examples if example.captions[0] in known]
    left_out = len(examples) - len(kept)
    if not kept:
        raise EvaluationError(f"none of the {len(examples)} pictures has a name among the {len(classes)} classes")
    # Before the pictures, which take longer, so that a bad template is known at once.
    weights = zero_shot_weights(model, classes, templates) if "zero-shot" in tasks else None

    def prepare(image: Image.Image) -> Tensor:
        return preprocess(on_background(image, background) if background else image)

    images, faults = embed_images(model, prepare, [example.image for example in kept])
    if not len(images):
        raise EvaluationError(f"none of the {len(kept)} pictures can be read; the first: {faults[0]}")
    kept = [example for i, example in enumerate(kept) if i not in faults]
    result = {"pictures": len(kept), "left_out": left_out, "rejected": list(faults.values())}
    if weights is not None:
        result["zero_shot"] = {"templates": expand_templates(templates), **_zero_shot(images, weights, kept, classes)}
    if "retrieval" in tasks:
        result["retrieval"], too_long = _retrieval(model, images, kept)
        result["rejected"] += too_long
    return result


def _zero_shot(images: Tensor, weights: Tensor, examples: list[Example], classes: list[str]) -> dict:
    number = {name: i for i, name in enumerate(classes)}
    targets = torch.tensor([number[example.captions[0]] for example in examples])
    predicted, found = classify(images, weights, targets)
    accuracy = shares(found, (1, 5))
    predictions = [
        {"image": str(example.image), "name": example.captions[0], "predicted": classes[best], "rank": rank + 1}
        for example, best, rank in zip(examples, predicted.tolist(), found.tolist(), strict=True)
    ]
    return {"classes": len(classes), "top1": accuracy[1], "top5": accuracy[5], "predictions": predictions}


def _retrieval(model: CLIP, images: Tensor, examples: list[Example]) -> tuple[dict, list[str]]:
    """The figures, and why captions were rejected. An image that has none left does not take part."""
    distinct = list(dict.fromkeys(caption for example in examples for caption in example.captions))
    texts, faults = embed_texts(model, distinct)
    usable = [caption for i, caption in enumerate(distinct) if i not in faults]
    number = {caption: i for i, caption in enumerate(usable)}
    rows, owners, described = [], [], []
    for i, example in enumerate(examples):
        captions = [number[caption] for caption in example.captions if caption in number]
        if captions:
            rows += captions
            owners += [len(described)] * len(captions)
            described.append(i)
    if not described:
        raise EvaluationError(f"none of the {len(distinct)} captions can be encoded; the first: {faults[0]}")
    image_to_text, text_to_image = recall(images[described], texts[rows], torch.tensor(owners))
    figures = {
        "captions": len(rows),
        "distinct_captions": len(usable),
        "image_to_text": {f"recall@{k}": value for k, value in image_to_text.items()},
        "text_to_image": {f"recall@{k}": value for k, value in text_to_image.items()},
    }
    return figures, list(faults.values())


def table(result: dict) -> str:
    """What `evaluate` returned, in plain text."""
    lines = [f"{result['pictures']} pictures"]
    if result["left_out"]:
        lines[0] += f"; {result['left_out']} left out, whose names are not among the classes"
    if "zero_shot" in result:
        zero_shot = result["zero_shot"]
        number = zero_shot["classes"]
        templates = ", ".join(zero_shot["templates"][:3]) + (", ..." if len(zero_shot["templates"]) > 3 else "")
        lines += ["", f"zero-shot, {number} classes; prompts: {templates}", f"{'accuracy':>17}{'chance':>9}"]
        for k in (1, 5):
            lines.append(f"  top-{k}{zero_shot[f'top{k}']:10.2%}{min(1, k / number):9.2%}")
    if "retrieval" in result:
        retrieval = result["retrieval"]
        count = f"{retrieval['captions']} captions, {retrieval['distinct_captions']} of them different"
        recalls = retrieval["image_to_text"]
        lines += ["", f"retrieval, {count}", f"{'':17}" + "".join(f"{name:>11}" for name in recalls)]
        for direction in ("image_to_text", "text_to_image"):
            values = "".join(f"{value:11.2%}" for value in retrieval[direction].values())
            lines.append(f"  {direction.replace('_', ' '):15}{values}")
    return "\n".join(lines)


def on_background(image: Image.Image, colour: str) -> Image.Image:
    """A picture without its transparency, over a colour as Pillow names it; any other picture as it is.

    `preprocess` alone drops the transparency, as openai/CLIP does: most drawings then stand on black.
    """
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, colour), image).convert("RGB")


def plot_answers(predictions: list[dict], output: Path, seed: int = 0, rows: int = 2, columns: int = 6) -> None:
    """Draw a page of pictures under their names: right answers above; wrong ones below, with the name they were given.

    predictions: those of `evaluate`. Which of them are drawn depends on `seed` alone. Needs matplotlib.
    """
    from matplotlib.figure import Figure

    right = [answer for answer in predictions if answer["rank"] == 1]
    wrong = [answer for answer in predictions if answer["rank"] > 1]
    parts = [(answers, verdict) for answers, verdict in ((right, "right"), (wrong, "wrong")) if answers]
    figure = Figure(figsize=(1.9 * columns, 2.7 * rows * len(parts)), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1)
    for part, (answers, verdict) in zip(figure.subfigures(len(parts), squeeze=False).flat, parts, strict=True):
        part.suptitle(f"{verdict}: {len(answers)} of {len(predictions)}", fontsize=14)
        shown = random.Random(seed).sample(answers, min(rows * columns, len(answers)))
        for axis, answer in zip(part.subplots(rows, columns).flat, shown, strict=False):
            axis.imshow(on_background(open_image(answer["image"]), "white").convert("RGB"))
            axis.set_title(_fold(answer["name"]), fontsize=9, weight="bold", parse_math=False)
            if verdict == "wrong":
                called = _fold(f"called {answer['predicted']}")
                axis.set_xlabel(called, fontsize=9, color="firebrick", parse_math=False)
        for axis in part.axes:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    figure.savefig(output, dpi=120)


def _fold(text: str) -> str:
    """A name in lines that fit over a picture, at most three."""
    return "\n".join(textwrap.wrap(text, 20, max_lines=3, placeholder="..."))
