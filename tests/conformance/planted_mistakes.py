"""Edits that put every mistake of the catalogue into the sources of a port; see test_diagnose.py.

Each table: the mistake's name, where it shows first, then old and new source by turns. The old source must occur once.
"""

from collections.abc import Callable

import numpy as np
import PIL

PILLOW_13 = int(PIL.__version__.split(".")[0]) >= 13  # which resizes tall pictures along the height first
BLOCK, TEXT_BLOCK = "visual.transformer.resblocks.0", "transformer.resblocks.0"
ATTENTION = f"{BLOCK}.attn"
PROBABILITIES = f"{ATTENTION}.probabilities"

# The picture, in port_picture.py; first the golden that shows it.

_FILTER = "    x = abs(x)\n    if x < 1:"
_FLOATS = (
    "axis, 0).astype(np.int64)",
    "axis, 0).astype(float)",
    "rounded = (sums + (1 << (WEIGHT_BITS - 1))) >> WEIGHT_BITS",
    "rounded = sums / 2**WEIGHT_BITS",
    "rounded.clip(0, 255).astype(np.uint8)",
    "rounded",
    "return divide_by_alpha(x) if has_alpha else x",
    "return np.rint(x).clip(0, 255).astype(np.uint8)",
)
_NO_ANTIALIAS = ("stretch = max(scale, 1.0)", "stretch = 1.0")
_AT_THE_EDGE = (  # the outermost pixel stands for those beyond it
    "weights = [bicubic((j - center + 0.5) * (1 / stretch)) for j in range(first, last)]",
    "first, last = 0, size; weights = [sum(bicubic(k - center + 0.5) for k in range(-4, size + 4)"
    " if min(max(k, 0), size - 1) == j) for j in range(size)]",
)
_SHARPER = (
    "return (1.5 * x - 2.5) * x * x + 1",
    "return (1.25 * x - 2.25) * x * x + 1",
    "* -0.5 if x < 2",
    "* -0.75 if x < 2",
)
_TRIANGLE = (_FILTER, "    return max(0.0, 1 - abs(x))\n" + _FILTER)
_BOX = (_FILTER, "    return float(-0.5 < x <= 0.5)\n" + _FILTER)
_SIDE = "size * side // min(height, width)"
_ALPHA = "    has_alpha = bands in (2, 4)\n"
_OFFSETS = "round((side - size) / 2)"
_CROPPED = "return middle[..., :3] if middle.shape[2] > 2"
_DIVIDED = "return divide_by_alpha(x) if has_alpha else x"
_LINEAR = (
    *_FLOATS[:6],
    "multiply_by_alpha(picture) if has_alpha else picture",
    "(lambda c: np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4))(picture / 255)",
    _DIVIDED,
    "x = x.clip(0, 1)\n"
    "    return np.rint(255 * np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)).astype(np.uint8)",
)
_NORMALIZED = "(picture.astype(np.float32) / np.float32(255) - MEAN) / STD"


def _on(level: int) -> str:
    return (
        "    picture, alpha = picture[..., :3], picture[..., 3:] / 255\n"
        f"    picture, has_alpha = np.rint(picture * alpha + {level} * (1 - alpha)).astype(np.uint8), False\n"
    )


