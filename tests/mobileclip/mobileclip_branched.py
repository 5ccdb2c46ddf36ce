"""MobileCLIP as it is trained: every branch by itself, with its BatchNorm, under OpenCLIP's names.

What `miniclip.mobileclip.names` folds is not folded here, so that the two can be compared; and the names and shapes
of a published file come from here. `apple_names` turns them into those of Apple's files.
"""

import re

import torch
import torch.nn.functional as F
from torch import nn

from miniclip.config import ViTConfig
from miniclip.mobileclip.config import ConvViTConfig, MCiConfig, MobileCLIPConfig
from miniclip.models.transformer import Transformer


class ConvNorm(nn.Module):
    def __init__(self, inputs, outputs, kernel, stride=1, groups=1):
        super().__init__()
        padding = tuple(k // 2 for k in kernel) if isinstance(kernel, tuple) else kernel // 2
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x):
        return self.bn(self.conv(x))


class SE(nn.Module):
    def __init__(self, channels, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, x):
        return x * self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class MobileOne(nn.Module):
    def __init__(self, inputs, outputs, kernel, stride=1, groups=1, *, scale=False, skip=False, conv=True):
        super().__init__()
        self.identity = nn.BatchNorm2d(outputs) if skip else None
        self.conv_kxk = nn.ModuleList([ConvNorm(inputs, outputs, kernel, stride, groups)] if conv else [])
        self.conv_scale = ConvNorm(inputs, outputs, 1, stride, groups) if scale else None

    def forward(self, x):
        branches = (self.identity, *self.conv_kxk, self.conv_scale)
        return sum(branch(x) for branch in branches if branch is not None)


class Gamma(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(channels, 1, 1))

    def forward(self, x):
        return x * self.gamma


class RepMixer(nn.Module):
    def __init__(self, channels, kernel):
        super().__init__()
        flat = isinstance(kernel, tuple)
        self.norm = MobileOne(channels, channels, kernel, groups=channels, skip=True, conv=False)
        self.mixer = MobileOne(channels, channels, kernel, groups=channels, scale=not flat, skip=True)
        self.layer_scale = Gamma(channels)

    def forward(self, x):
        return x + self.layer_scale(self.mixer(x) - self.norm(x))


class ConvMLP(nn.Module):
    def __init__(self, channels, kernel, ratio):
        super().__init__()
        self.conv = ConvNorm(channels, channels, kernel, groups=channels)
        self.fc1, self.fc2 = nn.Conv2d(channels, ratio * channels, 1), nn.Conv2d(ratio * channels, channels, 1)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(self.conv(x))))


class RepMixerBlock(nn.Module):
    def __init__(self, channels, kernel, mlp_kernel, ratio):
        super().__init__()
        self.token_mixer = RepMixer(channels, kernel)
        self.mlp = ConvMLP(channels, mlp_kernel, ratio)
        self.layer_scale = Gamma(channels)

    def forward(self, x, causal=None):
        rows = x.transpose(1, 2).unsqueeze(2) if x.ndim == 3 else x
        rows = self.token_mixer(rows)
        rows = rows + self.layer_scale(self.mlp(rows))
        return rows.squeeze(2).transpose(1, 2) if x.ndim == 3 else rows


class MapAttention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x):
        count, channels = x.shape[:2]
        tokens = x.flatten(2).mT
        q, k, v = self.qkv(tokens).reshape(count, -1, 3, channels // 32, 32).permute(2, 0, 3, 1, 4)
        heard = (q @ k.mT * 32**-0.5).softmax(-1) @ v
        return self.proj(heard.transpose(1, 2).reshape(tokens.shape)).mT.reshape(x.shape)


class ChannelNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class AttentionBlock(nn.Module):
    def __init__(self, channels, ratio, norm):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels) if norm == "batch" else ChannelNorm(channels)
        self.token_mixer, self.layer_scale_1 = MapAttention(channels), Gamma(channels)
        self.mlp, self.layer_scale_2 = ConvMLP(channels, 7, ratio), Gamma(channels)

    def forward(self, x):
        x = x + self.layer_scale_1(self.token_mixer(self.norm(x)))
        return x + self.layer_scale_2(self.mlp(x))


