"""A forward pass made of rules, in which each stage is computed when it is asked for."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from operator import attrgetter

import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip import ops
from miniclip.config import CLIPConfig, ResNetConfig
from miniclip.models import CLIP
from miniclip.openai.stages import tower_of

EPS = 1e-5  # of LayerNorm and BatchNorm
Rule = Callable[["Scope"], Tensor]  # how one stage follows from others
_BLOCK = re.compile(r"((?:visual\.)?transformer\.resblocks\.)(\d+)(.*)")
_BOTTLENECK = re.compile(r"visual\.layer(\d)\.(\d+)(.*)")
_STEM = re.compile(r"visual\.((conv|bn|relu)[123]|avgpool)$")


def key_of(name: str, config: CLIPConfig) -> tuple[str, str]:
    """The key of a stage in `rules.RULES`, and the path of the block it belongs to, if it does.

    >>> key_of("visual.transformer.resblocks.3.attn.q", config)
    ('resblock.attn.q', 'visual.transformer.resblocks.3')
    """
    if match := _BLOCK.fullmatch(name):
        return "resblock" + match[3], match[1] + match[2]
    if match := _BOTTLENECK.fullmatch(name):
        return "bottleneck" + match[3], f"visual.layer{match[1]}.{match[2]}"
    if isinstance(config.vision, ResNetConfig) and _STEM.fullmatch(name):
        return name.replace("visual", "stem"), ""
    return name, ""


class UnknownStageError(LookupError):
    """A stage that others are computed from was not given."""


class Forward:
    """A forward pass in which a stage is computed when it is asked for, unless it is known.

    rules:   how each stage is computed, by key: `rules.RULES`
    known:   stages that are given; those that get computed are added to it
    planted: rules that replace some of these, in one tower ("visual" or "text") or in both (None)
    """

    def __init__(
        self,
        model: CLIP,
        rules: Mapping[str, Rule],
        known: Mapping[str, Tensor],
        planted: Mapping[str, Rule] | None = None,
        tower: str | None = None,
    ):
        self.config = model.config
        self.model = model
        self._rules = rules
        self._known = {name: x.float() if x.is_floating_point() else x for name, x in known.items()}
        self._planted = planted or {}
        self._tower = tower

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._known:
            self._known[name] = self.compute(name)
        return self._known[name]

    def compute(self, name: str) -> Tensor:
        """A stage by its rule, also if it is known."""
        key, block = key_of(name, self.config)
        if key not in self._rules:
            raise UnknownStageError(f"{name} is not known and follows from nothing")
        rule = self._rules[key]
        if self._tower in (None, tower_of(name)):
            rule = self._planted.get(key, rule)
        return rule(Scope(self, block))

    def block_input(self, block: str) -> Tensor:
        """What the block at this path takes: the output of the one before it, or of what precedes the first."""
        missing = [self._before(block)]
        while missing[-1] not in self._known and _is_block(missing[-1]):
            missing.append(self._before(missing[-1]))
        for name in reversed(missing):  # first block first, so that deep models don't nest calls deeply
            self[name]
        return self[missing[0]]

    def _before(self, block: str) -> str:
        if match := _BLOCK.fullmatch(block):
            if match[2] != "0":
                return f"{match[1]}{int(match[2]) - 1}"
            return "visual.ln_pre" if match[1].startswith("visual") else "text.embedded"
        layer, i = map(int, _BOTTLENECK.fullmatch(block).groups()[:2])
        if i:
            return f"visual.layer{layer}.{i - 1}"
        return f"visual.layer{layer - 1}.{self.config.vision.layers[layer - 2] - 1}" if layer > 1 else "visual.avgpool"


def _is_block(name: str) -> bool:
    match = _BLOCK.fullmatch(name) or _BOTTLENECK.fullmatch(name)
    return match is not None and not match[3]


class Scope:
    """What a rule sees. Names that begin with a dot are those of its own block."""

    def __init__(self, forward: Forward, block: str):
        self._forward = forward
        self.block = block
        self.config = forward.config

    def __getitem__(self, name: str) -> Tensor:
        return self._forward[self.block + name if name.startswith(".") else name]

    def weight(self, name: str) -> Tensor:
        """A tensor of the checkpoint, by its name there."""
        weight = attrgetter(self.block + name if name.startswith(".") else name)(self._forward.model)
        return weight.detach().float().cpu()

    @property
    def input(self) -> Tensor:
        return self._forward.block_input(self.block)

    @property
    def last_block(self) -> Tensor:
        """The output of the last block of the image tower."""
        vision = self.config.vision
        if isinstance(vision, ResNetConfig):
            return self[f"visual.layer4.{vision.layers[-1] - 1}"]
        return self._forward.block_input(f"visual.transformer.resblocks.{vision.transformer.layers}")

    @property
    def last_text_block(self) -> Tensor:
        return self._forward.block_input(f"transformer.resblocks.{self.config.text.transformer.layers}")

    @property
    def causal(self) -> bool:
        return self.block.startswith("transformer")

    @property
    def stack(self):
        """The config of the transformer that the block is in."""
        return (self.config.text if self.causal else self.config.vision).transformer

    @property
    def heads(self) -> int:
        return self.stack.heads if self.block else self.config.vision.heads  # outside of blocks: the attention pool

    @property
    def stride(self) -> int:
        return 2 if self.block.endswith(".0") and not self.block.startswith("visual.layer1") else 1

    # The mathematics, with the arguments that mistakes change.

    def linear(self, x: Tensor, name: str, bias: bool = True) -> Tensor:
        return F.linear(x, self.weight(name + ".weight"), self.weight(name + ".bias") if bias else None)

    def layer_norm(self, x: Tensor, name: str, eps: float = EPS) -> Tensor:
        return ops.layer_norm(x, self.weight(name + ".weight"), self.weight(name + ".bias"), eps)

    def conv(self, x: Tensor, name: str, **options) -> Tensor:
        return F.conv2d(x, self.weight(name + ".weight"), **options)

    def batch_norm(self, x: Tensor, name: str, eps: float = EPS) -> Tensor:
        mean, variance = self.weight(name + ".running_mean"), self.weight(name + ".running_var")
        return F.batch_norm(x, mean, variance, self.weight(name + ".weight"), self.weight(name + ".bias"), eps=eps)

    def projected(self, rows: int, bias: bool = True) -> Tensor:
        """ln_1 through one third of in_proj: 0 queries, 1 keys, 2 values."""
        weight, offset = (self.weight(f".attn.in_proj_{kind}").chunk(3)[rows] for kind in ("weight", "bias"))
        return self.cut(F.linear(self[".ln_1"], weight, offset if bias else None))

    def cut(self, x: Tensor) -> Tensor:
        """[N, L, D] -> [N, H, L, d]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def scores(self) -> Tensor:
        """q k^T of a block, not scaled, [N, H, L, L]."""
        return self[".attn.q"] @ self[".attn.k"].transpose(-1, -2)

    def mask(self, diagonal: int = 1) -> Tensor:
        """[L, L], minus infinity where key - query >= diagonal, otherwise 0; all 0 in the image tower."""
        length = self[".attn.q"].shape[2]
        masked = torch.ones(length, length, dtype=torch.bool).triu(diagonal) & self.causal
        return torch.zeros(length, length).masked_fill(masked, -math.inf)
