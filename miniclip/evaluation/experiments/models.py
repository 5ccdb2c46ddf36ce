"""The size of each model: parameters, resolution, context, vocabulary, and the FLOPs of one picture and one text.

No weights are needed: the models are built from their configs on PyTorch's meta device, which has shapes and no values.

FLOPs are those of matrix products, convolutions and attention, for one picture and for one text of full length. Each
multiplication and each addition counts as one, so the figures are twice the multiply-adds (MACs) of other tables.
Norms, activations and residual additions are left out, as usual. FLOPs do not tell the time: some operations use a
machine better than others, small models wait for memory, and miniclip computes a text only up to its end-of-text token,
which takes a tenth of the stated FLOPs for "a photo of a dog". The experiment `benchmark` measures times.

OpenAI's sizes are in the CLIP paper's tables 19 and 20. For the ViTs and text towers the FLOPs agree with those that
OpenCLIP publishes (docs/model_profile.csv). For ResNets OpenCLIP has more, 12.22 against 11.59 GFLOP for RN50, because
it counted an attention pool with a query for every position of the map; one query is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from miniclip.config import CLIPConfig
from miniclip.evaluation.draw import new_figure, open_frame, plain_ticks
from miniclip.loading import blank_model, named_models, open_checkpoint
from miniclip.models import CLIP, convert_weights
from miniclip.table import columns

Counted = dict[tuple, int]  # FLOPs of towers, by the parts of the config that they depend on


def measure(file: str | None = None) -> dict:
    """All models that `load` takes by name, and the one in `file`, sorted by FLOPs; ready for JSON."""
    configs = [
        (name, model.config.family if model.url else "embedded", model.config) for name, model in named_models().items()
    ]
    if file is not None:
        configs.append((file, "file", open_checkpoint(file)[0]))
    counted: Counted = {}
    progress = tqdm(configs, unit=" models", disable=None, leave=False)
    rows = [{"name": name, "family": family, **describe(config, counted)} for name, family, config in progress]
    return {"models": sorted(rows, key=lambda row: row["image_flops"] + row["text_flops"])}


def describe(config: CLIPConfig, counted: Counted | None = None) -> dict:
    """The figures of one model. `logit_scale` is one more parameter, which belongs to neither tower.

    counted: FLOPs of the towers that were counted before; those of this model are added.
    """
    model = blank_model(config, torch.float32).eval()
    image, total = (sum(x.numel() for x in part.parameters()) for part in (model.visual, model))
    image_flops, text_flops = _flops(model, {} if counted is None else counted)
    return {
        "tower": config.vision.summary,
        "pixels": config.preprocess.image_size,
        "embedding": config.embed_dim,
        "context": config.text.context_length,
        "vocabulary": config.text.vocab_size,
        "parameters": total,
        "image_parameters": image,
        "text_parameters": total - image - 1,
        "bytes_float32": _bytes(model),
        "bytes_float16": _bytes(convert_weights(model, torch.float16)),
        "image_flops": image_flops,
        "text_flops": text_flops,
    }


def _bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())


@torch.no_grad()
def _flops(model: CLIP, counted: Counted) -> tuple[int, int]:
    """FLOPs of one picture and of one text of full length, in the towers' plain form.

    On the meta device PyTorch's counter sees all of attention; it can't see into a CPU's fused kernel.
    """
    config, size = model.config, model.visual.input_resolution
    image = type(config), config.vision, config.embed_dim
    rest = [getattr(config, part.name) for part in fields(config) if part.name not in ("vision", "preprocess")]
    text = type(config), *rest
    if image not in counted:
        counted[image] = _counted(model.encode_image, torch.empty(1, 3, size, size, device="meta"))
    if text not in counted:
        ids = torch.empty(1, model.context_length, dtype=torch.int64, device="meta")
        counted[text] = _counted(model.encode_text, ids)
    return counted[image], counted[text]


def _counted(encode: Callable[[Tensor], Tensor], inputs: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        encode(inputs)
    return counter.get_total_flops()


def table(result: Mapping) -> str:
    headings = ["model", "image tower", "pixels", "embedding", "context", "vocabulary"]
    headings += ["M parameters", "image", "text", "MB float16", "GFLOP image", "text"]
    rows = []
    for row in result["models"]:
        sizes = [f"{row[key]:,}" for key in ("pixels", "embedding", "context", "vocabulary")]
        millions = [f"{row[key] / 1e6:.1f}" for key in ("parameters", "image_parameters", "text_parameters")]
        flops = [f"{row[key] / 1e9:.2f}" for key in ("image_flops", "text_flops")]
        rows.append([row["name"], row["tower"], *sizes, *millions, f"{row['bytes_float16'] / 1e6:,.0f}", *flops])
    note = "GFLOP: 10^9 multiplications and additions for one picture, and for one text of full length"
    return f"{columns(headings, rows, left=2)}\n\n{note}"


def draw(result: Mapping):
    """Two panels over the same models: parameters of both towers, and FLOPs of both on a logarithmic scale."""
    rows = result["models"]
    names, places = [row["name"] for row in rows], range(len(rows))
    images, texts = ([row[f"{tower}_parameters"] / 1e6 for row in rows] for tower in ("image", "text"))
    figure = new_figure(11.5, 0.28 * len(rows) + 1.8)
    size, work = figure.subplots(1, 2, sharey=True)
    size.barh(places, images, color="tab:blue", label="image tower")
    bars = size.barh(places, texts, left=images, color="tab:orange", label="text tower")
    size.bar_label(bars, [f" {row['parameters'] / 1e6:.0f} M" for row in rows], fontsize=8)
    size.set_yticks(places, names, fontsize=9)
    size.set(xlabel="millions", xlim=(0, 1.12 * max(row["parameters"] for row in rows) / 1e6), ylim=(-0.8, len(rows)))
    size.set_title("parameters", fontsize=11)
    images, texts = ([row[f"{tower}_flops"] / 1e9 for row in rows] for tower in ("image", "text"))
    work.hlines(places, images, texts, color="lightgrey", zorder=0)
    work.plot(images, places, "o", color="tab:blue", label="one picture")
    work.plot(texts, places, "o", color="tab:orange", label="one text of full length")
    for place, flops in zip(places, images, strict=True):
        above = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center", "fontsize": 7}
        work.annotate(f"{flops:.3g}", (flops, place), **above)
    work.set(xlabel="GFLOP, logarithmic", xscale="log")
    work.set_title("FLOPs", fontsize=11)
    plain_ticks(work.xaxis)
    for axis in (size, work):
        open_frame(axis, "x")
        axis.legend(loc="lower right")
    figure.suptitle("The models that miniclip loads by name")
    return figure