PICTURES = [
    ("bilinear instead of bicubic", "RGB", "image.resized", *_TRIANGLE),
    ("nearest neighbour instead of bicubic", "RGB", "image.resized", *_BOX, *_NO_ANTIALIAS),
    (
        "Lanczos instead of bicubic", "RGB", "image.resized",
        _FILTER, "    return float(np.sinc(x) * np.sinc(x / 3)) if abs(x) < 3 else 0.0\n" + _FILTER,
        "center - 2 * stretch", "center - 3 * stretch", "center + 2 * stretch", "center + 3 * stretch",
    ),
    ("box filter instead of bicubic", "RGB", "image.resized", *_BOX),
    ("bicubic without antialias, a = -0.75", "RGB", "image.resized",
     *_FLOATS, *_NO_ANTIALIAS, *_AT_THE_EDGE, *_SHARPER),
    ("bilinear without antialias", "RGB", "image.resized", *_FLOATS, *_NO_ANTIALIAS, *_TRIANGLE),
    (
        "corners aligned", "RGB", "image.resized", *_FLOATS, *_NO_ANTIALIAS, *_AT_THE_EDGE, *_SHARPER,
        "center = (i + 0.5) * scale", "center = i * (size - 1) / (new_size - 1) + 0.5",
    ),
    ("no rounding to bytes between the two passes", "RGB", "image.resized", *_FLOATS),
    ("bicubic with a = -0.75", "RGB", "image.resized", *_SHARPER),
    ("bicubic without antialias, a = -0.5", "RGB", "image.resized", *_NO_ANTIALIAS),
    ("sums cut, not rounded: 2^21 missing", "RGB", "image.resized", "(sums + (1 << (WEIGHT_BITS - 1)))", "sums"),
    ("bytes below 0 or above 255 wrap instead of being clamped", "contrast", "image.resized",
     "rounded.clip(0, 255).astype(np.uint8)", "rounded.astype(np.uint8)"),
    ("colours not multiplied by alpha before the resize", "RGBA", "image.resized",
     "multiply_by_alpha(picture) if has_alpha else picture", "picture", _DIVIDED, "return x"),
    ("colours divided by alpha are rounded, not cut", "RGBA", "image.resized",
     "255 * colour // np.maximum(alpha, 1)", "(255 * colour + alpha.astype(int) // 2) // np.maximum(alpha, 1)"),
    ("colours divided by alpha wrap beyond 255, not clamped", "RGBA", "image.resized",
     "divided.clip(0, 255)", "divided % 256"),
    ("resized in linear light", "RGB", "image.resized", *_LINEAR),
    ("the other order of the two passes", "tall", "image.resized",
     "if height - new_height > max(2 * (width - new_width), 0):", "if False:" if PILLOW_13 else "if True:"),
    ("alpha kept premultiplied", "RGBA", "image.resized", _DIVIDED, "return x"),
    ("squashed to a square", "RGB", "image.resized", _SIDE, "size"),
    ("longer side rounded, not floored", "rounded", "image.resized", _SIDE, "round(size * side / min(height, width))"),
    ("longer side rounded up", "rounded up", "image.resized", _SIDE, "-(-size * side // min(height, width))"),
    ("alpha dropped before the resize", "RGBA", "image.resized",
     _ALPHA, "    picture, has_alpha = picture[..., :3], False\n"),
    ("alpha composited on white", "RGBA", "image.resized", _ALPHA, _on(255)),
    ("alpha composited on black", "RGBA", "image.resized", _ALPHA, _on(0)),
    ("crop offset rounded down", "excess 11", "image.cropped", _OFFSETS, "(side - size) // 2"),
    ("crop offset rounded up", "excess 9", "image.cropped", _OFFSETS, "-((size - side) // 2)"),
    ("cropped at the top left", "RGB", "image.cropped", _OFFSETS, "0"),
    ("BGR instead of RGB", "RGB", "image.cropped", _CROPPED, _CROPPED.replace(":3]", "2::-1]")),
    ("rows and columns swapped", "RGB", "image.cropped", _CROPPED, _CROPPED.replace(":3]", ":3].transpose(1, 0, 2)")),
    ("picture upside down", "RGB", "image.cropped", _CROPPED, _CROPPED.replace("[..., :3]", "[::-1, :, :3]")),
    ("no mean and std", "RGB", "image.pixels", _NORMALIZED, "picture.astype(np.float32) / np.float32(255)"),
    ("scaled to [-1, 1]", "RGB", "image.pixels", _NORMALIZED, "picture.astype(np.float32) / np.float32(127.5) - 1"),
    ("not divided by 255", "RGB", "image.pixels", _NORMALIZED, "(picture.astype(np.float32) - MEAN) / STD"),
    ("bytes as they are", "RGB", "image.pixels", _NORMALIZED, "picture.astype(np.float32)"),
    ("divided by 256", "RGB", "image.pixels", "np.float32(255) - MEAN", "np.float32(256) - MEAN"),
    (
        "ImageNet's mean and std", "RGB", "image.pixels",
        "[0.48145466, 0.4578275, 0.40821073]", "[0.485, 0.456, 0.406]",
        "[0.26862954, 0.26130258, 0.27577711]", "[0.229, 0.224, 0.225]",
    ),
    ("mean not subtracted", "RGB", "image.pixels", " - MEAN)", ")"),
    ("not divided by std", "RGB", "image.pixels", ") / STD", ")"),
    ("channels reversed after normalisation", "RGB", "image.pixels", ") / STD", ")[..., ::-1] / STD[::-1]"),
    ("mean and std in the order BGR", "RGB", "image.pixels", "- MEAN) / STD", "- MEAN[::-1]) / STD[::-1]"),
    ("channels last taken for channels first", "RGB", "image.pixels",
     ".transpose(2, 0, 1)[None])", ".reshape(1, 3, size, size))"),
]  # fmt: skip

# The towers, in port_numpy.py.

_KERNEL = 'kernel = w["visual.conv1.weight"]\n'
_TOKENS = "np.concatenate([class_token, patches], axis=1)"
_POSITION = ' + w["visual.positional_embedding"]\n'
_CLASS = 'stages("visual.pooled", x[:, 0])'
_COSINES = 'stages["image_embedding"] @ stages["text_embedding"].T'
_SCORES = 'np.exp(w["logit_scale"]) * cosines'

