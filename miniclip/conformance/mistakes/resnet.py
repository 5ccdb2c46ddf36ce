"""The ModifiedResNet and its attention pool."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip.conformance.forward import Rule, Scope
from miniclip.conformance.mistakes.mistake import Mistake
from miniclip.conformance.rules import pool_probabilities, shortcut, with_mean
from miniclip.models.resnet import AttentionPool, Bottleneck, ModifiedResNet

_POOL = "visual.attnpool."
_STRIDE = (Bottleneck, "nn.AvgPool2d(stride) if")
_BATCH_NORM = (Bottleneck, "self.bn1")
_END = (Bottleneck, "F.relu(x + shortcut)")

# Where each BatchNorm takes its input, by its key.
_NORMED = {
    **{f"stem.bn{i}": (f"visual.conv{i}", f"visual.bn{i}") for i in (1, 2, 3)},
    **{f"bottleneck.bn{i}": (f".conv{i}", f".bn{i}") for i in (1, 2, 3)},
    "bottleneck.downsample.1": (".downsample.0", ".downsample.1"),
}


def _norm(name: str, change) -> Mistake:
    """Every BatchNorm, as change(scope, x, name) computes it."""
    planted = {key: lambda s, x=x, norm=norm: change(s, s[x], norm) for key, (x, norm) in _NORMED.items()}
    return Mistake(name, planted, *_BATCH_NORM)


def _of_the_batch(s: Scope, x: Tensor, name: str) -> Tensor:
    return F.batch_norm(x, None, None, s.weight(name + ".weight"), s.weight(name + ".bias"), training=True)


def _not_running(s: Scope, x: Tensor, name: str) -> Tensor:
    return x * s.weight(name + ".weight")[:, None, None] + s.weight(name + ".bias")[:, None, None]


def _divided_by_variance(s: Scope, x: Tensor, name: str) -> Tensor:
    mean, variance = (s.weight(f"{name}.running_{kind}")[:, None, None] for kind in ("mean", "var"))
    return _not_running(s, (x - mean) / (variance + 1e-5), name)


def _same_padding(s: Scope) -> Tensor:
    """TensorFlow's "SAME" at stride 2: the one row and column of zeros at the end."""
    return s.conv(F.pad(s["image.pixels"], (0, 1, 0, 1)), "visual.conv1", stride=2)


def _strided(s: Scope) -> Tensor:
    return s[".relu2"][:, :, :: s.stride, :: s.stride]


def _strided_input(s: Scope) -> Tensor:
    return s.input[:, :, :: s.stride, :: s.stride]


def _relu_missing() -> dict[str, Rule]:
    stem = {f"stem.relu{i}": lambda s, i=i: s[f"visual.bn{i}"] for i in (1, 2, 3)}
    return stem | {f"bottleneck.relu{i}": lambda s, i=i: s[f".bn{i}"] for i in (1, 2)}


def _position(s: Scope) -> Tensor:
    return s.weight(_POOL + "positional_embedding")


def _small_mean(s: Scope) -> Tensor:
    tokens = with_mean(s)
    count = tokens.shape[1]
    return torch.cat([tokens[:, :1] * (count - 1) / count, tokens[:, 1:]], dim=1) + _position(s)


def _mean_last(s: Scope) -> Tensor:
    return with_mean(s).roll(-1, dims=1) + _position(s)


def _not_for_mean(s: Scope) -> Tensor:
    position = _position(s).clone()
    position[0] = 0
    return with_mean(s) + position


def _by_columns(s: Scope) -> Tensor:
    side = int((with_mean(s).shape[1] - 1) ** 0.5)
    tokens = with_mean(s)
    patches = tokens[:, 1:].unflatten(1, (side, side)).transpose(1, 2).flatten(1, 2)
    return torch.cat([tokens[:, :1], patches], dim=1) + _position(s)


def _projected(s: Scope, part: str, bias: bool = True) -> Tensor:
    tokens = s[_POOL + "embedded"]
    return s.cut(s.linear(tokens[:, :1] if part == "q" else tokens, f"{_POOL}{part}_proj", bias))


def _pool(name: str, stage: str, rule: Rule, line: str) -> Mistake:
    return Mistake(name, {_POOL + stage: rule}, AttentionPool, line)


