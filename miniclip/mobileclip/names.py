"""MobileCLIP's files: names of tensors, and how the branches that are there in training become one convolution each.

    Apple's names  --APPLE-->  OpenCLIP's and timm's  --reparameterize-->  folded  --TABLES-->  miniclip's

The algebra, for convolutions without a bias and BatchNorm (weight g, bias b, mean m, variance v) as it is in inference:

    fold(K, BN)    BN(K x) = K' x + b' with K' = K g / sqrt(v + eps), output channel by output channel, and
                   b' = b - m g / sqrt(v + eps)
    delta          x itself is a convolution of x: 1 in the middle, from each input channel to itself, 0 elsewhere
    MobileOne      fold(k x k) + fold(1 x 1, padded by zeros to k x k) + fold(delta), of which some may be absent
    RepMixer       x + s (mixer(x) - norm(x)), both MobileOnes: delta + s (K_mixer - K_norm), s (b_mixer - b_norm)
    large kernel   fold(7 x 7) + fold(3 x 3, padded)
    position       x + K x + b: delta + K, b
    layer scale    x + s (W y + b): s W, s b; this one is in TABLES, since timm's folded model has layer scales too

Sums and products are made in float64, and rounded once.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip.mobileclip.config import CONV_VIT, MCI, VIT_L, MobileCLIPConfig, mobileclip_config
from miniclip.weights.errors import CheckpointError
from miniclip.weights.names import OPENCLIP, SAME, TRANSPOSE, Converted, Row, Transform, shapes_of, to_canonical

EPS = 1e-5  # of every BatchNorm
BATCH_NORM = ("weight", "bias", "running_mean", "running_var")

Parts = dict[str, Tensor]  # the tensors of a module that is folded, by their names within it
KernelAndBias = tuple[Tensor, Tensor]

# Parts of Apple's names and their replacements in OpenCLIP's, applied in this order, after `network.#` is `stages.#`.
APPLE = (
    (r"^image_encoder\.model\.", "visual.trunk."),
    (r"^text_encoder\.", "text."),
    (r"\.patch_embed\.", ".stem."),
    (r"\.patch_emb\.(\d+)\.block\.conv", r".patch_embed.backbone.\1.conv"),
    (r"\.patch_emb\.(\d+)\.block\.norm", r".patch_embed.backbone.\1.bn"),
    (r"\.conv_exp\.", ".final_conv."),
    (r"\.rbr_conv\.", ".conv_kxk."),
    (r"\.rbr_scale\.", ".conv_scale."),
    (r"\.rbr_skip\.", ".identity."),
    (r"\.lkb_origin\.", ".large_conv."),
    (r"\.lkb_reparam\.", ".reparam_conv."),
    (r"\.convffn\.", ".mlp."),
    (r"\.se\.reduce\.", ".se.fc1."),
    (r"\.se\.expand\.", ".se.fc2."),
    (r"\.(layer_scale(?:_[12])?)$", r".\1.gamma"),
    (r"\.head\.proj$", ".head.fc.weight"),
    (r"\.classifier\.proj$", ".head.weight"),
    (r"\.post_transformer_norm\.", ".norm."),
    (r"\.(?:pos_embed|positional_embedding)(\.pos_embed){2}$", ".positions"),
    (r"^visual\.trunk\.positions$", "visual.trunk.pos_embed"),
    (r"^text\.positions$", "text.positional_embedding"),
    (r"^(visual\.trunk)\.transformer\.(\d+)\.pre_norm_mha\.0\.", r"\1.blocks.\2.norm1."),
    (r"^(visual\.trunk)\.transformer\.(\d+)\.pre_norm_mha\.1\.qkv_proj\.", r"\1.blocks.\2.attn.qkv."),
    (r"^(visual\.trunk)\.transformer\.(\d+)\.pre_norm_mha\.1\.out_proj\.", r"\1.blocks.\2.attn.proj."),
    (r"^(visual\.trunk)\.transformer\.(\d+)\.pre_norm_ffn\.0\.", r"\1.blocks.\2.norm2."),
    (r"^(visual\.trunk)\.transformer\.(\d+)\.pre_norm_ffn\.1\.", r"\1.blocks.\2.mlp.fc1."),
    (r"^(visual\.trunk)\.transformer\.(\d+)\.pre_norm_ffn\.4\.", r"\1.blocks.\2.mlp.fc2."),
    (r"^text\.transformer\.(\d+)\.", r"text.transformer.resblocks.\1."),
    (r"\.pre_norm_mha\.0\.", ".ln_1."),
    (r"\.pre_norm_mha\.1\.qkv_proj\.", ".attn.in_proj_"),
    (r"\.pre_norm_mha\.1\.out_proj\.", ".attn.out_proj."),
    (r"\.pre_norm_ffn\.0\.", ".ln_2."),
    (r"\.pre_norm_ffn\.1\.", ".mlp.c_fc."),
    (r"\.pre_norm_ffn\.4\.", ".mlp.c_proj."),
    (r"^text\.embedding_layer\.", "text.token_embedding."),
    (r"^text\.final_layer_norm\.", "text.ln_final."),
    (r"^text\.projection_layer$", "text.text_projection"),
)

# Tensors that have another shape in Apple's files, by OpenCLIP's names, and how they are converted.
APPLE_SHAPES = {
    "visual.trunk.pos_embed": lambda x: x.squeeze(0),
    "text.positional_embedding": lambda x: x.squeeze((0, 1)),
    "visual.trunk.head.fc.weight": lambda x: x.T,
    "visual.trunk.head.weight": lambda x: x.T,
}

# The branches of each MobileOne module in an MCi tower and in the text tower with convolutions. The first pattern that
# matches the module's name counts. MCi3 and MCi4 have no conv_scale in the stem.
BRANCHES = (
    (r".*\.stem\.[01]", {"conv_kxk", "conv_scale"}),
    (r".*\.stem\.2", {"conv_kxk", "identity"}),
    (r".*\.downsample\.proj\.1", {"conv_kxk", "identity"}),
    (r".*\.final_conv", {"conv_kxk", "conv_scale"}),
    (r"text\..*\.token_mixer\.mixer", {"conv_kxk", "identity"}),
    (r".*\.token_mixer\.mixer", {"conv_kxk", "conv_scale", "identity"}),
)


def _row(canonical: str, openclip: str, transform: Transform = SAME) -> Row:
    return Row(canonical, (openclip,), transform)


def _times_scale(x: Tensor, scale: Tensor) -> Tensor:
    if scale.numel() != len(x):
        raise CheckpointError(
            f"got a layer scale {list(scale.shape)} of a layer {list(x.shape)}; expected [{len(x)}, 1, 1]"
        )
    return x if x.is_meta else x * scale.view(-1, *[1] * (x.ndim - 1))  # arithmetic on meta: see _folded


# A layer's output is multiplied by a layer scale [C, 1, 1]. Reading multiplies the layer's weights by it instead;
# writing gives a layer scale of 1.
SCALED = Transform(_times_scale, lambda x, i: x if i == 0 else x.new_ones(len(x), 1, 1))


def _scaled(canonical: str, openclip: str, scale: str) -> tuple[Row, Row]:
    return tuple(
        Row(f"{canonical}.{part}", (f"{openclip}.{part}", f"{scale}.gamma"), SCALED) for part in ("weight", "bias")
    )


_BLOCK, _OPENCLIP_BLOCK = "transformer.resblocks.#.", "text.transformer.resblocks.#."
_TEXT = (
    _row(f"{_BLOCK}mixer.*", f"{_OPENCLIP_BLOCK}token_mixer.reparam_conv.*"),
    *_scaled(f"{_BLOCK}mlp.fc2", f"{_OPENCLIP_BLOCK}mlp.fc2", f"{_OPENCLIP_BLOCK}layer_scale"),
    *OPENCLIP[:-1],  # without its row of visual.**
)
_STAGE, _OPENCLIP_STAGE = "visual.stages.#.", "visual.trunk.stages.#."
_BLOCK, _OPENCLIP_BLOCK = f"{_STAGE}blocks.#.", f"{_OPENCLIP_STAGE}blocks.#."
_ATTENTION = tuple(  # of blocks with attention, which come from stage 3 on
    row
    for stage in ("3", "4")
    for canonical, openclip in [(_BLOCK.replace("#", stage, 1), _OPENCLIP_BLOCK.replace("#", stage, 1))]
    for row in (
        *_scaled(f"{canonical}attn.out_proj", f"{openclip}token_mixer.proj", f"{openclip}layer_scale_1"),
        *_scaled(f"{canonical}mlp.fc2", f"{openclip}mlp.fc2", f"{openclip}layer_scale_2"),
    )
)
_VIT = (
    _row("visual.class_embedding", "visual.trunk.cls_token", Transform(lambda x: x[0, 0], lambda x, i: x[None, None])),
    _row("visual.positional_embedding", "visual.trunk.pos_embed", Transform(lambda x: x[0], lambda x, i: x[None])),
    _row("visual.transformer.resblocks.#.ln_1.*", "visual.trunk.blocks.#.norm1.*"),
    _row("visual.transformer.resblocks.#.attn.in_proj_*", "visual.trunk.blocks.#.attn.qkv.*"),
    _row("visual.transformer.resblocks.#.attn.out_proj.*", "visual.trunk.blocks.#.attn.proj.*"),
    _row("visual.transformer.resblocks.#.ln_2.*", "visual.trunk.blocks.#.norm2.*"),
    _row("visual.transformer.resblocks.#.mlp.c_fc.*", "visual.trunk.blocks.#.mlp.fc1.*"),
    _row("visual.transformer.resblocks.#.mlp.c_proj.*", "visual.trunk.blocks.#.mlp.fc2.*"),
    _row("visual.ln_post.*", "visual.trunk.norm.*"),
)

# miniclip's names, and OpenCLIP's after the branches are folded; a table for each kind of image tower.
TABLES = {
    "MCi": (
        *_TEXT,
        _row("visual.stem.#.*", "visual.trunk.stem.#.reparam_conv.*"),
        _row(f"{_STAGE}downsample.conv.*", f"{_OPENCLIP_STAGE}downsample.proj.0.reparam_conv.*"),
        _row(f"{_STAGE}downsample.se.reduce.*", f"{_OPENCLIP_STAGE}downsample.proj.0.se.fc1.*"),
        _row(f"{_STAGE}downsample.se.expand.*", f"{_OPENCLIP_STAGE}downsample.proj.0.se.fc2.*"),
        _row(f"{_STAGE}downsample.pointwise.*", f"{_OPENCLIP_STAGE}downsample.proj.1.reparam_conv.*"),
        _row(f"{_STAGE}position.*", f"{_OPENCLIP_STAGE}pos_emb.reparam_conv.*"),
        _row(f"{_BLOCK}mixer.*", f"{_OPENCLIP_BLOCK}token_mixer.reparam_conv.*"),
        _row(f"{_BLOCK}norm.**", f"{_OPENCLIP_BLOCK}norm.**"),
        _row(f"{_BLOCK}attn.in_proj.weight", f"{_OPENCLIP_BLOCK}token_mixer.qkv.weight"),
        *_ATTENTION,
        *_scaled(f"{_BLOCK}mlp.fc2", f"{_OPENCLIP_BLOCK}mlp.fc2", f"{_OPENCLIP_BLOCK}layer_scale"),
        _row(f"{_BLOCK}mlp.**", f"{_OPENCLIP_BLOCK}mlp.**"),
        _row("visual.last.*", "visual.trunk.final_conv.reparam_conv.*"),
        _row("visual.se.reduce.*", "visual.trunk.final_conv.se.fc1.*"),
        _row("visual.se.expand.*", "visual.trunk.final_conv.se.fc2.*"),
        _row("visual.proj.*", "visual.trunk.head.fc.*"),
    ),
    "ViT with convolutions": (
        *_TEXT,
        *_VIT,
        _row("visual.stem.#.*", "visual.trunk.patch_embed.backbone.#.*"),
        _row("visual.proj.*", "visual.trunk.head.*"),
    ),
    "ViT": (
        *_TEXT,
        *_VIT,
        _row("visual.conv1.weight", "visual.trunk.patch_embed.proj.weight"),
        _row("visual.ln_pre.*", "visual.trunk.norm_pre.*"),
        _row("visual.proj", "visual.trunk.head.weight", TRANSPOSE),
        _row("visual.proj_bias", "visual.trunk.head.bias"),
    ),
}


# Every MobileCLIP has one of these names: Apple's files, OpenCLIP's, and miniclip's.
SIGNS = re.compile(
    r"image_encoder\.model\..*"
    r"|visual\.trunk\.(stem\.0\.(conv_kxk\.0\.conv|reparam_conv)|patch_embed\.backbone\.0\.conv|norm_pre)\.weight"
    r"|visual\.(stem\.0\.weight|proj_bias)"
)


def recognises(names: Iterable[str]) -> bool:
    """Whether a file's names are those of a MobileCLIP."""
    return any(map(SIGNS.fullmatch, names))


