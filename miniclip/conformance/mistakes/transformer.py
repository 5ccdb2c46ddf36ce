"""The blocks that both transformers have, and LayerNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip import ops
from miniclip.conformance.forward import Rule, Scope
from miniclip.conformance.mistakes.mistake import Mistake
from miniclip.models.transformer import MLP, Attention, ResidualAttentionBlock

_LINEAR = (Attention, "self.in_proj_weight")
_SPLIT = (Attention, "unflatten(-1, (3")
_CORE = (ops.attention, "scaled_dot_product_attention")


def _norms(change) -> dict[str, Rule]:
    """Every LayerNorm, as change(scope, x, name) computes it."""
    return {
        "visual.ln_pre": lambda s: change(s, s["visual.embedded"], "visual.ln_pre"),
        "visual.ln_post": lambda s: change(s, s["visual.pooled"], "visual.ln_post"),
        "resblock.ln_1": lambda s: change(s, s.input, ".ln_1"),
        "resblock.ln_2": lambda s: change(s, s[".residual"], ".ln_2"),
        "ln_final": lambda s: change(s, s.input, "ln_final"),
    }


def _norm(name: str, change) -> Mistake:
    return Mistake(name, _norms(change), ops.layer_norm, "F.layer_norm(")


def _unbiased(s: Scope, x: Tensor, name: str) -> Tensor:
    return _affine(s, (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-5).sqrt(), name)


def _affine(s: Scope, x: Tensor, name: str) -> Tensor:
    return x * s.weight(name + ".weight") + s.weight(name + ".bias")


def _rms(s: Scope, x: Tensor, name: str) -> Tensor:
    return _affine(s, x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt(), name)


def _eps_outside(s: Scope, x: Tensor, name: str) -> Tensor:
    return _affine(s, (x - x.mean(-1, keepdim=True)) / (x.std(-1, correction=0, keepdim=True) + 1e-5), name)


def _all_projected(s: Scope) -> Tensor:
    return F.linear(s[".ln_1"], s.weight(".attn.in_proj_weight"), s.weight(".attn.in_proj_bias"))


def _head_major(s: Scope, part: int) -> Tensor:
    """Rows taken as head 0's query, key, value, then head 1's, ..."""
    return _all_projected(s).unflatten(-1, (s.heads, 3, -1))[..., part, :].transpose(1, 2)


def _interleaved(s: Scope, part: int) -> Tensor:
    """A head's elements taken every H apart instead of side by side."""
    return s.projected(part).transpose(1, 2).flatten(2).unflatten(-1, (-1, s.heads)).permute(0, 3, 1, 2)


def _qkv(name: str, rules: tuple[Rule, ...], place: tuple = _SPLIT) -> Mistake:
    return Mistake(name, {f"resblock.attn.{x}": rule for x, rule in zip("qkv", rules, strict=True)}, *place)


def _no_bias(part: str) -> Mistake:
    rule = lambda s: s.projected("qkv".index(part), bias=False)  # noqa: E731
    return Mistake(f"bias of {part} missing", {f"resblock.attn.{part}": rule}, *_LINEAR)


def _parts(rule) -> tuple[Rule, ...]:
    """rule(scope, part) for queries, keys and values."""
    return tuple(lambda s, part=part: rule(s, part) for part in range(3))


def _attend(name: str, rule, place: tuple = _CORE) -> Mistake:
    return Mistake(name, {"resblock.attn.probabilities": rule}, *place)


def _scaled(s: Scope) -> Tensor:
    return s.scores() * s[".attn.q"].shape[-1] ** -0.5


def _only_earlier(s: Scope) -> Tensor:
    """Not even itself; the first token sees nothing, which makes it NaN."""
    return (_scaled(s) + s.mask(0)).softmax(-1)


def _late_mask(s: Scope) -> Tensor:
    return (_scaled(s) + s.mask()).softmax(-1) if not s.causal else _scaled(s).softmax(-1).tril()


def _causal_in_vision(s: Scope) -> Tensor:
    length = s[".attn.q"].shape[2]
    return (_scaled(s) + torch.full((length, length), -torch.inf).triu(1)).softmax(-1)


def _context(name: str, rule) -> Mistake:
    return Mistake(name, {"resblock.attn.context": rule}, ops.attention, "transpose(1, 2).flatten(2)")


def _mixed(s: Scope) -> Tensor:
    return s[".attn.probabilities"] @ s[".attn.v"]


def _block(name: str, stage: str, rule: Rule, place: tuple) -> Mistake:
    return Mistake(name, {f"resblock{stage}": rule}, *place)


def _activation(name: str, function) -> Mistake:
    right = (ops.quick_gelu, "torch.sigmoid(1.702")
    return _block(name, ".mlp.activation", lambda s: function(s[".mlp.c_fc"]), right)


_FIRST_HALF = (ResidualAttentionBlock, "x + self.attn(")
_SECOND_HALF = (ResidualAttentionBlock, "x + self.mlp(")
_HIDDEN = (MLP, "self.c_fc(")

