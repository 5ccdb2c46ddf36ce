"""The text tower around its blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from miniclip.conformance.forward import Rule, Scope
from miniclip.conformance.mistakes.mistake import Mistake
from miniclip.conformance.mistakes.vit import misread
from miniclip.conformance.rules import positions, row
from miniclip.models.text import TextTransformer


def _end(s: Scope) -> Tensor:
    return s["text.ids"].argmax(-1)


def _end_in_half_precision(s: Scope) -> Tensor:
    """49406 and 49407 both round to 49408 in float16, and the first one counts."""
    return s["text.ids"].half().float().argmax(-1)


def _after_end(s: Scope) -> Tensor:
    return row(s["ln_final"], (_end(s) + 1) % s["ln_final"].shape[1])


def _last_end(s: Scope) -> Tensor:
    ids = s["text.ids"]
    return ids.shape[1] - 1 - ids.flip(1).argmax(-1)


def _mean_to_end(s: Scope) -> Tensor:
    ids = s["text.ids"]
    used = (torch.arange(ids.shape[1]) <= _end(s)[:, None])[..., None]
    return (s["ln_final"] * used).sum(1) / used.sum(1)


def _shifted(s: Scope, by: int) -> Tensor:
    return s["token_embedding"] + s.weight("positional_embedding").roll(by, 0)[: s["text.ids"].shape[1]]


def _embedded(name: str, rule: Rule) -> Mistake:
    return Mistake(name, {"text.embedded": rule}, TextTransformer, "+ self.positional_embedding")


def _pooled(name: str, rule: Rule) -> Mistake:
    return Mistake(name, {"text.pooled": rule}, TextTransformer, "argmax(")


TEXT = (
    Mistake(
        "token embeddings scaled by sqrt(D)",
        {"token_embedding": lambda s: _rows(s, s["text.ids"]) * s.config.text.transformer.width**0.5},
        TextTransformer,
        "self.token_embedding(",
    ),
    Mistake(
        "embeddings of ids one too low",
        {"token_embedding": lambda s: _rows(s, (s["text.ids"] - 1).clamp(min=0))},
        TextTransformer,
        "self.token_embedding(",
    ),
    Mistake(
        "embeddings of ids one too high",
        {"token_embedding": lambda s: _rows(s, s["text.ids"] + 1)},
        TextTransformer,
        "self.token_embedding(",
    ),
    _embedded("text without positions", lambda s: s["token_embedding"]),
    _embedded("text positions from 1 instead of 0", lambda s: _shifted(s, -1)),
    _embedded("text positions one late", lambda s: _shifted(s, 1)),
    _embedded("text: every token has position 0", lambda s: s["token_embedding"] + positions(s)[:1]),
    Mistake("ln_final missing", {"ln_final": lambda s: s.input}, TextTransformer, "self.ln_final("),
    _pooled("text pooled at the first token", lambda s: s["ln_final"][:, 0]),
    _pooled("text pooled at the last token, not the end-of-text token", lambda s: s["ln_final"][:, -1]),
    _pooled("text pooled before the end-of-text token", lambda s: row(s["ln_final"], _end(s) - 1)),
    _pooled("text pooled after the end-of-text token", _after_end),
    _pooled("text pooled at the last end-of-text token, not the first", lambda s: row(s["ln_final"], _last_end(s))),
    _pooled("end-of-text token searched in half precision", lambda s: row(s["ln_final"], _end_in_half_precision(s))),
    _pooled("text pooled: mean over all positions", lambda s: s["ln_final"].mean(1)),
    _pooled("text pooled: mean up to the end-of-text token", _mean_to_end),
    Mistake(
        "text_projection transposed",
        {"text_projection": lambda s: s["text.pooled"] @ misread(s, "text_projection")},
        TextTransformer,
        "@ self.text_projection",
    ),
)


def _rows(s: Scope, ids: Tensor) -> Tensor:
    weight = s.weight("token_embedding.weight")
    return weight[ids.long().clamp(max=len(weight) - 1)]