def is_canonical(names: Iterable[str]) -> bool:
    """Whether the names of a MobileCLIP are those in miniclip's state dict."""
    return "visual.stem.0.weight" in names or "visual.proj_bias" in names


def read(
    tensors: Mapping[str, Tensor], config: MobileCLIPConfig | None, activation: str | None
) -> tuple[MobileCLIPConfig, Mapping[str, Tensor]]:
    """The config, inferred unless it is known, and the tensors under miniclip's names, from those of any file."""
    if activation not in (None, "gelu"):
        raise CheckpointError(f"every MobileCLIP has gelu, not {activation}: leave activation= (--activation) out")
    code = None
    if not is_canonical(tensors):
        code = "apple" if any(name.startswith("image_encoder.") for name in tensors) else "openclip"
        fused = reparameterize(tensors)
        tensors = to_canonical("MobileCLIP", fused, TABLES[tower_of(fused, "visual.trunk.")])
    return config or infer(shapes_of(tensors), code), tensors


def tower_of(names: Iterable[str], prefix: str) -> str:
    """The kind of an image tower, a key of `TABLES`."""
    if f"{prefix}cls_token" not in names and f"{prefix}class_embedding" not in names:
        return "MCi"
    convolutions = (f"{prefix}patch_embed.backbone.0.weight", f"{prefix}stem.0.weight")
    return "ViT with convolutions" if any(name in names for name in convolutions) else "ViT"


