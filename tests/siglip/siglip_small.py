"""Small SigLIPs, their files in transformers' and OpenCLIP's layouts, tokenizers, and the towers written once more."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import torch
from conformance.seeded import tensor
from safetensors.torch import save_file
from torch import Tensor

from miniclip.config import PreprocessConfig, TransformerConfig
from miniclip.siglip.config import SigLIPConfig, SigLIPTextConfig, SigLIPViTConfig

LENGTH, VOCABULARY, SIZE, PATCH = 16, 120, 30, 8  # 30 is no multiple of 8, as 384 is none of 14
TEXTS = ["A photo, of the Dog!", "two cats", "", "a red_blue house"]


def small(activation: str = "gelu_tanh", vocabulary: int = VOCABULARY) -> SigLIPConfig:
    vision = TransformerConfig(32, 2, 4, 48, activation)
    text = TransformerConfig(24, 2, 2, 40, activation)
    return SigLIPConfig(
        32,
        SigLIPViTConfig(SIZE, PATCH, vision),
        SigLIPTextConfig(LENGTH, vocabulary, text, "remove punctuation", "</s>", "</s>"),
        PreprocessConfig(SIZE, (0.5,) * 3, (0.5,) * 3, "bicubic", "squash"),
    )


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A state dict with values that belong to the names, large enough for every tensor to have an influence."""
    result = {}
    for name, shape in shapes.items():
        if name.endswith(("logit_scale", "logit_bias")):
            result[name] = tensor(name, shape, 2.5 if name.endswith("scale") else -3.0, 0.5)
        elif len(shape) == 1 and name.endswith("weight"):  # of a norm
            result[name] = tensor(name, shape, 1.0, 0.3)
        elif len(shape) < 2 or "position" in name or "pos_embed" in name or name.endswith(("probe", "latent")):
            result[name] = tensor(name, shape, 0.0, 0.5)
        else:
            result[name] = tensor(name, shape, 0.0, 1.5 / math.sqrt(math.prod(shape[1:])))
    return result


# transformers' files, written down by hand.


def huggingface_shapes(config: SigLIPConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of transformers' SiglipModel."""
    vision, text = config.vision.transformer, config.text.transformer
    width, grid = vision.width, config.vision.image_size // config.vision.patch_size
    shapes: dict[str, tuple[int, ...]] = {"logit_scale": (1,), "logit_bias": (1,)}
    shapes["text_model.embeddings.token_embedding.weight"] = (config.text.vocab_size, text.width)
    shapes["text_model.embeddings.position_embedding.weight"] = (config.text.context_length, text.width)
    shapes |= _pair("text_model.final_layer_norm", text.width) | _pair("text_model.head", width, text.width)
    patch = config.vision.patch_size
    shapes |= _pair("vision_model.embeddings.patch_embedding", width, 3, patch, patch)
    shapes["vision_model.embeddings.position_embedding.weight"] = (grid**2, width)
    shapes |= _pair("vision_model.post_layernorm", width)
    for tower, transformer in (("text_model", text), ("vision_model", vision)):
        for i in range(transformer.layers):
            block, width, hidden = f"{tower}.encoder.layers.{i}.", transformer.width, transformer.mlp_width
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                shapes |= _pair(f"{block}self_attn.{part}", width, width)
            shapes |= _pair(f"{block}layer_norm1", width) | _pair(f"{block}layer_norm2", width)
            shapes |= _pair(f"{block}mlp.fc1", hidden, width) | _pair(f"{block}mlp.fc2", width, hidden)
    head, width = "vision_model.head.", vision.width
    shapes |= {f"{head}probe": (1, 1, width), f"{head}attention.in_proj_weight": (3 * width, width)}
    shapes |= {f"{head}attention.in_proj_bias": (3 * width,)} | _pair(f"{head}attention.out_proj", width, width)
    shapes |= _pair(f"{head}layernorm", width) | _pair(f"{head}mlp.fc1", vision.mlp_width, width)
    return shapes | _pair(f"{head}mlp.fc2", width, vision.mlp_width)


def _pair(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def huggingface_json(config: SigLIPConfig) -> dict:
    def tower(transformer: TransformerConfig) -> dict:
        return {
            "hidden_size": transformer.width,
            "num_hidden_layers": transformer.layers,
            "num_attention_heads": transformer.heads,
            "intermediate_size": transformer.mlp_width,
            "hidden_act": {"gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu"}[transformer.activation],
            "layer_norm_eps": 1e-6,
        }

    text = {"vocab_size": config.text.vocab_size, "max_position_embeddings": config.text.context_length}
    text["projection_size"] = config.embed_dim
    vision = {"image_size": config.vision.image_size, "patch_size": config.vision.patch_size}
    return {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "text_config": tower(config.text.transformer) | text,
        "vision_config": tower(config.vision.transformer) | vision,
    }


PREPROCESSOR = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "do_convert_rgb": None,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor",
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"height": SIZE, "width": SIZE},
}


def huggingface_directory(folder: Path, config: SigLIPConfig | None = None) -> dict[str, Tensor]:
    """Fill a directory; returns the tensors under transformers' names."""
    config = config or small()
    folder.mkdir(exist_ok=True)
    tensors = weights(huggingface_shapes(config))
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(huggingface_json(config)))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return tensors


# Tokenizers.


def sentencepiece_model(path: Path) -> None:
    """A SentencePiece model of a few words, with the special ids of T5's vocabularies: pad 0, end 1, unknown 2."""
    import sentencepiece

    words = ["a", "photo", "of", "the", "dog", "cat", "red", "blue", "two", "small", "house", "tree", "running", "in"]
    rng = random.Random(0)
    corpus = [" ".join(rng.choices(words, k=8)) for _ in range(2000)]
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus),
            model_writer=file,
            vocab_size=VOCABULARY,
            hard_vocab_limit=False,
            minloglevel=2,
            **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
        )