VIT = [
    (
        "patches flattened pixel by pixel, not channel by channel", "visual.conv1",
        _KERNEL, "kernel = (k := " + _KERNEL[9:-1] + ").reshape(len(k), *k.shape[2:], 3).transpose(0, 3, 1, 2)\n",
    ),
    ("patch kernel with height and width swapped", "visual.conv1", _KERNEL, _KERNEL[:-1] + ".swapaxes(2, 3)\n"),
    ("patch kernel turned round (a true convolution)", "visual.conv1", _KERNEL, _KERNEL[:-1] + "[..., ::-1, ::-1]\n"),
    ("patch kernel with its channels reversed", "visual.conv1", _KERNEL, _KERNEL[:-1] + "[:, ::-1]\n"),
    ("map of the patches with rows and columns swapped", "visual.conv1",
     "kernel, stride=kernel.shape[-1])", "kernel, stride=kernel.shape[-1]).swapaxes(2, 3)"),
    ("patches ordered column by column", "visual.embedded",
     "patches = patches.reshape(*patches.", "patches = patches.swapaxes(2, 3).reshape(*patches."),
    ("class token last", "visual.embedded", _TOKENS, "np.concatenate([patches, class_token], axis=1)"),
    ("class embedding missing (zeros)", "visual.embedded", _TOKENS, _TOKENS.replace("class", "0 * class")),
    ("position embedding missing", "visual.embedded", _POSITION, "\n"),
    ("position embedding shifted by one", "visual.embedded",
     _POSITION, ' + np.roll(w["visual.positional_embedding"], -1, 0)\n'),
    ("position embedding not for the class token", "visual.embedded",
     _POSITION, _POSITION[:-1] + " * (np.arange(patches.shape[1] + 1) > 0)[:, None]\n"),
    ("ln_pre missing", "visual.ln_pre",
     'layer_norm(stages("visual.embedded", x), w, "visual.ln_pre")', 'stages("visual.embedded", x)'),
    ("pooled: mean of all tokens", "visual.pooled", _CLASS, 'stages("visual.pooled", x.mean(axis=1))'),
    ("pooled: maximum over all tokens", "visual.pooled", _CLASS, 'stages("visual.pooled", x.max(axis=1))'),
    ("pooled: mean of the patches", "visual.pooled", _CLASS, 'stages("visual.pooled", x[:, 1:].mean(axis=1))'),
    ("pooled: the last token", "visual.pooled", _CLASS, 'stages("visual.pooled", x[:, -1])'),
    ("pooled: the first patch", "visual.pooled", _CLASS, 'stages("visual.pooled", x[:, 1])'),
    ("ln_post missing", "visual.ln_post", f'layer_norm({_CLASS}, w, "visual.ln_post")', _CLASS),
    ("visual.proj transposed", "visual.proj",
     'x @ w["visual.proj"]', 'x @ w["visual.proj"].reshape(w["visual.proj"].T.shape).T'),
    ("image embedding not normalised", "image_embedding",
     'unit(tower(stages, w, stages["image.pixels"]))', 'tower(stages, w, stages["image.pixels"])'),
    ("text embedding not normalised", "text_embedding", "unit(encode_text(", "(encode_text("),
    ("embeddings normalised over the batch", "image_embedding",
     "np.sqrt((x * x).sum(axis=-1", "np.sqrt((x * x).sum(axis=0"),
    ("temperature not exponentiated", "logits_per_image", _SCORES, 'w["logit_scale"] * cosines'),
    ("temperature of 100 instead of the stored one", "logits_per_image", _SCORES, "np.float32(100) * cosines"),
    ("temperature forgotten: cosines", "logits_per_image", _SCORES, "cosines"),
    ("divided by the temperature", "logits_per_image", _SCORES, 'cosines / np.exp(w["logit_scale"])'),
    ("logits of embeddings that are not normalised", "logits_per_image",
     _COSINES, 'stages["visual.proj"] @ stages["text_projection"].T'),
    ("probabilities instead of logits", "logits_per_image", _SCORES, f"softmax({_SCORES})"),
    ("logits per text instead of per image", "logits_per_image", _SCORES, f"({_SCORES}).T"),
]  # fmt: skip

_EMBEDDED = 'w["token_embedding.weight"][ids]'
_PLACED = 'x + w["positional_embedding"][: ids.shape[1]]'
_TEXT_POOLED = "x[np.arange(len(x)), ids.argmax(axis=1)]"

TEXT = [
    ("token embeddings scaled by sqrt(D)", "token_embedding", _EMBEDDED, f"{_EMBEDDED} * np.float32(np.sqrt(128))"),
    ("embeddings of ids one too high", "token_embedding",
     _EMBEDDED, 'w["token_embedding.weight"][np.minimum(ids + 1, 49407)]'),
    ("embeddings of ids one too low", "token_embedding",
     _EMBEDDED, 'w["token_embedding.weight"][np.maximum(ids - 1, 0)]'),
    ("text without positions", "text.embedded", _PLACED, "x"),
    ("text positions from 1 instead of 0", "text.embedded", _PLACED, 'x + np.roll(w["positional_embedding"], -1, 0)'),
    ("text positions one late", "text.embedded", _PLACED, 'x + np.roll(w["positional_embedding"], 1, 0)'),
    ("text: every token has position 0", "text.embedded", _PLACED, 'x + w["positional_embedding"][:1]'),
    ("ln_final missing", "ln_final", 'layer_norm(x, w, "ln_final")', "x"),
    ("text pooled at the first token", "text.pooled", _TEXT_POOLED, "x[:, 0]"),
    ("text pooled at the last token, not the end-of-text token", "text.pooled", _TEXT_POOLED, "x[:, -1]"),
    ("text pooled before the end-of-text token", "text.pooled", "ids.argmax(axis=1)]", "ids.argmax(axis=1) - 1]"),
    ("text pooled after the end-of-text token", "text.pooled", "ids.argmax(axis=1)]", "ids.argmax(axis=1) + 1]"),
    ("text pooled at the last end-of-text token, not the first", "text.pooled",
     "ids.argmax(axis=1)]", "ids.shape[1] - 1 - ids[:, ::-1].argmax(axis=1)]"),
    ("end-of-text token searched in half precision", "text.pooled",
     "ids.argmax(axis=1)]", "ids.astype(np.float16).argmax(axis=1)]"),
    ("text pooled: mean over all positions", "text.pooled", _TEXT_POOLED, "x.mean(axis=1)"),
    ("text pooled: mean up to the end-of-text token", "text.pooled",
     _TEXT_POOLED, "np.stack([t[: i.argmax() + 1].mean(axis=0) for t, i in zip(x, ids)])"),
    ("text_projection transposed", "text_projection",
     'pooled @ w["text_projection"]', 'pooled @ w["text_projection"].reshape(w["text_projection"].T.shape).T'),
]  # fmt: skip

