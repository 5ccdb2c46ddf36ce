"""Print the probabilities of labels for pictures."""

from __future__ import annotations

import argparse
from pathlib import Path

from miniclip.commands.options import add_json, add_model, add_plot, load_model, path, template
from miniclip.commands.output import report_rejected, show, show_json
from miniclip.errors import UsageError
from miniclip.io import printable

MOST_BARS = 8  # labels in a drawing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", type=path, metavar="IMAGE")
    parser.add_argument("--labels", required=True, type=labels, help='separated by commas: "a cat,a dog"')
    parser.add_argument("--template", type=template, default="{}", help='{} stands for the label: "a photo of a {}."')
    add_model(parser)
    add_json(parser)
    add_plot(parser, "draw the pictures with their probabilities")


def labels(text: str) -> list[str]:
    found = list(dict.fromkeys(label.strip() for label in text.split(",") if label.strip()))
    if not found:
        raise argparse.ArgumentTypeError("it is empty; expected labels separated by commas")
    return found


def run(options: argparse.Namespace) -> int:
    from miniclip.embed import embed_images, embed_texts

    model, preprocess = load_model(options)
    texts, faults = embed_texts(model, [options.template.replace("{}", label) for label in options.labels])
    if faults:
        raise UsageError("; ".join(faults.values()))
    embeddings, rejected = embed_images(model, preprocess, options.images)
    scores = (model.logit_scale.detach().exp().float().cpu() * embeddings @ texts.T).softmax(dim=-1).tolist()
    images = [image for i, image in enumerate(options.images) if i not in rejected]
    results = [(image, dict(zip(options.labels, row, strict=True))) for image, row in zip(images, scores, strict=True)]
    if options.json:
        show_json([{"image": str(image), "probabilities": row} for image, row in results])
    else:
        for image, row in results:
            show("\n".join([printable(str(image)), *(f"{row[label]:9.2%}  {label}" for label in _ranked(row))]))
    if options.plot and results:
        _draw(results, options.plot)
    return report_rejected(list(rejected.values()), len(options.images))


def _ranked(row: dict[str, float]) -> list[str]:
    return sorted(row, key=row.get, reverse=True)


def _draw(results: list[tuple[Path, dict[str, float]]], output: Path) -> None:
    """Each picture beside its most probable labels."""
    from matplotlib.figure import Figure

    from miniclip.io import write_atomically
    from miniclip.preprocess import open_image

    figure = Figure(figsize=(8, 2.4 * len(results)), layout="constrained")
    axes = figure.subplots(len(results), 2, squeeze=False, width_ratios=(1, 2))
    for (picture, bars), (image, row) in zip(axes, results, strict=True):
        picture.imshow(open_image(image).convert("RGBA"))
        picture.set_axis_off()
        best = _ranked(row)[MOST_BARS - 1 :: -1]
        bars.barh(best, [row[label] for label in best], color="tab:blue")
        for label in best:
            bars.text(row[label] + 0.01, label, f"{row[label]:.1%}", va="center", fontsize=8)
        bars.set_xlim(0, 1.12)
        bars.set_xticks([])
        bars.spines[["top", "right", "bottom"]].set_visible(False)
    write_atomically(output, lambda file: figure.savefig(file, format=output.suffix[1:], dpi=150))