def infer(shapes: Mapping[str, tuple[int, ...]], code: str | None = None) -> MobileCLIPConfig:
    """The config of tensors under miniclip's names, as far as names and shapes tell it.

    code: for MobileCLIP-B, a key of `CONV_VIT`: the code whose names the file has. L-14 of the first and of the second
    generation have equal shapes; the second is taken, whose pictures are resized bicubically.
    """
    kind = tower_of(shapes, "visual.")
    if kind == "ViT":
        return mobileclip_config(VIT_L, bicubic=True)
    if kind == "ViT with convolutions":
        if code is None:
            raise CheckpointError(
                "MobileCLIP-B or MobileCLIP2-B under miniclip's names: its tensors don't tell which, so load a "
                ".safetensors file that save_checkpoint wrote, or call build_model(state_dict, config=...)"
            )
        return mobileclip_config(CONV_VIT[code])
    stages = defaultdict(set)
    for name in shapes:
        if match := re.match(r"visual\.stages\.(\d{1,4})\.blocks\.(\d{1,4})\.", name):
            stages[int(match[1])].add(match[2])
    blocks = tuple(len(stages[stage]) for stage in sorted(stages))
    width, *_ = shapes.get("visual.stem.0.weight") or (0,)
    for tower in MCI.values():
        if (tower.widths[0], tower.blocks) == (width, blocks):
            return mobileclip_config(tower, mct="transformer.resblocks.0.mixer.weight" in shapes)
    known = "; ".join(f"{name}: {tower.widths[0]} and {tower.blocks}" for name, tower in MCI.items())
    raise CheckpointError(f"an image tower of {width} channels with {blocks} blocks a stage; expected one of {known}")


