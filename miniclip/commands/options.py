"""Options that several commands share, and the argparse types of their values.

A type returns the value, or says in an ArgumentTypeError what it expected.
"""

from __future__ import annotations

import argparse
import os
import shlex
from argparse import ArgumentTypeError
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from miniclip.config import ACTIVATIONS, ConfigError
from miniclip.errors import MissingExtraError, require

if TYPE_CHECKING:  # importing PyTorch takes seconds, which commands that compute nothing save
    import torch

    from miniclip.models import CLIP
    from miniclip.preprocess import Preprocess

DTYPES = ("float32", "float16", "bfloat16")
MODEL = "a name from `miniclip models`, or a file or directory (default: %(default)s)"
DTYPE = "type of the weights and embeddings; auto takes the fastest here (default: float16 on CUDA, else float32)"
ACTIVATION = "the activation of a file that does not state it (default: quick_gelu, OpenAI's)"
IMAGE_SIZE = "pixels, other than the model's: its positional embeddings are interpolated, as OpenCLIP does"
CONTEXT_LENGTH = "tokens of a text, other than the model's: the same"
UPRIGHT = "turn photos as their EXIF orientation says (default: as openai/CLIP, which takes them as they are stored)"
BACKGROUND = "background for transparent pictures (default: as openai/CLIP, which drops the transparency: mostly black)"


def add_model(
    parser: argparse.ArgumentParser,
    default: str | None = "ViT-B/32",
    help: str = MODEL,
    resize: bool = True,
    **settings,
) -> None:
    """--model, --device, --dtype and those of `add_loading`; `load_model` reads them."""
    parser.add_argument("--model", type=model, default=default, help=help, **settings)
    parser.add_argument("--device", type=device, help="cpu, cuda, ... (default: CUDA if there is one)")
    parser.add_argument("--dtype", choices=(*DTYPES, "auto", "int8"), help=DTYPE)
    add_loading(parser, resize)


def add_loading(parser: argparse.ArgumentParser, resize: bool = True) -> None:
    """--activation, --image-size and --context-length; `loading_arguments` reads them."""
    parser.add_argument("--activation", choices=ACTIVATIONS, help=ACTIVATION)
    if resize:
        parser.add_argument("--image-size", type=positive, metavar="R", help=IMAGE_SIZE)
        parser.add_argument("--context-length", type=positive, metavar="L", help=CONTEXT_LENGTH)


def loading_arguments(options: argparse.Namespace) -> dict[str, str | int | None]:
    """The arguments of `load` and `open_checkpoint` that the options of `add_loading` state."""
    names = ("activation", "image_size", "context_length")
    return {name: getattr(options, name, None) for name in names}


def add_json(parser: argparse.ArgumentParser, help: str = "print JSON") -> None:
    parser.add_argument("--json", action="store_true", help=help)