_EPS = "EPS = np.float32(1e-5)"
_MEAN = "    x = x - x.mean(axis=-1, keepdims=True)\n"
_VARIANCE = "(x * x).mean(axis=-1, keepdims=True) + EPS"
_AFFINE = ' * w[f"{name}.weight"] + w[f"{name}.bias"]'
_LN_1 = 'layer_norm(x, w, f"{block}.ln_1")'
_LN_2 = 'layer_norm(x, w, f"{block}.ln_2")'
_RESIDUAL = 'x = stages(f"{block}.residual", x + attention)'
_SPLIT = 'q, k, v = np.split(linear(norm, w, f"{block}.attn.in_proj_"), 3, axis=-1)'
_HEADS = "x.reshape(*x.shape[:2], -1, HEAD_WIDTH).transpose(0, 2, 1, 3)"
_SCALE = " / np.float32(np.sqrt(HEAD_WIDTH))"
_TRI = "np.tri(scores.shape[-1], dtype=bool)"
_MASK = 'np.where(np.tri(scores.shape[-1], dtype=bool), scores, np.float32("-inf"))'
_SOFTMAX = "softmax(scores)"
_CONTEXT = "context.transpose(0, 2, 1, 3).reshape("
_OUT = 'linear(context, w, f"{block}.attn.out_proj.")'
_FC = 'linear(norm, w, f"{block}.mlp.c_fc.")'
_PROJ = 'linear(hidden, w, f"{block}.mlp.c_proj.")'
_GELU = "x / (1 + np.exp(np.float32(-1.702) * x))"
_OUTPUT = 'stages(block, x + stages(f"{block}.mlp.c_proj"'


def _without_bias(source: str) -> str:
    """linear(x, w, name) -> x @ w[name weight].T"""
    x, _, name = source.removeprefix("linear(").removesuffix(")").split(", ")
    return f'{x} @ w[{name[:-1]}weight"].T'


