"""A forward pass by rules, in which a stage is computed when it is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from operator import attrgetter

import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip import ops
from miniclip.config import CLIPConfig
from miniclip.loading import family_of
from miniclip.models import CLIP
from miniclip.stages import Stage, tower_of

EPS = 1e-5  # of LayerNorm and BatchNorm
Rule = Callable[["Scope"], Tensor]  # how one stage follows from others


@lru_cache
def stages_of(config: CLIPConfig) -> dict[str, Stage]:
    """All stages of a model, by name, in forward order."""
    return {stage.name: stage for stage in family_of(config).stages(config)}


@lru_cache
def inputs_of(config: CLIPConfig) -> dict[str, str]:
    """For each stage the stage before its block, or before the stage itself where it is in no block."""
    found, before = {}, None
    for stage in stages_of(config).values():
        if before is not None:
            same_block = stage.block and stage.block == before.block
            found[stage.name] = found[before.name] if same_block else before.name
        before = stage
    return found


class UnknownStageError(LookupError):
    """A stage that others are computed from was not given."""


class Forward:
    """A forward pass in which a stage is computed when it is asked for, unless it is known.

    rules:   how each kind of stage is computed: `rules.RULES`
    known:   stages that are given; those that get computed are added to them
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
        self.stages = stages_of(model.config)
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
        stage = self.stages.get(name)
        if stage is None or stage.rule not in self._rules:
            raise UnknownStageError(f"{name} is not known, and no rule says how to compute it")
        rule = self._rules[stage.rule]
        if self._tower in (None, tower_of(name)):
            rule = self._planted.get(stage.rule, rule)
        return rule(Scope(self, stage))

    def input_of(self, name: str) -> Tensor:
        """The stage before this one's block, or before this one where it is in no block."""
        inputs = inputs_of(self.config)
        missing = [inputs[name]]
        while missing[-1] not in self._known and self.stages[missing[-1]].block == missing[-1]:  # the output of a block
            missing.append(inputs[missing[-1]])
        for name in reversed(missing):  # first block first, so that deep models don't nest calls deeply
            self[name]
        return self[missing[0]]


class Scope:
    """What a rule sees. Names that begin with a dot are those of its own block."""

    def __init__(self, forward: Forward, stage: Stage):
        self._forward = forward
        self.stage = stage
        self.block = stage.block
        self.config = forward.config
        self.tokenize = forward.model.tokenize
        self._change: Callable[[Tensor], Tensor] = lambda weight: weight

    def __getitem__(self, name: str) -> Tensor:
        return self._forward[self.block + name if name.startswith(".") else name]

    def weight(self, name: str) -> Tensor:
        """A tensor of the checkpoint, by its name there."""
        weight = attrgetter(self.block + name if name.startswith(".") else name)(self._forward.model)
        return self._change(weight.detach().float().cpu())

    def with_weights(self, change: Callable[[Tensor], Tensor]) -> Scope:
        """The same with every weight changed."""
        changed = Scope(self._forward, self.stage)
        changed._change = change
        return changed

    @property
    def input(self) -> Tensor:
        """What the block takes; for a stage in no block, the stage before it."""
        return self.input_of(self.stage.name)

    def input_of(self, name: str) -> Tensor:
        return self._forward.input_of(name)

    @property
    def causal(self) -> bool:
        return self.block.startswith("transformer")

    @property
    def stack(self):
        """The config of the transformer that the block is in."""
        return (self.config.text if self.causal else self.config.vision).transformer

    @property
    def heads(self) -> int:
        return self.stack.heads if self.block else self.config.vision.heads  # in no block: the attention pool's

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