def reparameterize(tensors: Mapping[str, Tensor]) -> Converted:
    """A MobileCLIP's tensors with every branch of training folded, under OpenCLIP's names.

    tensors: under Apple's or OpenCLIP's names; all, some or none of their modules may be folded already. Each tensor is
    read and folded whenever it is used. CheckpointError for a module with a missing or an additional branch.
    """
    tensors = _renamed(tensors)
    plan, modules = {}, defaultdict(dict)
    for name in tensors:
        for pattern, fold, target in FOLDS:
            if match := re.fullmatch(pattern, name):
                modules[match[1], fold, target][match[2]] = name
                break
        else:
            plan[name] = (_same, (name,))
    large = any(name.startswith("visual.trunk.stages.4.") for name in tensors)
    for (module, fold, target), names in modules.items():
        _check_branches(module, names, large)
        for i, name in enumerate(("weight", "bias")):
            plan[f"{module}.{target}{name}"] = (partial(_folded, module, fold, tuple(names), i), tuple(names.values()))
    return Converted(tensors, plan)


def _renamed(tensors: Mapping[str, Tensor]) -> Converted:
    """The tensors under OpenCLIP's names instead of Apple's, without BatchNorm's counters of batches."""
    found = {match[1] for name in tensors if (match := re.search(r"\.network\.(\d{1,4})\.proj\.", name))}
    downsamples = sorted(map(int, found))
    plan = {}
    for name in tensors:
        if not name.endswith("num_batches_tracked"):
            new = _apple_to_openclip(name, downsamples)
            if new in plan:
                raise CheckpointError(f"two tensors are {new}: one under Apple's name, one under OpenCLIP's")
            plan[new] = (APPLE_SHAPES.get(new, _same) if new != name else _same, (name,))
            if new != name and new.startswith("visual.trunk.head."):  # which has a bias in OpenCLIP
                plan[new.replace("weight", "bias")] = (lambda proj: proj.new_zeros(proj.shape[1]), (name,))
    return Converted(tensors, plan)


