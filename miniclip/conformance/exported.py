"""What an exported model computes, under the names of the stages, for `compare`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from miniclip.config import PreprocessConfig
from miniclip.conformance.files import TraceError
from miniclip.conformance.rules import utf8
from miniclip.errors import require
from miniclip.preprocess import Preprocess
from miniclip.tokenizer import tokenize

Tower = Callable[[Tensor], dict[str, Tensor]]  # its input -> its outputs by name, of which each tower has its embedding


@torch.inference_mode()
def trace_exported(
    folder: str | Path, image: Image.Image | Tensor | None = None, text: list[str] | Tensor | None = None
) -> dict[str, Tensor]:
    """The stages that the files of `miniclip export` show: pixels, ids, embeddings and scores.

    image  a PIL image, of which an export that prepares pictures takes the RGB bytes; or pixels [N, 3, R, R] for an
           export that does not
    text   texts, or token ids [N, L]

    ONNX is run by onnxruntime on the CPU. Raises TraceError for another folder, MissingExtraError without onnxruntime.
    """
    config = _description(Path(folder))
    stages = {}
    if image is not None:
        takes_pictures, tower = _tower(Path(folder), "image")
        if takes_pictures:
            outputs = tower(torch.from_numpy(np.array(image.convert("RGB"))))
            pixels = outputs["pixels"]
        else:
            prepare = Preprocess(PreprocessConfig(**config["preprocess"]))
            pixels = prepare(image)[None] if isinstance(image, Image.Image) else image
            outputs = tower(pixels)
        stages |= {"image.pixels": pixels, "image_embedding": outputs["image_embedding"]}
    if text is not None:
        if not isinstance(text, Tensor):
            if "logit_bias" in config:
                raise TraceError("an exported SigLIP has a tokenizer of its own: give ids, as model.tokenize() returns")
            stages["text.utf8"] = utf8(text)
            text = tokenize(text, config["context_length"])
        _, tower = _tower(Path(folder), "text")
        stages |= {"text.ids": text, "text_embedding": tower(text)["text_embedding"]}
    if image is not None and text is not None:
        cosines = stages["image_embedding"] @ stages["text_embedding"].T
        stages["logits_per_image"] = config["logit_scale"] * cosines + config.get("logit_bias", 0.0)
    return stages


def _description(folder: Path) -> dict:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        missing = {"preprocess", "context_length", "logit_scale"} - set(config)
    except (OSError, ValueError, TypeError) as error:
        raise TraceError(f"{folder} is not a folder that `miniclip export` wrote: {error}") from error
    if missing:
        raise TraceError(f"{folder} is not a folder that `miniclip export` wrote: config.json has no {min(missing)}")
    return config


def _tower(folder: Path, name: str) -> tuple[bool, Tower]:
    """Whether a tower takes a picture, and the tower."""
    program = folder / f"{name}.pt2"
    if program.exists():
        module = torch.export.load(program).module()
        return False, lambda x: {f"{name}_embedding": module(x)}
    onnxruntime = require("onnxruntime", "onnx", "running an ONNX model")
    path = folder / f"{name}.onnx"
    if not path.exists():
        raise TraceError(f"{folder} is not a folder that `miniclip export` wrote: it has no {path.name}")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (source,) = (end.name for end in session.get_inputs())
    targets = [end.name for end in session.get_outputs()]

    def run(x: Tensor) -> dict[str, Tensor]:
        return dict(zip(targets, map(torch.from_numpy, session.run(targets, {source: x.numpy()})), strict=True))

    return source == "picture", run