class LargeKernel(nn.Module):
    def __init__(self, inputs, outputs, se):
        super().__init__()
        self.large_conv = ConvNorm(inputs, outputs, 7, 2, inputs)
        self.small_conv = ConvNorm(inputs, outputs, 3, 2, inputs)
        self.se = SE(outputs, outputs // 4) if se else nn.Identity()

    def forward(self, x):
        return F.gelu(self.se(self.large_conv(x) + self.small_conv(x)))


class Downsample(nn.Module):
    def __init__(self, inputs, outputs, se):
        super().__init__()
        pointwise = MobileOne(outputs, outputs, 1, skip=True)
        self.proj = nn.Sequential(LargeKernel(inputs, outputs, se), pointwise, nn.GELU())

    def forward(self, x):
        return self.proj(x)


class Position(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.pos_enc = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)

    def forward(self, x):
        return x + self.pos_enc(x)


class Stage(nn.Module):
    def __init__(self, config: MCiConfig, i):
        super().__init__()
        channels = config.widths[i]
        self.downsample = Downsample(config.widths[i - 1], channels, i in config.squeezed) if i else nn.Identity()
        self.pos_emb = Position(channels) if i > 2 else nn.Identity()
        make = (AttentionBlock, (channels, config.mlp_ratio, config.norm)) if i > 2 else None
        make = make or (RepMixerBlock, (channels, 3, 7, config.mlp_ratio))
        self.blocks = nn.Sequential(*(make[0](*make[1]) for _ in range(config.blocks[i])))

    def forward(self, x):
        return self.blocks(self.pos_emb(self.downsample(x)))


class FinalConv(MobileOne):
    def __init__(self, channels):
        super().__init__(channels // 2, channels, 3, groups=channels // 2, scale=True)
        self.se = SE(channels, channels // 16)

    def forward(self, x):
        return F.gelu(self.se(super().forward(x)))


class MCi(nn.Module):
    def __init__(self, config: MCiConfig, embed_dim):
        super().__init__()
        width, channels, scale = config.widths[0], 2 * config.widths[-1], config.norm == "batch"
        self.stem = nn.Sequential(
            MobileOne(3, width, 3, 2, scale=scale),
            MobileOne(width, width, 3, 2, width, scale=scale),
            MobileOne(width, width, 1, skip=True),
        )
        self.stages = nn.Sequential(*(Stage(config, i) for i in range(len(config.widths))))
        self.final_conv = FinalConv(channels)
        self.head = nn.Module()
        self.head.fc = nn.Linear(channels, embed_dim)

    def forward(self, x):
        for layer in self.stem:
            x = F.gelu(layer(x))
        return self.head.fc(self.final_conv(self.stages(x)).mean((2, 3)))


class Block(nn.Module):
    """timm's; only its names and shapes are used."""

    def __init__(self, width, hidden):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)


class ViT(nn.Module):
    """timm's vit_base_mci_224 and vit_large_patch14_clip_224; only their names and shapes are used."""

    def __init__(self, config: ConvViTConfig | ViTConfig, embed_dim):
        super().__init__()
        width = config.transformer.width
        self.patch_embed = nn.Module()
        if isinstance(config, ConvViTConfig):
            narrow = config.stem_width
            first, second = ConvNorm(3, narrow, 4, 4), ConvNorm(narrow, narrow, 2, 2)
            last = nn.Module()
            last.conv = nn.Conv2d(narrow, width, 2, 2)
            self.patch_embed.backbone, positions = nn.ModuleList((first, second, last)), (config.image_size // 16) ** 2
        else:
            self.patch_embed.proj = nn.Conv2d(3, width, config.patch_size, config.patch_size, bias=False)
            self.norm_pre = nn.LayerNorm(width)
            positions = (config.image_size // config.patch_size) ** 2 + 1
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, positions, width))
        hidden = config.transformer.mlp_width
        self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(config.transformer.layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, embed_dim)


class Branched(nn.Module):
    """Both towers; image towers without an attention of their own run."""

    def __init__(self, config: MobileCLIPConfig):
        super().__init__()
        self.config = config
        text, width = config.text, config.text.transformer.width
        self.visual = nn.Module()
        tower = MCi if isinstance(config.vision, MCiConfig) else ViT
        self.visual.trunk = tower(config.vision, config.embed_dim)
        self.text = nn.Module()
        self.text.token_embedding = nn.Embedding(text.vocab_size, width)
        self.text.positional_embedding = nn.Parameter(torch.empty(text.context_length, width))
        self.text.transformer = Transformer(text.transformer)
        if config.text_taps:
            taps = (1, config.text_taps)
            self.text.transformer.resblocks.insert(0, RepMixerBlock(width, taps, taps, 4))
            self.text.transformer.resblocks.append(RepMixerBlock(width, taps, taps, 4))
        self.text.ln_final = nn.LayerNorm(width)
        self.text.text_projection = nn.Parameter(torch.empty(width, config.embed_dim))
        self.logit_scale = nn.Parameter(torch.empty(()))

    def encode_image(self, pixels):
        return self.visual.trunk(pixels)

    def encode_text(self, ids):
        x = self.text.token_embedding(ids) + self.text.positional_embedding
        x = self.text.ln_final(self.text.transformer(x))
        return x[torch.arange(len(ids)), ids.argmax(1)] @ self.text.text_projection


def branched_shapes(config: MobileCLIPConfig) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a file as it is published, under OpenCLIP's names."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Branched(config).state_dict().items()}


APPLE = (  # OpenCLIP's names, and Apple's
    (r"^visual\.trunk\.", "image_encoder.model."),
    (r"\.patch_embed\.backbone\.(\d)\.conv", r".patch_emb.\1.block.conv"),
    (r"\.patch_embed\.backbone\.(\d)\.bn", r".patch_emb.\1.block.norm"),
    (r"\.stem\.", ".patch_embed."),
    (r"\.final_conv\.se\.fc1\.", ".final_conv.se.reduce."),
    (r"\.final_conv\.se\.fc2\.", ".final_conv.se.expand."),
    (r"\.final_conv\.", ".conv_exp."),
    (r"\.conv_kxk\.", ".rbr_conv."),
    (r"\.conv_scale\.", ".rbr_scale."),
    (r"\.identity\.", ".rbr_skip."),
    (r"\.large_conv\.", ".lkb_origin."),
    (r"(proj\.0)\.reparam_conv\.", r"\1.lkb_reparam."),
    (r"(layer_scale(_\d)?)\.gamma$", r"\1"),
    (r"\.head\.fc\.weight$", ".head.proj"),
    (r"model\.head\.weight$", "model.classifier.proj"),
    (r"model\.norm\.", "model.post_transformer_norm."),
    (r"pos_embed$", "pos_embed.pos_embed.pos_embed"),
    (r"(model)\.blocks\.(\d+)\.norm1\.", r"\1.transformer.\2.pre_norm_mha.0."),
    (r"(model)\.blocks\.(\d+)\.attn\.qkv\.", r"\1.transformer.\2.pre_norm_mha.1.qkv_proj."),
    (r"(model)\.blocks\.(\d+)\.attn\.proj\.", r"\1.transformer.\2.pre_norm_mha.1.out_proj."),
    (r"(model)\.blocks\.(\d+)\.norm2\.", r"\1.transformer.\2.pre_norm_ffn.0."),
    (r"(model)\.blocks\.(\d+)\.mlp\.fc1\.", r"\1.transformer.\2.pre_norm_ffn.1."),
    (r"(model)\.blocks\.(\d+)\.mlp\.fc2\.", r"\1.transformer.\2.pre_norm_ffn.4."),
    (r"\.mlp\.(conv|fc)", r".convffn.\1"),
    (r"^text\.transformer\.resblocks\.", "text_encoder.transformer."),
    (r"\.ln_1\.", ".pre_norm_mha.0."),
    (r"\.attn\.in_proj_", ".pre_norm_mha.1.qkv_proj."),
    (r"\.attn\.out_proj\.", ".pre_norm_mha.1.out_proj."),
    (r"\.ln_2\.", ".pre_norm_ffn.0."),
    (r"\.mlp\.c_fc\.", ".pre_norm_ffn.1."),
    (r"\.mlp\.c_proj\.", ".pre_norm_ffn.4."),
    (r"^text\.token_embedding\.", "text_encoder.embedding_layer."),
    (r"^text\.positional_embedding$", "text_encoder.positional_embedding.pos_embed.pos_embed"),
    (r"^text\.ln_final\.", "text_encoder.final_layer_norm."),
    (r"^text\.text_projection$", "text_encoder.projection_layer"),
)


def apple_names(tensors: dict) -> dict:
    """Apple's names and shapes for tensors that have OpenCLIP's, without the bias of the head, which Apple's lacks."""
    places, place = {}, 0  # Apple numbers what leads to a stage, its position and its blocks in one row
    for stage in range(5):
        for part in ("downsample", "pos_emb", "blocks"):
            if any(f".stages.{stage}.{part}." in name for name in tensors):
                places[f"stages.{stage}.{part}"], place = place, place + 1
    result = {}
    for name, tensor in tensors.items():
        if re.search(r"\.head\.(fc\.)?bias$", name):
            continue
        if re.search(r"\.head\.(fc\.)?weight$", name):
            tensor = tensor.T
        elif re.search(r"trunk\.pos_embed$", name):
            tensor = tensor[None]
        elif name == "text.positional_embedding":
            tensor = tensor[None, None]
        if match := re.match(r"(visual\.trunk)\.(stages\.\d\.(downsample|pos_emb|blocks))\.(.*)", name):
            rest = re.sub(r"^pos_enc\.", "pe.", match[4])
            name = f"{match[1]}.network.{places[match[2]]}.{rest}"
        for pattern, replacement in APPLE:
            name = re.sub(pattern, replacement, name)
        result[name] = tensor
    return result
