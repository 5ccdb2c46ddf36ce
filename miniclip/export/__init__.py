"""A model's two towers as files that other runtimes take: ONNX, or the programs of torch.export.

    image.onnx (.pt2)  pixels float32 [batch, 3, R, R]  ->  image_embedding float32 [batch, E], of unit length
    text.onnx (.pt2)   ids int32 [batch, length]        ->  text_embedding float32 [batch, E], of unit length
    config.json        how to use them: the preparation of pixels, and the scale of the scores,
                       logits_per_image = logit_scale * image_embedding @ text_embedding^T, plus a SigLIP's logit_bias
    miniclip.json      the whole config of the model; an ONNX file has it in its metadata too
    tokenizer.model    a SigLIP's tokenizer, or tokenizer.json

Batches are of any size from 1; R and E are the model's. Where attention is causal, texts are of any length up to the
model's context, since the padding after the end-of-text token has no influence; elsewhere they fill the context.
Weights and arithmetic have the model's dtype, float32, or float16 with float32 norms; inputs and outputs never change.

With the preparation of pictures, which only ONNX can hold, image.onnx takes a picture instead of pixels:

    image.onnx         picture uint8 [height, width, 3], RGB, of any size  ->  image_embedding float32 [1, E]
                                                                               pixels float32 [1, 3, R, R]

README.md in this folder says how exact each of these is.
"""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from miniclip import ops
from miniclip.config import to_json
from miniclip.errors import MiniclipError, require
from miniclip.export.picture import PIXELS, put_before
from miniclip.io import new_folder, write_json
from miniclip.loading import blank_model, family_of
from miniclip.models import CLIP
from miniclip.weights.files import CONFIG_FILE, CONFIG_KEY

if TYPE_CHECKING:
    import onnx

Sides = dict[int, torch.export.Dim]  # the sides of an input that may have any size

DTYPES = (torch.float32, torch.float16)
OPSET = 18  # the version of ONNX's operators that PyTorch's exporter writes without a conversion
SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
OTHERS = ("visual", "logit_scale", "logit_bias", "tokenizer_file")  # attributes of a model that its text tower lacks
MOST_IN_ONE_FILE = 2**31 - 2**24  # bytes of tensors; larger ones get a second file, as ONNX allows 2 GiB in one


class ExportError(MiniclipError, ValueError):
    """A model or a format that can't be exported."""


class ImageEncoder(nn.Module):
    def __init__(self, model: CLIP):
        super().__init__()
        self.visual = model.visual
        self.dtype = model.dtype

    def forward(self, pixels: Tensor) -> Tensor:
        return ops.normalize(self.visual(pixels.to(self.dtype)).float())


class TextEncoder(nn.Module):
    """The text tower without the image tower's tensors."""

    def __init__(self, model: CLIP):
        super().__init__()
        self.text = blank_model(model.config, torch.float32)
        for name in OTHERS:
            if hasattr(self.text, name):
                delattr(self.text, name)
        tensors = {name: tensor for name, tensor in model.state_dict().items() if name in self.text.state_dict()}
        table = "token_embedding.weight"
        tensors[table] = tensors[table].to(model.dtype)  # as the tower rounds each row that it looks up
        self.text.load_state_dict(tensors, assign=True)

    def forward(self, ids: Tensor) -> Tensor:
        return ops.normalize(self.text.encode_text(ids).float())


