"""The stages of OpenAI's architecture: their names, shapes and definitions, in the order in which they are computed.

A stage is named by the path of the module whose output it is (`visual.ln_pre`), by that of the parameter that was
applied last (`visual.proj`, `text_projection`), or, where neither exists, by a word of its own in the place where it is
computed (`visual.transformer.resblocks.0.attn.probabilities`). All of them in order:

    picture      IMAGE of `miniclip.stages`                  from image.pixels on, if pixels were given
    ViT          VIT, with a BLOCK for each `visual.transformer.resblocks.0`, `.1`, ... where "*" stands
    ResNet       STEM, a BOTTLENECK for each `visual.layer1.0`, `.1`, `.layer2.0`, ..., then POOL
    image        IMAGE_END
    text         TEXT, with a BLOCK for each `transformer.resblocks.0`, ... where "*" stands; from text.ids on, if ids
                 were given
    both         LOGITS

Letters of the shapes, beside those of `miniclip.config` (N L D E H R P):

    d  width of a head, D / H     M  hidden width of the MLP     G  patches a side, R / P
    W  width of a ResNet          C  channels of a bottleneck: W, 2W, 4W, 8W in layer1 ... layer4
    s  side of its input          t  side of its output, s / stride
    K  channels of the last map, 32 W      L = G^2 + 1 in a ViT, (R / 32)^2 + 1 in the pool

In files the text stages after `text.ids` end at the last end-of-text token: what follows is padding, without influence.
See also `miniclip.stages`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from miniclip.config import CLIPConfig, ResNetConfig, TransformerConfig, ViTConfig
from miniclip.stages import IMAGE, LOGITS, Stage, rows

VIT = (
    ("visual.conv1",    "N D G G", "P x P convolution of stride P, no bias, no padding"),
    ("visual.embedded", "N L D",   "class_embedding, then the patches row by row; plus positional_embedding"),
    ("visual.ln_pre",   "N L D",   "LayerNorm, eps 1e-5"),
    ("visual.transformer.resblocks.*", "", ""),
    ("visual.pooled",   "N D",     "token 0, the class token, of the last block's output"),
    ("visual.ln_post",  "N D",     "LayerNorm of the pooled token"),
    ("visual.proj",     "N E",     "ln_post @ visual.proj"),
)  # fmt: skip

BLOCK = (  # names follow the block's own, as in visual.transformer.resblocks.0.ln_1
    (".ln_1",               "N L D",   "LayerNorm of the block's input; post-norm"),
    (".attn.q",             "N H L d", "first D rows of in_proj, plus bias, cut into heads; not yet scaled"),
    (".attn.k",             "N H L d", "second D rows of in_proj, plus bias, cut into heads"),
    (".attn.v",             "N H L d", "third D rows of in_proj, plus bias, cut into heads"),
    (".attn.probabilities", "N H L L", "softmax over the last side of q k^T / sqrt(d); text: 0 above the diagonal"),
    (".attn.context",       "N L D",   "probabilities @ v, the heads side by side"),
    (".attn.out_proj",      "N L D",   "context @ out_proj.weight^T + out_proj.bias"),
    (".residual",           "N L D",   "the block's input + attn.out_proj; pre-norm"),
    (".ln_2",               "N L D",   "LayerNorm of the residual; post-norm"),
    (".mlp.c_fc",           "N L M",   "ln_2 @ c_fc.weight^T + c_fc.bias, before the activation"),
    (".mlp.activation",     "N L M",   "QuickGELU x * sigmoid(1.702 x), or exact GELU where the model says so"),
    (".mlp.c_proj",         "N L D",   "activation @ c_proj.weight^T + c_proj.bias"),
    ("",                    "N L D",   "residual + mlp.c_proj: the block's output; pre-norm"),
)  # fmt: skip

STEM = (  # names follow "visual"
    (".conv1",   "N W/2 R/2 R/2", "3 x 3 convolution, stride 2, padding 1, no bias"),
    (".bn1",     "N W/2 R/2 R/2", "BatchNorm with the running mean and variance, eps 1e-5"),
    (".relu1",   "N W/2 R/2 R/2", "ReLU"),
    (".conv2",   "N W/2 R/2 R/2", "3 x 3 convolution, stride 1, padding 1, no bias"),
    (".bn2",     "N W/2 R/2 R/2", "BatchNorm"),
    (".relu2",   "N W/2 R/2 R/2", "ReLU"),
    (".conv3",   "N W R/2 R/2",   "3 x 3 convolution, stride 1, padding 1, no bias"),
    (".bn3",     "N W R/2 R/2",   "BatchNorm"),
    (".relu3",   "N W R/2 R/2",   "ReLU"),
    (".avgpool", "N W R/4 R/4",   "mean over 2 x 2"),
)  # fmt: skip

BOTTLENECK = (  # names follow the block's own, as in visual.layer1.0.conv1; downsample in the first block of each layer
    (".downsample.-1", "N I t t",  "the block's input, mean over stride x stride; only where the stride is 2"),
    (".downsample.0",  "N 4C t t", "1 x 1 convolution, no bias"),
    (".downsample.1",  "N 4C t t", "BatchNorm: the shortcut"),
    (".conv1",         "N C s s",  "1 x 1 convolution of the block's input, no bias"),
    (".bn1",           "N C s s",  "BatchNorm"),
    (".relu1",         "N C s s",  "ReLU"),
    (".conv2",         "N C s s",  "3 x 3 convolution, stride 1, padding 1, no bias"),
    (".bn2",           "N C s s",  "BatchNorm"),
    (".relu2",         "N C s s",  "ReLU"),
    (".avgpool",       "N C t t",  "mean over stride x stride; only where the stride is 2"),
    (".conv3",         "N 4C t t", "1 x 1 convolution, no bias"),
    (".bn3",           "N 4C t t", "BatchNorm"),
    ("",               "N 4C t t", "ReLU(bn3 + shortcut); the shortcut is the input where there is no downsample"),
)  # fmt: skip

POOL = (
    ("visual.attnpool.embedded",      "N L K",   "the mean of all positions, then the positions row by row; plus "
                                                 "positional_embedding"),
    ("visual.attnpool.q",             "N H 1 d", "q_proj of token 0, plus bias, cut into heads; not yet scaled"),
    ("visual.attnpool.k",             "N H L d", "k_proj of all tokens, plus bias, cut into heads"),
    ("visual.attnpool.v",             "N H L d", "v_proj of all tokens, plus bias, cut into heads"),
    ("visual.attnpool.probabilities", "N H 1 L", "softmax over the last side of q k^T / sqrt(d)"),
    ("visual.attnpool.context",       "N K",     "probabilities @ v, the heads side by side"),
    ("visual.attnpool.c_proj",        "N E",     "context @ c_proj.weight^T + c_proj.bias"),
)  # fmt: skip

IMAGE_END = (("image_embedding", "N E", "visual.proj (ResNet: attnpool.c_proj) divided by its Euclidean length"),)

TEXT = (
    ("text.utf8",       "bytes", "uint8; the strings in UTF-8, each followed by the byte 255, which UTF-8 never has"),
    ("text.ids",        "N L",   "int32; start-of-text token, ids, end-of-text token, then zeros: 77 in all"),
    ("token_embedding", "N L D", "row of token_embedding.weight for each id"),
    ("text.embedded",   "N L D", "plus the first L rows of positional_embedding"),
    ("transformer.resblocks.*", "", ""),
    ("ln_final",        "N L D", "LayerNorm of the last block's output"),
    ("text.pooled",     "N D",   "row of ln_final at the first occurrence of the largest id, the end-of-text token"),
    ("text_projection", "N E",   "pooled @ text_projection"),
    ("text_embedding",  "N E",   "text_projection divided by its Euclidean length"),
)  # fmt: skip

# Stages that are the input of a module, by their rules; a path that begins with a dot follows the block's.
INPUT_OF = {
    "visual.embedded": "visual.ln_pre",
    "visual.pooled": "visual.ln_post",
    "resblock.attn.context": ".attn.out_proj",
    "resblock.residual": ".ln_2",
    "resblock.mlp.activation": ".mlp.c_proj",
    "stem.relu1": ".conv2",
    "stem.relu2": ".conv3",
    "stem.relu3": ".avgpool",
    "bottleneck.relu1": ".conv2",
    "bottleneck.relu2": ".avgpool",
    "visual.attnpool.embedded": "visual.attnpool.k_proj",
    "visual.attnpool.context": "visual.attnpool.c_proj",
    "text.embedded": "transformer",
}


def stages(config: CLIPConfig) -> list[Stage]:
    """All stages of a picture and a text, in forward order."""
    return [*image_stages(config), *text_stages(config), *rows(LOGITS, {})]


def image_stages(config: CLIPConfig) -> Iterator[Stage]:
    """From the picture to `image_embedding`."""
    vision = config.vision
    sizes = {"R": vision.image_size, "E": config.embed_dim}
    yield from rows(IMAGE, sizes)
    if isinstance(vision, ViTConfig):
        grid = vision.image_size // vision.patch_size
        yield from _placed(_tower(VIT, vision.transformer, sizes | {"G": grid, "L": grid**2 + 1}))
    else:
        yield from _placed(_resnet(vision, sizes))
    yield from rows(IMAGE_END, sizes)


def text_stages(config: CLIPConfig) -> Iterator[Stage]:
    """From the strings to `text_embedding`."""
    return _placed(_tower(TEXT, config.text.transformer, {"E": config.embed_dim}))


def _placed(stages: Iterable[Stage]) -> Iterator[Stage]:
    """The stages, those of INPUT_OF with the module that takes them."""
    for stage in stages:
        path = INPUT_OF.get(stage.rule, "")
        yield stage._replace(input_of=stage.block + path if path.startswith(".") else path)


def _tower(table: tuple, transformer: TransformerConfig, sizes: dict[str, int]) -> Iterator[Stage]:
    """A table that holds a stack of blocks."""
    width, heads = transformer.width, transformer.heads
    sizes = sizes | {"D": width, "H": heads, "d": width // heads, "M": transformer.mlp_width}
    for row in table:
        if row[0].endswith(".*"):
            for i in range(transformer.layers):
                yield from rows(BLOCK, sizes, f"{row[0][:-1]}{i}", "resblock")
        else:
            yield from rows((row,), sizes)


def _resnet(vision: ResNetConfig, sizes: dict[str, int]) -> Iterator[Stage]:
    side, width, channels = vision.image_size, vision.width, 32 * vision.width
    stem = {"W": width, "W/2": width // 2, "R/2": side // 2, "R/4": side // 4}
    yield from rows(STEM, sizes | stem, "visual", "stem")
    side, inputs = side // 4, width
    for layer, blocks in enumerate(vision.layers, start=1):
        for i in range(blocks):
            block = width * 2 ** (layer - 1)
            stride = 2 if layer > 1 and i == 0 else 1
            scope = sizes | {"I": inputs, "C": block, "4C": 4 * block, "s": side, "t": side // stride}
            absent = [".downsample.-1", ".avgpool"] if stride == 1 else []
            absent += [".downsample.0", ".downsample.1"] if i else []
            table = tuple(row for row in BOTTLENECK if row[0] not in absent)
            yield from rows(table, scope, f"visual.layer{layer}.{i}", "bottleneck")
            side, inputs = side // stride, 4 * block
    grid = vision.image_size // 32
    pool = {"K": channels, "H": vision.heads, "d": channels // vision.heads, "L": grid**2 + 1}
    yield from rows(POOL, sizes | pool)