TRANSFORMER = [
    ("LayerNorm's eps is 1e-6", "visual.ln_pre", _EPS, "EPS = np.float32(1e-6)"),
    ("LayerNorm's eps is 1e-12", "visual.ln_pre", _EPS, "EPS = np.float32(1e-12)"),
    ("LayerNorm's eps is 1e-3", "visual.ln_pre", _EPS, "EPS = np.float32(1e-3)"),
    (
        "LayerNorm adds eps to the deviation, not to the variance", "visual.ln_pre",
        f"np.sqrt({_VARIANCE})", "(np.sqrt((x * x).mean(axis=-1, keepdims=True)) + EPS)",
    ),
    (
        "LayerNorm divides the variance by D - 1", "visual.ln_pre",
        _VARIANCE, "(x * x).sum(axis=-1, keepdims=True) / (x.shape[-1] - 1) + EPS",
    ),
    ("RMSNorm: the mean is not subtracted", "visual.ln_pre", _MEAN, ""),
    ("LayerNorm without weight and bias", "visual.ln_pre", _AFFINE, ""),
    ("LayerNorm without bias", "visual.ln_pre", _AFFINE, ' * w[f"{name}.weight"]'),
    ("ln_1 missing", f"{BLOCK}.ln_1", _LN_1, "x"),
    ("ln_2 missing", f"{BLOCK}.ln_2", _LN_2, "x"),
    ("ln_1 and ln_2 swapped", f"{BLOCK}.ln_1", _LN_1, _LN_1.replace("1", "3"), _LN_2, _LN_2.replace("2", "1"),
     "ln_3", "ln_2"),
    ("ln_2 of the block's input", f"{BLOCK}.ln_2",
     _RESIDUAL, f"before = x; {_RESIDUAL}", _LN_2, _LN_2.replace("(x", "(before")),
    ("QKV head by head", f"{ATTENTION}.q",
     _SPLIT, 'p = linear(norm, w, f"{block}.attn.in_proj_").reshape(*norm.shape[:2], -1, 3, HEAD_WIDTH); '
     "q, k, v = (p[:, :, :, i].reshape(norm.shape) for i in range(3))"),
    ("heads interleaved: d x H instead of H x d", f"{ATTENTION}.q",
     _HEADS, "x.reshape(*x.shape[:2], HEAD_WIDTH, -1).transpose(0, 3, 1, 2)"),
    ("K and V swapped", f"{ATTENTION}.k", _SPLIT, _SPLIT.replace("q, k, v", "q, v, k")),
    ("Q and K swapped", f"{ATTENTION}.q", _SPLIT, _SPLIT.replace("q, k, v", "k, q, v")),
    ("QKV in the order V, K, Q", f"{ATTENTION}.q", _SPLIT, _SPLIT.replace("q, k, v", "v, k, q")),
    ("QKV bias missing", f"{ATTENTION}.q",
     'linear(norm, w, f"{block}.attn.in_proj_")', 'norm @ w[f"{block}.attn.in_proj_weight"].T'),
    *((f"bias of {x} missing", f"{ATTENTION}.{x}",
       _SPLIT, f'{_SPLIT}\n        {x} = {x} - np.split(w[f"{{block}}.attn.in_proj_bias"], 3)["qkv".index("{x}")]')
      for x in "qkv"),
    ("block's input not normed for QKV", f"{ATTENTION}.q", _SPLIT, _SPLIT.replace("norm", "x")),
    ("no 1/sqrt(d)", PROBABILITIES, _SCALE, ""),
    ("1/sqrt(D) instead of 1/sqrt(d)", PROBABILITIES, _SCALE, " / np.float32(np.sqrt(128))"),
    ("1/d instead of 1/sqrt(d)", PROBABILITIES, _SCALE, " / np.float32(HEAD_WIDTH)"),
    ("no causal mask", f"{TEXT_BLOCK}.attn.probabilities", "if causal:", "if False:"),
    ("causal mask off by one: the next token is seen", f"{TEXT_BLOCK}.attn.probabilities",
     _TRI, "np.tri(scores.shape[-1], k=1, dtype=bool)"),
    ("causal mask off by one: a token doesn't see itself", f"{TEXT_BLOCK}.attn.probabilities",
     _TRI, "np.tri(scores.shape[-1], k=-1, dtype=bool)"),
    ("causal mask transposed: only later tokens are seen", f"{TEXT_BLOCK}.attn.probabilities", _TRI, f"{_TRI}.T"),
    ("causal mask after the softmax", f"{TEXT_BLOCK}.attn.probabilities",
     "if causal:", "if False:", _SOFTMAX, f"{_SOFTMAX} * (np.tri(k.shape[2], dtype=np.float32) if causal else 1)"),
    ("causal mask of zeros and ones, added", f"{TEXT_BLOCK}.attn.probabilities",
     _MASK, "scores + np.tri(scores.shape[-1], dtype=np.float32)"),
    ("causal mask in the image tower", PROBABILITIES, "if causal:", "if True:"),
    ("softmax over the queries", PROBABILITIES, _SOFTMAX, "softmax(scores.swapaxes(2, 3)).swapaxes(2, 3)"),
    ("softmax missing", PROBABILITIES, _SOFTMAX, "scores"),
    ("heads side by side in the wrong order", f"{ATTENTION}.context",
     _CONTEXT, "context.transpose(0, 2, 3, 1).reshape("),
    ("heads not transposed back", f"{ATTENTION}.context", _CONTEXT, "context.reshape("),
    ("attention's out_proj transposed", f"{ATTENTION}.out_proj",
     _OUT, 'context @ w[f"{block}.attn.out_proj.weight"] + w[f"{block}.attn.out_proj.bias"]'),
    ("attention's out_proj without bias", f"{ATTENTION}.out_proj", _OUT, _without_bias(_OUT)),
    ("no residual around attention", f"{BLOCK}.residual", "x + attention", "attention"),
    ("residual from ln_1's output", f"{BLOCK}.residual", "x + attention", "norm + attention"),
    ("MLP's c_fc without bias", f"{BLOCK}.mlp.c_fc", _FC, _without_bias(_FC)),
    ("GELU instead of QuickGELU", f"{BLOCK}.mlp.activation",
     _GELU, "(x / 2 * (1 + np.vectorize(__import__('math').erf)(x / 2**0.5))).astype(np.float32)"),
    ("tanh-GELU instead of QuickGELU", f"{BLOCK}.mlp.activation",
     _GELU, "x / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))"),
    ("SiLU instead of QuickGELU", f"{BLOCK}.mlp.activation", _GELU, "x / (1 + np.exp(-x))"),
    ("ReLU instead of QuickGELU", f"{BLOCK}.mlp.activation", _GELU, "np.maximum(x, 0)"),
    ("activation missing", f"{BLOCK}.mlp.activation", _GELU, "x"),
    ("MLP's c_proj without bias", f"{BLOCK}.mlp.c_proj", _PROJ, _without_bias(_PROJ)),
    ("no residual around the MLP", BLOCK, _OUTPUT, _OUTPUT.replace("x + ", "")),
    ("residual from ln_2's output", BLOCK, _OUTPUT, _OUTPUT.replace("x + ", "norm + ")),
    ("MLP added to the block's input", BLOCK,
     _RESIDUAL, f"before = x; {_RESIDUAL}", _OUTPUT, _OUTPUT.replace("x + ", "before + ")),
]  # fmt: skip

