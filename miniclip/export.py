"""A model's two towers as files that other runtimes take: ONNX, or the programs of torch.export.

    image.onnx (.pt2)  pixels float32 [batch, 3, R, R]  ->  image_embedding float32 [batch, E], of unit length
    text.onnx (.pt2)   ids int32 [batch, L]             ->  text_embedding float32 [batch, E], of unit length
    config.json        how to use them: the preparation of pixels, and the scale of the scores,
                       logits_per_image = logit_scale * image_embedding @ text_embedding^T
    miniclip.json      the whole config of the model; an ONNX file has it in its metadata too

Batches are of any size from 1; R, E and L, the whole context, are the model's. Arithmetic is float32.
"""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from miniclip import ops
from miniclip.config import to_json
from miniclip.errors import MiniclipError, require
from miniclip.io import new_folder, write_json
from miniclip.models import CLIP
from miniclip.models.text import TextTransformer
from miniclip.weights.files import CONFIG_FILE, CONFIG_KEY

OPSET = 18  # the version of ONNX's operators that PyTorch's exporter writes without a conversion
SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
MOST_IN_ONE_FILE = 2**31 - 2**24  # bytes of tensors; larger ones get a second file, as ONNX allows 2 GiB in one


class ExportError(MiniclipError, ValueError):
    """A model or a format that can't be exported."""


class ImageEncoder(nn.Module):
    def __init__(self, model: CLIP):
        super().__init__()
        self.visual = model.visual

    def forward(self, pixels: Tensor) -> Tensor:
        return ops.normalize(self.visual(pixels))


class TextEncoder(nn.Module):
    """The text tower without the image tower's tensors."""

    def __init__(self, model: CLIP):
        super().__init__()
        with torch.device("meta"):
            self.text = TextTransformer(model.config.text, model.config.embed_dim)
        tensors = {name: tensor for name, tensor in model.state_dict().items() if name in self.text.state_dict()}
        self.text.load_state_dict(tensors, strict=False, assign=True)
        self.text.transformer = model.transformer  # some families have another

    def forward(self, ids: Tensor) -> Tensor:
        return self.text.encode_text(ids, normalize=True)


def export_model(model: CLIP, folder: str | Path, format: str = "onnx", name: str = "") -> None:
    """Write both towers and their description to `folder`, which appears only when it is complete.

    model   a float32 model in eval mode, on the CPU
    format  "onnx" or "torch"
    name    what config.json calls the model

    Raises ExportError for another model, WriteError if the folder is not empty or can't be written, and the errors of
    `check_installed`.
    """
    check_installed(format)
    if model.training or any(p.dtype != torch.float32 or p.device.type != "cpu" for p in model.parameters()):
        raise ExportError("expected a float32 model in eval mode on the CPU: load(name, device='cpu')")
    pixels = torch.zeros(2, 3, model.visual.input_resolution, model.visual.input_resolution)
    ids = torch.zeros(2, model.context_length, dtype=torch.int32)
    write = {"onnx": _write_onnx, "torch": _write_torch}[format]
    config = to_json(model.config)
    with new_folder(folder) as new:
        write(ImageEncoder(model), pixels, "pixels", "image_embedding", new / f"image{SUFFIXES[format]}", config)
        write(TextEncoder(model), ids, "ids", "text_embedding", new / f"text{SUFFIXES[format]}", config)
        write_json(new / "config.json", _description(model, format, name))
        write_json(new / CONFIG_FILE, config)


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
        node.meta.pop("stack_trace", None)  # it has paths of this machine
    return program


def _write_torch(encoder: nn.Module, example: Tensor, source: str, target: str, path: Path, config: dict) -> None:
    torch.export.save(_capture(encoder, example, source), path)


def _write_onnx(encoder: nn.Module, example: Tensor, source: str, target: str, path: Path, config: dict) -> None:
    import onnx

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is missing, which is not used
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about PyTorch's own code
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
        del part.metadata_props[:]  # PyTorch's names
    del graph.value_info[:]  # shapes of intermediate values, in which the exporter has its own names for the batch
    model.metadata_props.add(key=CONFIG_KEY, value=json.dumps(config))
    size = sum(parameter.nbytes for parameter in encoder.parameters())
    onnx.save(model, path, save_as_external_data=size > MOST_IN_ONE_FILE, location=f"{path.name}.data")
    onnx.checker.check_model(path)