def export_model(
    model: CLIP, folder: str | Path, format: str = "onnx", name: str = "", with_preprocess: bool = False
) -> None:
    """Write both towers and their description to `folder`, which appears only when it is complete.

    model            a float32 or float16 model in eval mode, on the CPU
    format           "onnx" or "torch"
    name             what config.json calls the model
    with_preprocess  whether the image tower takes a picture instead of pixels; only for "onnx"

    Raises ExportError for another model, WriteError if the folder is not empty or can't be written, and the errors of
    `check_format`.
    """
    check_format(format, with_preprocess)
    elsewhere = any(parameter.device.type != "cpu" for parameter in model.parameters())
    if model.training or elsewhere or model.dtype not in DTYPES:
        raise ExportError("expected a float32 or float16 model in eval mode on the CPU: load(name, device='cpu')")
    side, context = model.visual.input_resolution, model.context_length
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=1, max=context)
    free = {0: batch, 1: length} if model.transformer.causal and context > 1 else {0: batch}
    towers = {
        "image": (ImageEncoder(model), PIXELS, torch.zeros(2, 3, side, side), {0: batch}),
        "text": (TextEncoder(model), "ids", torch.zeros(2, context, dtype=torch.int32), free),
    }
    config = to_json(model.config)
    with new_folder(folder) as new:
        for tower, (encoder, source, example, sides) in towers.items():
            program, path = _capture(encoder, source, example, sides), new / f"{tower}{SUFFIXES[format]}"
            if format == "torch":
                torch.export.save(program, path)
                continue
            file = _to_onnx(program, source, f"{tower}_embedding", sides)
            if model.dtype == torch.float16:
                _round_convolutions(file)
            if with_preprocess and tower == "image":
                put_before(file, model.config.preprocess, OPSET)
            _save_onnx(file, path, config)
        if (write_tokenizer := family_of(model.config).write_tokenizer) is not None:
            write_tokenizer(model, new)
        write_json(new / "config.json", _description(model, format, name))
        write_json(new / CONFIG_FILE, config)


def check_format(format: str, with_preprocess: bool) -> None:
    """MissingExtraError if a package is missing that writes this format; ExportError for one that there is not."""
    if format not in SUFFIXES:
        raise ExportError(f"format is {format!r}; expected one of {', '.join(SUFFIXES)}")
    if with_preprocess and format != "onnx":
        raise ExportError(f"format {format!r} can't hold the preparation of pictures; expected 'onnx'")
    for package in ("onnx", "onnxscript") if format == "onnx" else ():
        require(package, "onnx", "writing ONNX")


def _description(model: CLIP, format: str, name: str) -> dict:
    return {
        "model": name,
        "format": f"ONNX, opset {OPSET}" if format == "onnx" else f"torch.export of PyTorch {torch.__version__}",
        "dtype": str(model.dtype).removeprefix("torch."),
        "preprocess": asdict(model.config.preprocess),
        "embed_dim": model.config.embed_dim,
        "context_length": model.context_length,
        "vocab_size": model.vocab_size,
        "logit_scale": model.logit_scale.exp().item(),  # already exponentiated
        **({} if model.logit_bias is None else {"logit_bias": model.logit_bias.item()}),
    }


def _capture(encoder: nn.Module, source: str, example: Tensor, free: Sides) -> torch.export.ExportedProgram:
    """The encoder as a graph of tensor operations; fails where the graph would hold for one of the free sides only."""
    program = torch.export.export(encoder.eval(), (example,), dynamic_shapes={source: free})
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it has paths of this machine
    return program


def _to_onnx(program: torch.export.ExportedProgram, source: str, target: str, free: Sides) -> onnx.ModelProto:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is missing, which is not used
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about PyTorch's own code
        model = torch.onnx.export(
            program, input_names=[source], output_names=[target], opset_version=OPSET, dynamo=True, verbose=False
        ).model_proto
    graph = model.graph
    for side, dim in free.items():
        graph.input[0].type.tensor_type.shape.dim[side].dim_param = dim.__name__
    graph.output[0].type.tensor_type.shape.dim[0].dim_param = free[0].__name__
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]  # PyTorch's names
    del graph.value_info[:]  # shapes of intermediate values, in which the exporter has its own names for the free sides
    return model


def _round_convolutions(model: onnx.ModelProto) -> None:
    """To float16, in place: the exporter folds batch norms into convolutions, in the norms' float32."""
    from onnx import numpy_helper

    names = {name for node in model.graph.node if node.op_type == "Conv" for name in node.input[1:]}
    for tensor in model.graph.initializer:
        if tensor.name in names:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype("float16"), tensor.name))


def _save_onnx(model: onnx.ModelProto, path: Path, config: dict) -> None:
    import onnx

    model.metadata_props.add(key=CONFIG_KEY, value=json.dumps(config))
    size = sum(tensor.ByteSize() for tensor in model.graph.initializer)
    onnx.save(model, path, save_as_external_data=size > MOST_IN_ONE_FILE, location=f"{path.name}.data")
    onnx.checker.check_model(path)
