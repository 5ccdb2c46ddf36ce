"""What each model is made of: size, resolution, context, vocabulary, and the arithmetic of one picture and one text.

No weights are needed: the models are built from their configs on PyTorch's meta device, which has shapes and no values.

FLOPs are those of one picture, and of one text of full length, in matrix products, convolutions and attention, where
every multiplication and every addition counts: twice what papers call multiply-adds, or MACs. Norms, activations and
sums are left out, as usual. FLOPs are not time: machines do some kinds of arithmetic faster than others, small models
wait for memory, and miniclip computes a text only up to its end: a tenth of what is stated for "a photo of a dog". For
time see the experiment `benchmark`.

OpenAI's sizes are in the CLIP paper's tables 19 and 20. For their ViTs and text towers the FLOPs are those that
OpenCLIP publishes (docs/model_profile.csv). For ResNets it has more, 12.22 against 11.59 GFLOP of RN50, because the
attention pool that it counted has a query for every place of the map, where one is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from miniclip.config import CLIPConfig, ResNetConfig, ViTConfig
from miniclip.evaluation.experiments.common import columns, plain_ticks
from miniclip.loading import blank_model, named_models, open_checkpoint
from miniclip.models import CLIP, convert_weights

Counted = dict[tuple, int]  # FLOPs by what decides them


def measure(file: str | None = None) -> dict:
    """Every model that can be loaded by name, and the one in `file`, from the least arithmetic on; ready for JSON."""
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
    """The figures of one model; parameters of each tower, and the scale, one more, in neither.

    counted: FLOPs of towers that were met before, and where those of this one go.
    """
    model = blank_model(config, torch.float32).eval()
    image, total = _parameters(model.visual), _parameters(model)
    image_flops, text_flops = _flops(model, {} if counted is None else counted)
    return {
        "tower": _tower(config),
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


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())


@torch.no_grad()
def _flops(model: CLIP, counted: Counted) -> tuple[int, int]:
    """Of one picture and one text of full length, in the towers' plain form.

    On the meta device, where PyTorch's counter sees all of attention; of a CPU's fused kernel it knows nothing.
    """
    config, size = model.config, model.visual.input_resolution
    image, text = (config.vision, config.embed_dim), (config.text, config.embed_dim, getattr(config, "text_taps", 0))
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


def _tower(config: CLIPConfig) -> str:
    """The image tower in few words: ViT 12 x 768 is 12 layers of width 768."""
    vision = config.vision
    if isinstance(vision, ResNetConfig):
        return f"ResNet {'-'.join(map(str, vision.layers))} x {vision.width}"
    if hasattr(vision, "transformer"):
        kind = f"ViT/{vision.patch_size}" if isinstance(vision, ViTConfig) else "conv ViT/16"
        return f"{kind} {vision.transformer.layers} x {vision.transformer.width}"
    return f"FastViT {'-'.join(map(str, vision.blocks))} x {vision.widths[0]}"


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
    from matplotlib.figure import Figure

    rows = result["models"]
    figure = Figure(figsize=(11.5, 0.28 * len(rows) + 1.8), layout="constrained")
    size, work = figure.subplots(1, 2, sharey=True)
    for place, row in enumerate(rows):
        image, text, total = (row[f"{tower}parameters"] / 1e6 for tower in ("image_", "text_", ""))
        size.barh(place, image, color="tab:blue")
        size.barh(place, text, left=image, color="tab:orange")
        size.text(total, place, f" {total:.0f} M", va="center", fontsize=8)
        image, text = (row[f"{tower}_flops"] / 1e9 for tower in ("image", "text"))
        work.plot([image, text], [place, place], color="lightgrey", zorder=0)
        work.plot(image, place, "o", color="tab:blue")
        work.plot(text, place, "o", color="tab:orange")
        work.annotate(
            f"{image:.3g}", (image, place), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=7
        )
    size.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=9)
    size.set(xlabel="millions", xlim=(0, 1.12 * max(row["parameters"] for row in rows) / 1e6), ylim=(-0.8, len(rows)))
    size.set_title("parameters", fontsize=11)
    work.set(xlabel="GFLOP, logarithmic", xscale="log")
    work.set_title("arithmetic of one picture, and of one text of full length", fontsize=11)
    plain_ticks(work.xaxis)
    for axis in (size, work):
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(handles=_legend(), loc="lower right")
    figure.suptitle("The models that miniclip loads by name")
    return figure


def _legend() -> list:
    from matplotlib.patches import Patch

    return [Patch(color="tab:blue", label="image tower"), Patch(color="tab:orange", label="text tower")]