def _apple_to_openclip(name: str, downsamples: list[int]) -> str:
    if not name.startswith(("image_encoder.", "text_encoder.")):
        return name
    if match := re.fullmatch(r"(.*)\.network\.(\d{1,4})\.(.*)", name):  # stages, downsamples and positions in one row
        prefix, index, rest = match[1], int(match[2]), match[3]
        stage = bisect_right(downsamples, index)
        if rest.startswith("proj."):
            rest = f"downsample.{rest}"
        elif rest.startswith(("pe.", "reparam_conv.")):
            rest = f"pos_emb.{rest}".replace(".pe.", ".pos_enc.")
        else:
            rest = f"blocks.{rest}"
        name = f"{prefix}.stages.{stage}.{rest}"
    for pattern, replacement in APPLE:
        name = re.sub(pattern, replacement, name)
    return name


def _same(x: Tensor) -> Tensor:
    return x


def _check_branches(module: str, names: Iterable[str], large: bool) -> None:
    """CheckpointError unless a MobileOne, `module` or the mixer of a RepMixer, has exactly its branches."""
    if any(name.startswith("mixer.") for name in names):
        module, names = f"{module}.mixer", [name.removeprefix("mixer.") for name in names if name.startswith("mixer.")]
    expected, got = expected_branches(module, large), {name.split(".")[0] for name in names}
    if expected and got != expected:
        raise CheckpointError(f"{module} has branches {sorted(got)}; expected {sorted(expected)}")


def expected_branches(module: str, large: bool) -> set[str]:
    """The branches of a MobileOne; empty for other modules. large: it is part of MCi3 or MCi4."""
    branches = next((branches for pattern, branches in BRANCHES if re.fullmatch(pattern, module)), set())
    return branches - {"conv_scale"} if large and ".stem." in module else branches


def _folded(module: str, fold: Callable[[Parts], KernelAndBias], names: tuple[str, ...], i: int, *tensors: Tensor):
    """The folded kernel, i = 0, or bias. On the meta device one channel is folded instead, for the names alone:
    PyTorch's arithmetic on meta tensors takes twenty times as long, and imports a compiler.
    """
    kernel = max((tensor for tensor in tensors if tensor.ndim == 4), key=Tensor.numel)
    shape = kernel.shape[:1] if i else kernel.shape
    dtype = min((tensor.dtype for tensor in tensors), key=lambda dtype: dtype.itemsize)
    for name, tensor in zip(names, tensors, strict=True):
        if tensor.ndim != 4 and tensor.numel() != len(kernel):  # a single value would count for every channel
            raise CheckpointError(
                f"{module}.{name} is {list(tensor.shape)}; expected a value for each of {len(kernel)}"
            )
    if kernel.is_meta:
        parts = {name: torch.ones([1] * tensor.ndim) for name, tensor in zip(names, tensors, strict=True)}
    else:
        parts = {name: tensor.double() for name, tensor in zip(names, tensors, strict=True)}
    try:
        result = fold(parts)[i]
    except KeyError as missing:
        raise CheckpointError(f"{module} lacks {missing.args[0]}") from None
    if parts:
        raise CheckpointError(f"{module} has {', '.join(parts)}, which has no place there")
    if kernel.is_meta:
        return torch.empty(shape, dtype=dtype, device="meta")
    if result.shape != shape:
        raise CheckpointError(f"{module} becomes {list(result.shape)} where its branches are merged, not {list(shape)}")
    return result.to(dtype)


