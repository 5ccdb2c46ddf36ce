"""A model's two towers as files that other runtimes take: ONNX, or the programs of torch.export.

    image.onnx (.pt2)  pixels float32 [batch, 3, R, R]  ->  image_embedding float32 [batch, E], of unit length
    text.onnx (.pt2)   ids int32 [batch, L]             ->  text_embedding float32 [batch, E], of unit length
    config.json        what the two do not hold: how pixels are prepared, and the scale of the scores,
                       logits_per_image = logit_scale * image_embedding @ text_embedding^T

Batches are of any size from 1; R, E and L, the whole context, are the model's. Arithmetic is float32.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from miniclip import ops
from miniclip.errors import MiniclipError, require
from miniclip.models import CLIP
from miniclip.models.text import TextTransformer

OPSET = 18  # of ONNX; what PyTorch's exporter writes without converting
SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
MOST_IN_ONE_FILE = 2**31 - 2**24  # bytes of tensors; ONNX files end at 2 GiB, and larger models keep tensors beside


class ExportError(MiniclipError, ValueError):
    """A model that can't be exported, or not to that place; the message says why and what to do."""


class ImageEncoder(nn.Module):
    def __init__(self, model: CLIP):
        super().__init__()
        self.visual = model.visual

    def forward(self, pixels: Tensor) -> Tensor:
        return ops.normalize(self.visual(pixels))


class TextEncoder(nn.Module):
    """A CLIP's text tower by itself; the CLIP is one too, but has the image tower's tensors beside."""

    def __init__(self, model: CLIP):
        super().__init__()
        with torch.device("meta"):
            self.text = TextTransformer(model.config.text, model.config.embed_dim)
        tensors = {name: tensor for name, tensor in model.state_dict().items() if name in self.text.state_dict()}
        self.text.load_state_dict(tensors, strict=False, assign=True)
        self.text.transformer = model.transformer  # a MobileCLIP's may be another

    def forward(self, ids: Tensor) -> Tensor:
        return self.text.encode_text(ids, normalize=True)


def export_model(model: CLIP, folder: str | Path, format: str = "onnx", name: str = "") -> None:
    """Write both towers and config.json to `folder`, which appears only once it is complete.

    model   a float32 model in eval mode, on the CPU
    format  "onnx" or "torch"
    name    of the model, for config.json

    Raises ExportError if the folder exists and is not empty, or can't be written, and as `check_installed` does.
    """
    check_installed(format)
    if model.training or any(p.dtype != torch.float32 or p.device.type != "cpu" for p in model.parameters()):
        raise ExportError("expected a float32 model in eval mode on the CPU: load(name, device='cpu')")
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{folder} exists and is not an empty directory: choose another, or remove it")
    pixels = torch.zeros(2, 3, model.visual.input_resolution, model.visual.input_resolution)
    ids = torch.zeros(2, model.context_length, dtype=torch.int32)
    write = {"onnx": _write_onnx, "torch": _write_torch}[format]

    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        unfinished.mkdir(parents=True)
        write(ImageEncoder(model), pixels, "pixels", "image_embedding", unfinished / f"image{SUFFIXES[format]}")
        write(TextEncoder(model), ids, "ids", "text_embedding", unfinished / f"text{SUFFIXES[format]}")
        (unfinished / "config.json").write_text(json.dumps(_description(model, format, name), indent=2) + "\n")
        if folder.exists():
            folder.rmdir()
        unfinished.replace(folder)
    except OSError as error:
        raise ExportError(f"can't write {folder}: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def check_installed(format: str) -> None:
    """MissingExtraError if a package is missing that writes this format; ExportError for an unknown format."""
    if format not in SUFFIXES:
        raise ExportError(f"format is {format!r}; expected one of {', '.join(SUFFIXES)}")
    for package in ("onnx", "onnxscript") if format == "onnx" else ():
        require(package, "onnx", "writing ONNX")


def _description(model: CLIP, format: str, name: str) -> dict:
    return {
        "model": name,
        "format": f"ONNX, opset {OPSET}" if format == "onnx" else f"torch.export of PyTorch {torch.__version__}",
        "preprocess": asdict(model.config.preprocess),
        "embed_dim": model.config.embed_dim,
        "context_length": model.context_length,
        "vocab_size": model.vocab_size,
        "logit_scale": model.logit_scale.exp().item(),  # already exponentiated
    }


def _capture(encoder: nn.Module, example: Tensor, name: str) -> torch.export.ExportedProgram:
    """The encoder as a graph of tensor operations; fails where the graph would hold for one batch size only."""
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(encoder.eval(), (example,), dynamic_shapes={name: {0: batch}})
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine, which would go to the file
    return program


def _write_torch(encoder: nn.Module, example: Tensor, source: str, target: str, path: Path) -> None:
    torch.export.save(_capture(encoder, example, source), path)


def _write_onnx(encoder: nn.Module, example: Tensor, source: str, target: str, path: Path) -> None:
    import onnx

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of operations of torchvision, which are not used
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch's, of itself
        program = torch.onnx.export(
            _capture(encoder, example, source),
            input_names=[source],
            output_names=[target],
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    model = program.model_proto
    graph = model.graph
    for end in (*graph.input, *graph.output):
        end.type.tensor_type.shape.dim[0].dim_param = "batch"
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]  # what PyTorch called it
    del graph.value_info[:]  # shapes between, in the exporter's names for the batch
    size = sum(parameter.nbytes for parameter in encoder.parameters())
    onnx.save(model, path, save_as_external_data=size > MOST_IN_ONE_FILE, location=f"{path.name}.data")
    onnx.checker.check_model(path)
