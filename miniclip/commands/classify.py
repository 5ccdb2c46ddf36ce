"""Print the probabilities of labels for pictures.

    miniclip classify cat.jpg --labels "a cat,a dog" --template "a photo of {}."
    miniclip classify photos --labels-file animals.txt --template imagenet --csv > animals.csv
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from miniclip.commands.options import (
    add_csv,
    add_json,
    add_model,
    add_pictures,
    add_plot,
    load_model,
    path,
    picture,
    template,
    with_option,
)
from miniclip.commands.output import complain, report_rejected, show, show_csv, show_json
from miniclip.errors import UsageError

if TYPE_CHECKING:
    from miniclip.answers import Labels

MOST_BARS = 8  # labels of a picture in a drawing
MOST_DRAWN = 100  # pictures in a drawing
TEMPLATE = "{} stands for the label: 'a photo of {}.'; or the name of a set, such as imagenet; may be repeated"
SCORES = (
    "probability among the labels (default; a SigLIP's is that of each label by itself), or cosine, which does not "
    "depend on the other labels"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pictures", nargs="+", type=picture, metavar="PICTURE", help="pictures, and folders of them")
    parser.add_argument("--labels", type=_listed, metavar="TEXT", help='labels separated by commas: "a cat,a dog"')
    parser.add_argument("--label", action="append", metavar="TEXT", help="one label, with any commas; may be repeated")
    parser.add_argument("--labels-file", type=path, metavar="FILE", help="a text file with one label in each line")
    parser.add_argument("--template", action="append", type=template, help=TEMPLATE)
    parser.add_argument("--scores", choices=("probability", "cosine"), default="probability", help=SCORES)
    add_pictures(parser)
    add_model(parser)
    add_json(parser)
    add_csv(parser)
    add_plot(parser, "draw the pictures with their probabilities")


def _listed(text: str) -> list[str]:
    found = [label.strip() for label in text.split(",") if label.strip()]
    if not found:
        raise argparse.ArgumentTypeError("it is empty; expected labels separated by commas")
    return found


def run(options: argparse.Namespace) -> int:
    from miniclip.answers import ONE_LABEL, find_pictures, label_pictures

    labels = _labels(options)
    pictures = find_pictures(options.pictures, options.hidden)
    model, preprocess = load_model(options)
    by_itself = options.scores == "probability" and model.logit_bias is not None
    if len(labels) == 1 and options.scores == "probability" and not by_itself:
        raise UsageError(f"{ONE_LABEL} (--scores cosine)")
    results, faults = label_pictures(model, preprocess, pictures, labels, options.template or ["{}"])
    field = "score" if options.scores == "probability" else "cosine"
    rows = [{label.label: getattr(label, field) for label in each} for each in results]
    if options.json:
        key = "probabilities" if options.scores == "probability" else "cosines"
        ordered = [{label: row[label] for label in labels} for row in rows]
        kind = {"kind": "sigmoid"} if by_itself else {}
        show_json([{"image": r.picture.name, key: row, **kind} for r, row in zip(results, ordered, strict=True)])
    elif options.csv:
        table = ([str(r.picture), *map(row.get, labels)] for r, row in zip(results, rows, strict=True))
        show_csv(["picture", *labels], table)
    else:
        style = "9.2%" if options.scores == "probability" else "9.4f"
        for result, row in zip(results, rows, strict=True):
            title = f"{result.picture}, each label by itself" if by_itself else str(result.picture)
            show("\n".join([title, *(f"{row[label]:{style}}  {label}" for label in row)]))
    if options.plot and results:
        _draw(results, options.plot, field)
    return report_rejected(faults, len(pictures))


def _labels(options: argparse.Namespace) -> list[str]:
    from miniclip.data.text import read_lines

    labels = [*(options.labels or []), *(options.label or [])]
    if options.labels_file:
        labels += filter(None, read_lines(options.labels_file))
    if not labels:
        example = with_option("--label", options.pictures, "a dog", "a cat")
        raise UsageError(f"there are no labels: give --labels, --labels-file, or: miniclip classify {example}")
    return list(dict.fromkeys(labels))


def _draw(results: list[Labels], output: Path, field: str) -> None:
    """Each picture beside its most probable labels. field: "score", the probability, or "cosine"."""
    from matplotlib.figure import Figure

    from miniclip.io import write_atomically

    if len(results) > MOST_DRAWN:
        complain(f"note: {output} shows the first {MOST_DRAWN} of {len(results)} pictures")
        results = results[:MOST_DRAWN]
    figure = Figure(figsize=(8, 2.4 * len(results)), layout="constrained")
    axes = figure.subplots(len(results), 2, squeeze=False, width_ratios=(1, 2))
    for (image, bars), labels in zip(axes, results, strict=True):
        image.imshow(labels.picture.open().convert("RGBA"))
        image.set_axis_off()
        shown = labels[MOST_BARS - 1 :: -1]
        for place, label in enumerate(shown):
            value = getattr(label, field)
            bars.barh(place, value, color="tab:blue")
            text = f"{value:.1%}" if field == "score" else f"cosine {value:.4f}"
            bars.text(max(value, 0) + 0.01, place, text, va="center", fontsize=8)
        bars.set_yticks(range(len(shown)), [label.label for label in shown], parse_math=False)
        bars.set_xlim(min(0, *(getattr(label, field) for label in shown)), 1.12)
        bars.set_xticks([])
        bars.spines[["top", "right", "bottom"]].set_visible(False)
    write_atomically(output, lambda file: figure.savefig(file, format=output.suffix[1:], dpi=150))