_STEM = 'convolution(stages, w, pixels, "visual", 1, stride=2, padding=1)'
_SECOND = "convolution(stages, w, x, block, 2, padding=1)"
_STEM_POOL = "average_pool(x, 2))"
_NORM = "(x - mean) / np.sqrt(var + EPS) * weight + bias"
_BLOCK_POOL = 'stages(f"{block}.avgpool", average_pool(x, stride))'
_SHORTCUT_POOL = 'stages(f"{block}.downsample.-1", average_pool(x, stride))'
_END = 'np.maximum(stages(f"{block}.bn3", batch_norm(x, w, f"{block}.bn3")) + shortcut, 0)'
_BN_3 = 'stages(f"{block}.bn3", batch_norm(x, w, f"{block}.bn3"))'
_MEAN_TOKEN = "np.concatenate([x.mean(axis=1, keepdims=True), x], axis=1)"
_POOL_POSITION = ' + w[f"{pool}.positional_embedding"]'
_WINDOWS = "np.lib.stride_tricks.sliding_window_view(np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), axis=(2, 3))"
_QKV = 'linear(t, w, f"{pool}.{name}_proj.")'
_C_PROJ = 'linear(context, w, f"{pool}.c_proj.")'
_EVERY_SECOND = "x[:, :, ::stride, ::stride]"

RESNET = [
    ("stem without padding", "visual.conv1", _STEM, _STEM.replace(", padding=1", "")),
    ('stem padded at the end only ("SAME")', "visual.conv1",
     _STEM, _STEM.replace("pixels", "np.pad(pixels, ((0, 0), (0, 0), (0, 1), (0, 1)))").replace(", padding=1", "")),
    ("stem kernel with height and width swapped", "visual.conv1",
     _STEM, _STEM.replace("w,", 'w | {(n := "visual.conv1.weight"): w[n].swapaxes(2, 3)},')),
    ("max pool in the stem", "visual.avgpool", _STEM_POOL, f"{_WINDOWS}[:, :, ::2, ::2].max(axis=(4, 5)))"),
    ("max pool 2 x 2 in the stem", "visual.avgpool",
     _STEM_POOL, "np.maximum.reduce([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]))"),
    ("BatchNorm's eps is 1e-3", "visual.bn1", _EPS, "EPS = np.float32(1e-3)"),
    ("BatchNorm's eps is 1e-6", None, _EPS, "EPS = np.float32(1e-6)"),
    ("BatchNorm's eps is missing", None, _EPS, "EPS = np.float32(0)"),
    ("BatchNorm with the statistics of the batch", "visual.bn1",
     _NORM, "(x - x.mean(axis=(0, 2, 3))[:, None, None]) / np.sqrt(x.var(axis=(0, 2, 3))[:, None, None] + EPS)"
     " * weight + bias"),
    ("BatchNorm without its running mean and variance", "visual.bn1", _NORM, "x * weight + bias"),
    ("BatchNorm divides by the variance, not by its root", "visual.bn1", "np.sqrt(var + EPS)", "(var + EPS)"),
    ("ReLU missing", "visual.relu1",
     "np.maximum(stages(norm, batch_norm(x, w, norm)), 0)", "stages(norm, batch_norm(x, w, norm))"),
    ("convolution not padded with zeros but with the border", "visual.layer1.0.conv2",
     _SECOND, 'convolution(stages, w, np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge"), block, 2)'),
    ("stride in the second convolution instead of average pooling", "visual.layer2.0.conv2",
     _SECOND, _SECOND.replace("padding", "stride=stride, padding"), _BLOCK_POOL, 'stages(f"{block}.avgpool", x)'),
    ("every second pixel instead of average pooling", "visual.layer2.0.avgpool",
     _BLOCK_POOL, _BLOCK_POOL.replace("average_pool(x, stride)", _EVERY_SECOND)),
    ("max pool instead of average pooling", "visual.layer2.0.avgpool",
     _BLOCK_POOL, _BLOCK_POOL.replace("average_pool(x, stride)",
     "np.maximum.reduce([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)])")),
    ("stride in the shortcut's convolution instead of average pooling", "visual.layer2.0.downsample.-1",
     _SHORTCUT_POOL, _SHORTCUT_POOL.replace("average_pool(x, stride)", _EVERY_SECOND)),
    ("shortcut's BatchNorm missing", "visual.layer1.0.downsample.1",
     'batch_norm(shortcut, w, f"{block}.downsample.1")', "shortcut"),
    ("no ReLU after the addition", "visual.layer1.0", _END, f"{_BN_3} + shortcut"),
    ("ReLU before the addition", "visual.layer1.0", _END, f"np.maximum({_BN_3}, 0) + shortcut"),
    ("ReLU before and after the addition", "visual.layer1.0",
     _END, f"np.maximum(np.maximum({_BN_3}, 0) + shortcut, 0)"),
    ("shortcut missing", "visual.layer1.0", _END, f"np.maximum({_BN_3}, 0)"),
    ("attention pool without the mean token", "visual.attnpool.embedded",
     _MEAN_TOKEN, "x", _POOL_POSITION, f"{_POOL_POSITION}[1:]"),
    ("attention pool: mean token without its position", "visual.attnpool.embedded",
     _POOL_POSITION, f"{_POOL_POSITION} * (np.arange(x.shape[1] + 1) > 0)[:, None]"),
    ("attention pool without positions", "visual.attnpool.embedded", _POOL_POSITION, ""),
    ("attention pool: mean divided by the number of tokens, one too many", "visual.attnpool.embedded",
     _MEAN_TOKEN, "np.concatenate([x.sum(axis=1, keepdims=True) / (x.shape[1] + 1), x], axis=1)"),
    ("attention pool: mean token last", "visual.attnpool.embedded",
     _MEAN_TOKEN, "np.concatenate([x, x.mean(axis=1, keepdims=True)], axis=1)"),
    ("attention pool: positions column by column", "visual.attnpool.embedded",
     "    x = x.reshape(*x.shape[:2], -1).transpose(0, 2, 1)\n",
     "    x = x.swapaxes(2, 3).reshape(*x.shape[:2], -1).transpose(0, 2, 1)\n"),
    ("attention pool: query is the first position", "visual.attnpool.q", '("q", x[:, :1])', '("q", x[:, 1:2])'),
    ("attention pool: biases of q, k and v missing", "visual.attnpool.q",
     _QKV, 't @ w[f"{pool}.{name}_proj.weight"].T'),
    ("attention pool: K and V swapped", "visual.attnpool.k", '("k", x), ("v", x)', '("v", x), ("k", x)'),
    ("attention pool: no 1/sqrt(d)", "visual.attnpool.probabilities", _SCALE, ""),
    ("attention pool: one head for all channels", "visual.attnpool.probabilities",
     f"scores = q @ k.swapaxes(2, 3){_SCALE}",
     "scores = np.broadcast_to((q @ k.swapaxes(2, 3)).sum(axis=1, keepdims=True) / np.sqrt(q.shape[1] * HEAD_WIDTH),"
     " (*q.shape[:3], k.shape[2]))"),
    ("attention pool replaced by the mean", "visual.attnpool.context",
     "softmax(scores)) @ v", "softmax(scores))[..., :1] * 0 + v[:, :, 1:].mean(axis=2, keepdims=True)"),
    ("attention pool: c_proj without bias", "visual.attnpool.c_proj",
     _C_PROJ, 'context @ w[f"{pool}.c_proj.weight"].T'),
]  # fmt: skip