def json_tokenizer(path: Path) -> None:
    """A tokenizer.json as SigLIP 2's: byte-pair encoding with spaces as U+2581, <pad> 0, <eos> 1, <bos> 2, <unk> 3."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    trainer = BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<pad>", "<eos>", "<bos>", "<unk>"])
    tokenizer.train_from_iterator(["a photo of the dog, two cats! in a house?"] * 50, trainer)
    tokenizer.save(str(path))


# The towers once more, in float64, from transformers' tensors.


def reference(config: SigLIPConfig, tensors: dict[str, Tensor], pixels: Tensor, ids: Tensor) -> tuple:
    """Unit embeddings of pictures and texts, and the scores, by NumPy."""
    w = {name: x.numpy().astype(np.float64) for name, x in tensors.items()}
    activation = config.vision.transformer.activation
    image = _unit(_image(w, config, pixels.numpy().astype(np.float64), activation))
    text = _unit(_text(w, config, ids.numpy(), activation))
    return image, text, np.exp(w["logit_scale"]) * image @ text.T + w["logit_bias"]


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).sum(-1, keepdims=True))


def _linear(w: dict, name: str, x: np.ndarray) -> np.ndarray:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _norm(w: dict, name: str, x: np.ndarray) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * w[f"{name}.weight"] + w[f"{name}.bias"]


def _mlp(w: dict, name: str, x: np.ndarray, activation: str) -> np.ndarray:
    x = _linear(w, f"{name}.fc1", x)
    if activation == "gelu_tanh":
        x = x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    else:
        x = x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return _linear(w, f"{name}.fc2", x)


def _attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, heads: int) -> np.ndarray:
    """q [N, Q, D], k and v [N, L, D] -> [N, Q, D]."""
    q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3) for x in (q, k, v))
    scores = np.exp(q @ k.transpose(0, 1, 3, 2) / math.sqrt(q.shape[-1]))
    mean = scores / scores.sum(-1, keepdims=True) @ v
    return mean.transpose(0, 2, 1, 3).reshape(len(q), q.shape[2], -1)


def _blocks(w: dict, tower: str, x: np.ndarray, layers: int, heads: int, activation: str) -> np.ndarray:
    for i in range(layers):
        block = f"{tower}.encoder.layers.{i}"
        y = _norm(w, f"{block}.layer_norm1", x)
        q, k, v = (_linear(w, f"{block}.self_attn.{part}_proj", y) for part in "qkv")
        x = x + _linear(w, f"{block}.self_attn.out_proj", _attend(q, k, v, heads))
        x = x + _mlp(w, f"{block}.mlp", _norm(w, f"{block}.layer_norm2", x), activation)
    return x


def _image(w: dict, config: SigLIPConfig, pixels: np.ndarray, activation: str) -> np.ndarray:
    side, transformer = config.vision.patch_size, config.vision.transformer
    grid, embeddings = pixels.shape[2] // side, "vision_model.embeddings"
    pixels = pixels[:, :, : grid * side, : grid * side].reshape(len(pixels), 3, grid, side, grid, side)
    patches = pixels.transpose(0, 2, 4, 1, 3, 5).reshape(len(pixels), grid**2, -1)
    kernel = w[f"{embeddings}.patch_embedding.weight"].reshape(transformer.width, -1)
    x = patches @ kernel.T + w[f"{embeddings}.patch_embedding.bias"] + w[f"{embeddings}.position_embedding.weight"]
    x = _blocks(w, "vision_model", x, transformer.layers, transformer.heads, activation)
    x = _norm(w, "vision_model.post_layernorm", x)
    head = "vision_model.head"
    weight, bias = (w[f"{head}.attention.in_proj_{kind}"] for kind in ("weight", "bias"))
    probe = np.broadcast_to(w[f"{head}.probe"], (len(x), 1, transformer.width))
    parts = zip((probe, x, x), np.split(weight, 3), np.split(bias, 3), strict=True)
    x = _attend(*(y @ each.T + offset for y, each, offset in parts), transformer.heads)[:, 0]
    x = _linear(w, f"{head}.attention.out_proj", x)
    return x + _mlp(w, f"{head}.mlp", _norm(w, f"{head}.layernorm", x), activation)


def _text(w: dict, config: SigLIPConfig, ids: np.ndarray, activation: str) -> np.ndarray:
    embeddings, transformer = "text_model.embeddings", config.text.transformer
    x = w[f"{embeddings}.token_embedding.weight"][ids] + w[f"{embeddings}.position_embedding.weight"]
    x = _blocks(w, "text_model", x, transformer.layers, transformer.heads, activation)
    return _linear(w, "text_model.head", _norm(w, "text_model.final_layer_norm", x)[:, -1])


def inputs(count: int = 2) -> tuple[Tensor, Tensor]:
    """Pixels, and token ids that fill the context."""
    pixels = tensor("image", (count, 3, SIZE, SIZE), spread=2.0)
    return pixels, (tensor("text", (count, LENGTH), 0.5, 0.499) * VOCABULARY).int()


def difference(model: torch.nn.Module, expected: tuple) -> float:
    """The largest difference of the unit embeddings and, divided by exp(logit_scale), of the scores."""
    pixels, ids = inputs()
    with torch.no_grad():
        image, text = model.encode_image(pixels, normalize=True), model.encode_text(ids, normalize=True)
        scores = model(pixels, ids)[0]
    scale = model.logit_scale.exp().item()
    pairs = zip((image, text, scores), expected, (1, 1, scale), strict=True)
    return max(float(np.abs(x.double().numpy() - y).max()) / divisor for x, y, divisor in pairs)