def add_csv(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--csv", action="store_true", help="print a table of comma-separated values")


def add_plot(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--plot", type=drawing, metavar="FILE", help=help)


def add_batches(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=positive, default=32, help="pictures in a batch (default: 32)")
    parser.add_argument("--workers", type=positive, help="threads that decode pictures (default: one for each core)")


def add_pictures(parser: argparse.ArgumentParser) -> None:
    """How pictures are read, and which of a folder are taken."""
    parser.add_argument("--upright", action="store_true", default=None, help=UPRIGHT)
    add_hidden(parser)
    add_pixel_limit(parser)


def add_hidden(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hidden", action="store_true", help="also take hidden files and folders")


def add_pixel_limit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-pixels", type=positive, metavar="N", help="refuse larger pictures (default: 89 million)")


def set_pixel_limit(options: argparse.Namespace) -> None:
    if getattr(options, "max_pixels", None):
        from PIL import Image

        Image.MAX_IMAGE_PIXELS = options.max_pixels


def add_data(parser: argparse.ArgumentParser) -> None:
    """Options of data sets: where they are, and which pictures to take."""
    parser.add_argument("--data-root", type=path, metavar="DIR", help="the folder of the published data sets")
    parser.add_argument("--download", action="store_true", help="download the published data set if it is missing")
    parser.add_argument("--limit", type=positive, metavar="N", help="take N of the pictures, chosen at random")
    add_pixel_limit(parser)
    parser.add_argument("--background", choices=("white", "grey", "black"), help=BACKGROUND)


def load_model(options: argparse.Namespace) -> tuple[CLIP, Preprocess]:
    """The model that the options of `add_model` name."""
    from miniclip.loading import load

    model, preprocess = load(options.model, options.device, dtype=options.dtype, **loading_arguments(options))
    return model, replace(preprocess, upright=bool(getattr(options, "upright", None)))


def join_processes(options: argparse.Namespace) -> None:
    """If torchrun started this process, join the others, and work on this process's own device."""
    if "RANK" in os.environ:
        from miniclip.parallel import setup

        options.device = setup(options.device and options.device.type)


def model(name: str) -> str:
    """A name or path of a model; a wrong one is refused here, before PyTorch is imported."""
    from miniclip.names import fault, named_models

    if why := fault(name, named_models()):
        raise ArgumentTypeError(why)
    return name


def model_size(name: str) -> str:
    """A size of a model to train, its name or a .json file; a wrong one is refused before PyTorch is imported."""
    from miniclip.training.sizes import model_config

    try:
        model_config(name)
    except ConfigError as error:
        raise ArgumentTypeError(str(error)) from None
    return name


def device(name: str) -> torch.device:
    import torch

    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # a PyTorch without CUDA raises an AssertionError
        raise ArgumentTypeError(str(error).splitlines()[0]) from None


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def path(text: str) -> Path:
    """A path, in which ~ is the home directory."""
    return Path(text).expanduser()


def picture(text: str) -> str | Path:
    """A path, or an http or https URL."""
    return text if text.lower().startswith(("http://", "https://")) else path(text)


def with_option(option: str, pictures: Sequence[str | Path], *examples: str) -> str:
    """The arguments that a command expects in place of these: what is no file stands behind the option."""
    are_files = [isinstance(each, str) or each.exists() for each in pictures]
    files = [str(each) for each, is_file in zip(pictures, are_files, strict=True) if is_file]
    others = [str(each) for each, is_file in zip(pictures, are_files, strict=True) if not is_file]
    return shlex.join([*files, *(word for text in others or examples for word in (option, text))])


def output_file(text: str) -> Path:
    """A file in a folder that exists."""
    file = path(text)
    if not file.absolute().parent.is_dir():
        raise ArgumentTypeError(f"{file}: there is no folder {file.parent}")
    return file


def safetensors_file(text: str) -> Path:
    file = output_file(text)
    if file.suffix != ".safetensors":
        raise ArgumentTypeError(f"{file}: expected a name that ends in .safetensors")
    return file


def drawing(text: str) -> Path:
    """A file that matplotlib can write."""
    file = output_file(text)
    formats = _require_matplotlib("matplotlib.backend_bases").FigureCanvasBase.filetypes
    if file.suffix[1:].lower() not in formats:
        raise ArgumentTypeError(f"{file}: expected a name that ends in .png, .svg or .pdf")
    return file


def drawing_folder(text: str) -> Path:
    """A folder, or where one can be made, for drawings among others."""
    folder = path(text)
    _require_matplotlib()
    if not next(place for place in (folder, *folder.absolute().parents) if place.exists()).is_dir():
        raise ArgumentTypeError(f"{folder}: expected a folder, or where one can be made")
    return folder


def _require_matplotlib(module: str = "matplotlib"):
    try:
        return require(module, "plot", "drawing")
    except MissingExtraError as error:
        raise ArgumentTypeError(str(error)) from error


def template(text: str) -> str:
    """A prompt with {}, or the name of a set of prompts."""
    from miniclip.data.templates import TEMPLATES

    if "{}" not in text and text not in TEMPLATES:
        raise ArgumentTypeError(f"{text!r}: expected {{}} where the label goes, or one of {', '.join(TEMPLATES)}")
    return text