# The strings, in tokenizer.py.

_REPAIR = "html.unescape(html.unescape(ftfy.fix_text(text)))"
_ENCODED = "[_BYTE_IDS[byte] for byte in word.encode()]"
_MERGED = "    symbols = list(symbols)\n    end"

TOKENS = [
    ("not lower-cased", '" ".join(text.split()).lower()', '" ".join(text.split())'),
    ("ftfy missing", "ftfy.fix_text(text)", "text"),
    ("HTML entities not unescaped", _REPAIR, "ftfy.fix_text(text)"),
    ("ftfy and HTML entities missing", _REPAIR, "text"),
    ("accents stripped", '" ".join(text.split()).lower()',
     '"".join(c for c in unicodedata.normalize("NFD", " ".join(text.split()).lower()) if not unicodedata.combining(c))',
     "import gzip\n", "import gzip\nimport unicodedata\n"),
    ("only ASCII letters lower-cased", '" ".join(text.split()).lower()',
     '"".join(c.lower() if c.isascii() else c for c in " ".join(text.split()))'),
    ("no guess at mojibake", "ftfy.fix_text(text)", "ftfy.fix_text(text, fix_encoding=False)"),
    ("HTML entities unescaped by ftfy in spite of a <",
     "ftfy.fix_text(text)", "ftfy.fix_text(text, unescape_html=True)"),
    ("HTML entities unescaped once, not twice", _REPAIR, "html.unescape(ftfy.fix_text(text))"),
    ("normalised to NFKC, not NFC", "ftfy.fix_text(text)", 'ftfy.fix_text(text, normalization="NFKC")'),
    ("not normalised to NFC", "ftfy.fix_text(text)", "ftfy.fix_text(text, normalization=None)"),
    ("ligature U+FB05 replaced by s and t, not U+017F and t",
     "ftfy.fix_text(text)", 'ftfy.fix_text(text.replace("\ufb05", "st"))'),
    ("white space beyond ASCII not recognised", '" ".join(text.split()).lower()',
     'b" ".join(text.encode().split()).decode().lower()', "[^\\s\\p{L}\\p{N}]+", "[^\\t-\\r\\x20\\p{L}\\p{N}]+"),
    ("U+017F not taken for s in contractions",
     "regex.IGNORECASE | regex.VERBOSE", "regex.VERBOSE", "[^\\s\\p{L}\\p{N}]+", "[^\\s\\p{L}\\p{N}\\u0345]+"),
    ("HTML number references not unescaped", _REPAIR,
     "(lambda f: f(f(ftfy.fix_text(text, unescape_html=False))))("
     "lambda x: __import__('re').sub('&[a-zA-Z]+;?', lambda m: html.unescape(m[0]), x))"),
    ("HTML number references 128 to 159 taken as code points", _REPAIR,
     "(lambda f: f(f(ftfy.fix_text(text))))(lambda x: html.unescape("
     "__import__('re').sub('&#1[2-5][0-9];?', lambda m: chr(int(m[0].strip('&#;'))), x)))"),
    ("characters beyond ASCII dropped", '" ".join(text.split()).lower()',
     '" ".join(text.split()).lower().encode("ascii", "ignore").decode()'),
    ("digits not split", "\\p{N}                  #", "\\p{N}+                  #"),
    ("contractions not split", "| 's | 't | 're | 've | 'm | 'll | 'd\n", "\n"),
    ("split at white space only", "_word_pattern().findall(text)", "text.split()"),
    ("punctuation dropped", "          | [^\\s\\p{L}\\p{N}]+   ", "  "),
    ("ends of words not marked", "symbols[-1] += END_OF_WORD", "symbols[-1] += 0"),
    ("all bytes of the last character marked as the word's end", "symbols[-1] += END_OF_WORD",
     "last = len(word[-1].encode()); symbols[-last:] = [i + END_OF_WORD for i in symbols[-last:]]"),
    ("every id one too high", "[START, *encode(text), END]", "[i + 1 for i in (START, *encode(text), END)]",
     "row[-1] = END", "row[-1] = END + 1"),
    ("ids of merges one too high: the table's heading counted", "else merge_pairs(word_symbols(word))",
     "else [i + (i >= 512) for i in merge_pairs(word_symbols(word))]"),
    ("longest match in the vocabulary instead of merges", _MERGED,
     "    table = {spelling: i for i, spelling in _spellings().items()}\n"
     '    rest, ids = b"".join(_spellings()[i] for i in symbols), []\n'
     "    while rest:\n"
     "        n = next(n for n in range(len(rest), 0, -1) if rest[:n] in table)\n"
     "        ids.append(table[rest[:n]])\n"
     "        rest = rest[n:]\n"
     "    return ids\n" + _MERGED),
    ("merges from the left instead of by rank", _MERGED,
     "    symbols = list(symbols)\n"
     "    while pairs := [i for i in range(len(symbols) - 1) if (symbols[i], symbols[i + 1]) in merges]:\n"
     "        symbols[pairs[0] : pairs[0] + 2] = [merges[symbols[pairs[0]], symbols[pairs[0] + 1]]]\n"
     "    return symbols\n" + _MERGED),
    ("of equal pairs the last merged first", "heappush(candidates, (merged, left))",
     "heappush(candidates, (merged, -left))", "merged, left = heappop(candidates)",
     "merged, left = heappop(candidates); left = -left"),
    ("bytes not merged", _MERGED, "    return symbols\n" + _MERGED),
    ("start-of-text token missing", "[START, *encode(text), END]", "[*encode(text), END]"),
    ("end-of-text token missing", "[START, *encode(text), END]", "[START, *encode(text)]", "row[-1] = END", "pass"),
    ("truncated text without the end-of-text token", "row[-1] = END", "pass"),
    ("padded with the end-of-text token", "torch.zeros(len(rows), context_length, dtype=torch.int32)",
     "torch.full((len(rows), context_length), END, dtype=torch.int32)"),
]  # fmt: skip