def _fold(kernel: Tensor, parts: Parts, norm: str) -> KernelAndBias:
    weight, bias, mean, variance = (parts.pop(f"{norm}.{name}") for name in BATCH_NORM)
    scale = weight / torch.sqrt(variance + EPS)
    return kernel * scale[:, None, None, None], bias - mean * scale


def delta(kernel: Tensor) -> Tensor:
    """The kernel of the same shape that makes a convolution the identity, also in groups of channels."""
    outputs, inputs, height, width = kernel.shape
    same = torch.zeros_like(kernel)
    same[torch.arange(outputs), torch.arange(outputs) % inputs, height // 2, width // 2] = 1
    return same


def _pad(small: Tensor, kernel: Tensor) -> Tensor:
    rows, columns = ((kernel.shape[i] - small.shape[i]) // 2 for i in (2, 3))
    return F.pad(small, (columns, columns, rows, rows))


def _mobile_one(parts: Parts) -> KernelAndBias:
    kernel, bias = _fold(parts.pop("conv_kxk.0.conv.weight"), parts, "conv_kxk.0.bn")
    same = delta(kernel)
    if "conv_scale.conv.weight" in parts:
        small, more = _fold(parts.pop("conv_scale.conv.weight"), parts, "conv_scale.bn")
        kernel, bias = kernel + _pad(small, kernel), bias + more
    if "identity.weight" in parts:
        skip, more = _fold(same, parts, "identity")
        kernel, bias = kernel + skip, bias + more
    return kernel, bias


def _rep_mixer(parts: Parts) -> KernelAndBias:
    mixer = {name.removeprefix("mixer."): parts.pop(name) for name in list(parts) if name.startswith("mixer.")}
    kernel, bias = _mobile_one(mixer)
    parts |= mixer  # what was not used
    same, scale = delta(kernel), parts.pop("layer_scale.gamma").flatten()
    norm_kernel, norm_bias = _fold(same, parts, "norm.identity")
    return same + scale[:, None, None, None] * (kernel - norm_kernel), scale * (bias - norm_bias)


def _large_kernel(parts: Parts) -> KernelAndBias:
    kernel, bias = _fold(parts.pop("large_conv.conv.weight"), parts, "large_conv.bn")
    small, more = _fold(parts.pop("small_conv.conv.weight"), parts, "small_conv.bn")
    return kernel + _pad(small, kernel), bias + more


def _position(parts: Parts) -> KernelAndBias:
    kernel = parts.pop("weight")
    return kernel + delta(kernel), parts.pop("bias")


def _conv_norm(parts: Parts) -> KernelAndBias:
    kernel = parts.pop("conv.weight")
    if "conv.bias" in parts:  # the last one of a stem has no BatchNorm
        return kernel, parts.pop("conv.bias")
    return _fold(kernel, parts, "bn")


# A pattern of names, whose groups are the module and the name within it; the function that folds the module; and the
# prefix of weight and bias in the result. The first pattern that matches counts.
FOLDS = (
    (r"(.*\.token_mixer)\.((?:mixer|norm|layer_scale)\..*)", _rep_mixer, "reparam_conv."),
    (r"(.*)\.((?:large_conv|small_conv)\..*)", _large_kernel, "reparam_conv."),
    (r"(.*)\.((?:conv_kxk|conv_scale|identity)\..*)", _mobile_one, "reparam_conv."),
    (r"(.*\.pos_emb)\.pos_enc\.(.*)", _position, "reparam_conv."),
    (r"(.*\.mlp\.conv)\.((?:conv|bn)\..*)", _conv_norm, ""),
    (r"(.*\.patch_embed\.backbone\.\d+)\.((?:conv|bn)\..*)", _conv_norm, ""),
)