TRANSFORMER = (
    _norm("LayerNorm's eps is 1e-6", lambda s, x, name: s.layer_norm(x, name, eps=1e-6)),
    _norm("LayerNorm's eps is 1e-12", lambda s, x, name: s.layer_norm(x, name, eps=1e-12)),
    _norm("LayerNorm's eps is 1e-3", lambda s, x, name: s.layer_norm(x, name, eps=1e-3)),
    _norm("LayerNorm adds eps to the deviation, not to the variance", _eps_outside),
    _norm("LayerNorm divides the variance by D - 1", _unbiased),
    _norm("RMSNorm: the mean is not subtracted", _rms),
    _norm("LayerNorm without weight and bias", lambda s, x, name: F.layer_norm(x, x.shape[-1:])),
    _norm("LayerNorm without bias", lambda s, x, name: s.layer_norm(x, name) - s.weight(name + ".bias")),
    _block("ln_1 missing", ".ln_1", lambda s: s.input, _FIRST_HALF),
    _block("ln_2 missing", ".ln_2", lambda s: s[".residual"], _SECOND_HALF),
    Mistake(
        "ln_1 and ln_2 swapped",
        {
            "resblock.ln_1": lambda s: s.layer_norm(s.input, ".ln_2"),
            "resblock.ln_2": lambda s: s.layer_norm(s[".residual"], ".ln_1"),
        },
        *_FIRST_HALF,
    ),
    _block("ln_2 of the block's input", ".ln_2", lambda s: s.layer_norm(s.input, ".ln_2"), _SECOND_HALF),
    _qkv("QKV head by head", _parts(_head_major)),
    _qkv("heads interleaved: d x H instead of H x d", _parts(_interleaved)),
    _qkv("K and V swapped", tuple(lambda s, i=i: s.projected(i) for i in (0, 2, 1))),
    _qkv("Q and K swapped", tuple(lambda s, i=i: s.projected(i) for i in (1, 0, 2))),
    _qkv("QKV in the order V, K, Q", tuple(lambda s, i=i: s.projected(i) for i in (2, 1, 0))),
    _qkv("QKV bias missing", _parts(lambda s, part: s.projected(part, bias=False)), _LINEAR),
    *(_no_bias(part) for part in "qkv"),
    _qkv("block's input not normed for QKV", _parts(lambda s, part: _of_input(s, part)), _FIRST_HALF),
    _attend("no 1/sqrt(d)", lambda s: (s.scores() + s.mask()).softmax(-1)),
    _attend("1/sqrt(D) instead of 1/sqrt(d)", lambda s: (s.scores() * s.stack.width**-0.5 + s.mask()).softmax(-1)),
    _attend("1/d instead of 1/sqrt(d)", lambda s: (s.scores() / s[".attn.q"].shape[-1] + s.mask()).softmax(-1)),
    _attend("no causal mask", lambda s: _scaled(s).softmax(-1), (ops.attention, "is_causal")),
    _attend("causal mask off by one: the next token is seen", lambda s: (_scaled(s) + s.mask(2)).softmax(-1)),
    _attend("causal mask off by one: a token doesn't see itself", _only_earlier),
    _attend(
        "causal mask transposed: only later tokens are seen",
        lambda s: (_scaled(s) + s.mask().T).softmax(-1),
    ),
    _attend("causal mask after the softmax", _late_mask),
    _attend("causal mask of zeros and ones, added", lambda s: (_scaled(s) + (s.mask() == 0)).softmax(-1)),
    _attend("causal mask in the image tower", _causal_in_vision),
    _attend("softmax over the queries", lambda s: (_scaled(s) + s.mask()).softmax(-2)),
    _attend("softmax missing", lambda s: _scaled(s) + s.mask().nan_to_num(neginf=0)),
    _context("heads side by side in the wrong order", lambda s: _mixed(s).permute(0, 2, 3, 1).flatten(2)),
    _context("heads not transposed back", lambda s: _mixed(s).reshape(_mixed(s).transpose(1, 2).flatten(2).shape)),
    _block(
        "attention's out_proj transposed",
        ".attn.out_proj",
        lambda s: s[".attn.context"] @ s.weight(".attn.out_proj.weight") + s.weight(".attn.out_proj.bias"),
        (Attention, "self.out_proj("),
    ),
    _block(
        "attention's out_proj without bias",
        ".attn.out_proj",
        lambda s: s.linear(s[".attn.context"], ".attn.out_proj", bias=False),
        (Attention, "self.out_proj("),
    ),
    _block("no residual around attention", ".residual", lambda s: s[".attn.out_proj"], _FIRST_HALF),
    _block("residual from ln_1's output", ".residual", lambda s: s[".ln_1"] + s[".attn.out_proj"], _FIRST_HALF),
    _block("MLP's c_fc without bias", ".mlp.c_fc", lambda s: s.linear(s[".ln_2"], ".mlp.c_fc", bias=False), _HIDDEN),
    _activation("GELU instead of QuickGELU", F.gelu),
    _activation("tanh-GELU instead of QuickGELU", lambda x: F.gelu(x, approximate="tanh")),
    _activation("SiLU instead of QuickGELU", F.silu),
    _activation("ReLU instead of QuickGELU", F.relu),
    _activation("QuickGELU instead of GELU", ops.quick_gelu)._replace(right=MLP, line="ops.ACTIVATIONS"),
    _activation("activation missing", lambda x: x)._replace(right=MLP, line="ops.ACTIVATIONS"),
    _block(
        "MLP's c_proj without bias",
        ".mlp.c_proj",
        lambda s: s.linear(s[".mlp.activation"], ".mlp.c_proj", bias=False),
        (MLP, "self.c_proj("),
    ),
    _block("no residual around the MLP", "", lambda s: s[".mlp.c_proj"], _SECOND_HALF),
    _block("residual from ln_2's output", "", lambda s: s[".ln_2"] + s[".mlp.c_proj"], _SECOND_HALF),
    _block("MLP added to the block's input", "", lambda s: s.input + s[".mlp.c_proj"], _SECOND_HALF),
)


def _of_input(s: Scope, part: int) -> Tensor:
    weight, bias = (s.weight(f".attn.in_proj_{kind}").chunk(3)[part] for kind in ("weight", "bias"))
    return s.cut(F.linear(s.input, weight, bias))
