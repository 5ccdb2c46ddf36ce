"""Train a CLIP from scratch, or fine-tune one. A run that is started again with the same --output continues.

    miniclip train --create-synthetic --epochs 3 --output runs/shapes
    miniclip train pictures.csv --from ViT-B/32 --lr 1e-5 --epochs 3 --output runs/mine
"""

from __future__ import annotations

import argparse
from dataclasses import fields

from miniclip.commands.options import model, model_size
from miniclip.training.options import TrainOptions

TYPES = {"start_from": model, "text_from": model, "model_size": model_size}  # those that refuse wrong names



def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` an argument for every field of TrainOptions; `options_from` reads them back."""
    for option in fields(TrainOptions):
        settings = dict(option.metadata)
        name = settings.pop("flag", "--" + option.name.replace("_", "-"))
        if "nargs" in settings:
            name = option.name
        else:
            settings["dest"] = option.name
        if isinstance(option.default, bool):
            settings["action"] = "store_true"
        elif not isinstance(option.default, tuple):
            settings["type"] = TYPES.get(option.name, type(option.default))
            settings["help"] += f" (default: {option.default})" if option.default else ""
        parser.add_argument(name, default=None, **settings)


def options_from(arguments: argparse.Namespace) -> TrainOptions:
    """The options among the parsed arguments; what was not given keeps its default."""
    given = {option.name: getattr(arguments, option.name) for option in fields(TrainOptions)}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return TrainOptions(**{name: value for name, value in given.items() if value is not None})


def run(options: argparse.Namespace) -> int:
    from miniclip.training.train import train

    train(options_from(options))
    return 0