RESNET = (
    Mistake("stem without padding", {"stem.conv1": lambda s: s.conv(s["image.pixels"], "visual.conv1", stride=2)},
            ModifiedResNet, "padding=1"),
    Mistake('stem padded at the end only ("SAME")', {"stem.conv1": _same_padding}, ModifiedResNet, "padding=1"),
    Mistake(
        "stem kernel with height and width swapped",
        {"stem.conv1": lambda s: F.conv2d(
            s["image.pixels"], s.weight("visual.conv1.weight").transpose(2, 3), stride=2, padding=1)},
        ModifiedResNet, "self.conv1(image)",
    ),
    Mistake("max pool in the stem", {"stem.avgpool": lambda s: F.max_pool2d(s["visual.relu3"], 3, 2, 1)},
            ModifiedResNet, "AvgPool2d(2)"),
    Mistake("max pool 2 x 2 in the stem", {"stem.avgpool": lambda s: F.max_pool2d(s["visual.relu3"], 2)},
            ModifiedResNet, "AvgPool2d(2)"),
    _norm("BatchNorm's eps is 1e-3", lambda s, x, name: s.batch_norm(x, name, eps=1e-3)),
    _norm("BatchNorm's eps is 1e-6", lambda s, x, name: s.batch_norm(x, name, eps=1e-6)),
    _norm("BatchNorm's eps is missing", lambda s, x, name: s.batch_norm(x, name, eps=0.0)),
    _norm("BatchNorm with the statistics of the batch", _of_the_batch),
    _norm("BatchNorm without its running mean and variance", _not_running),
    _norm("BatchNorm divides by the variance, not by its root", _divided_by_variance),
    Mistake("ReLU missing", _relu_missing(), Bottleneck, "F.relu(self.bn1("),
    Mistake("convolution not padded with zeros but with the border",
            {"bottleneck.conv2": lambda s: s.conv(F.pad(s[".relu1"], (1, 1, 1, 1), mode="replicate"), ".conv2")},
            Bottleneck, "padding=1"),
    Mistake("stride in the second convolution instead of average pooling",
            {"bottleneck.conv2": lambda s: s.conv(s[".relu1"], ".conv2", padding=1, stride=s.stride),
             "bottleneck.avgpool": lambda s: s[".relu2"]}, *_STRIDE),
    Mistake("every second pixel instead of average pooling", {"bottleneck.avgpool": _strided}, *_STRIDE),
    Mistake("max pool instead of average pooling",
            {"bottleneck.avgpool": lambda s: F.max_pool2d(s[".relu2"], s.stride)}, *_STRIDE),
    Mistake("stride in the shortcut's convolution instead of average pooling",
            {"bottleneck.downsample.-1": _strided_input}, Bottleneck, 'nn.AvgPool2d(stride))'),
    Mistake("shortcut's BatchNorm missing", {"bottleneck.downsample.1": lambda s: s[".downsample.0"]},
            Bottleneck, '"1", nn.BatchNorm2d('),
    Mistake("no ReLU after the addition", {"bottleneck": lambda s: s[".bn3"] + shortcut(s)}, *_END),
    Mistake("ReLU before the addition", {"bottleneck": lambda s: F.relu(s[".bn3"]) + shortcut(s)}, *_END),
    Mistake("ReLU before and after the addition",
            {"bottleneck": lambda s: F.relu(F.relu(s[".bn3"]) + shortcut(s))}, *_END),
    Mistake("shortcut missing", {"bottleneck": lambda s: F.relu(s[".bn3"])}, *_END),
    _pool("attention pool without the mean token", "embedded", lambda s: with_mean(s)[:, 1:] + _position(s)[1:],
          "x.mean("),
    _pool("attention pool: mean token without its position", "embedded", _not_for_mean, "+ self.positional_embedding"),
    _pool("attention pool without positions", "embedded", with_mean, "+ self.positional_embedding"),
    _pool("attention pool: mean divided by the number of tokens, one too many", "embedded", _small_mean, "x.mean("),
    _pool("attention pool: mean token last", "embedded", _mean_last, "torch.cat("),
    _pool("attention pool: positions column by column", "embedded", _by_columns, "flatten(2)"),
    _pool("attention pool: query is the first position", "q",
          lambda s: s.cut(s.linear(s[_POOL + "embedded"][:, 1:2], _POOL + "q_proj")), "x[:, :1]"),
    Mistake("attention pool: biases of q, k and v missing",
            {_POOL + part: lambda s, part=part: _projected(s, part, bias=False) for part in "qkv"},
            AttentionPool, "self.q_proj("),
    Mistake("attention pool: K and V swapped",
            {_POOL + "k": lambda s: _projected(s, "v"), _POOL + "v": lambda s: _projected(s, "k")},
            AttentionPool, "self.k_proj("),
    _pool("attention pool: no 1/sqrt(d)", "probabilities", lambda s: pool_probabilities(s, 1.0), "scaled_dot_product"),
    _pool("attention pool: one head for all channels", "probabilities", lambda s: _one_head(s), "unflatten("),
    _pool("attention pool replaced by the mean", "context", lambda s: s[_POOL + "v"][:, :, 1:].mean(2).flatten(1),
          "scaled_dot_product"),
    _pool("attention pool: c_proj without bias", "c_proj",
          lambda s: s.linear(s[_POOL + "context"], _POOL + "c_proj", bias=False), "self.c_proj("),
)  # fmt: skip


def _one_head(s: Scope) -> Tensor:
    q, k = (s[_POOL + x].transpose(1, 2).flatten(2) for x in "qk")
    one = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return one[:, None].expand(-1, s.heads, -1, -1)