# The bits of float16 numbers (of bfloat16 where the name begins so), read wrongly.

_FRACTION = 2.0**-24  # a subnormal number is its fraction times this


def _subnormals(value) -> Callable:
    """value(fraction) for each number without an exponent, with its sign."""
    return lambda bits: np.where(
        (bits & 0x7C00 == 0) & (bits & 0x3FF > 0),
        np.where(bits >> 15, -1.0, 1.0) * value((bits & 0x3FF).astype(np.float32)),
        bits.view(np.float16),
    ).astype(np.float32)


NUMBERS = [
    ("float16 subnormals read as zero (section 3.1)", _subnormals(lambda fraction: 0 * fraction)),
    ("float16 subnormals read as if they had a leading 1 (section 3.1)",
     _subnormals(lambda fraction: (1 + fraction / 1024) * 2.0**-15)),
    ("float16 subnormals read with an exponent that is one too low (section 3.1)",
     _subnormals(lambda fraction: fraction * _FRACTION / 2)),
    ("float16 read as bfloat16", lambda bits: (bits.astype(np.uint32) << 16).view(np.float32)),
    ("bfloat16 read as float16", lambda bits: bits.view(np.float16).astype(np.float32)),
    ("bytes of float16 in big-endian order", lambda bits: bits.byteswap().view(np.float16).astype(np.float32)),
]  # fmt: skip

# Such a mistake gives the same as another one, which is named before it.
NAMED_SECOND = ("end-of-text token searched in half precision",)

# Mistakes that the catalogue lacks: the golden (None: of the ViT), the stage, edits to both sources.
UNKNOWN = [
    (None, f"{BLOCK}.mlp.activation", "-1.702", "-1.6"),
    (None, "visual.embedded", _POSITION, ' + w["visual.positional_embedding"] * np.float32(0.5)\n'),
    (None, PROBABILITIES, _SCALE, " / np.float32(7)"),
    (None, f"{BLOCK}.residual", "x + attention", "x + attention / 2"),
    (None, "visual.ln_pre", _MEAN, "    x = x - np.median(x, axis=-1, keepdims=True)\n"),
    (None, "text.embedded", _PLACED, "x + w[\"positional_embedding\"][: ids.shape[1]][::-1]"),
    (None, "image_embedding", "np.sqrt((x * x).sum(axis=-1, keepdims=True))", "abs(x).sum(axis=-1, keepdims=True)"),
    (None, "logits_per_image", _SCORES, f"{_SCORES} - 1"),
    ("resnet", "image.resized", "(i + 0.5) * scale", "(i + 0.25) * scale"),
    ("resnet", "image.pixels", _NORMALIZED, f"({_NORMALIZED}).clip(-1, 1)"),
    ("resnet", "visual.layer1.0", _END, f"np.maximum({_BN_3} - shortcut, 0)"),
]  # fmt: skip
