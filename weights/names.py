"""Tensor names: OpenAI's are canonical, and other layouts come in and go out through the tables below.

Each row is used in both directions. In names, `#` stands for a layer's number, `*` for weight or bias and `**` for any
rest, the same on both sides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from miniclip.weights.errors import CheckpointError


class Transform(NamedTuple):
    to_canonical: Callable[..., Tensor]  # takes as many tensors as the row has foreign names
    from_canonical: Callable[[Tensor, int], Tensor]  # gives the one for the i-th foreign name


def concatenated(*tensors: Tensor) -> Tensor:
    """`torch.cat`. On the meta device, where it would import a compiler, only the shape is found."""
    first, size = tensors[0], sum(map(len, tensors))
    if not first.is_meta:
        return torch.cat(tensors)
    if any(tensor.shape[1:] != first.shape[1:] for tensor in tensors):
        raise ValueError("the tensors' other sizes differ")
    return torch.empty(size, *first.shape[1:], dtype=first.dtype, device="meta")


SAME = Transform(lambda x: x, lambda x, i: x)
TRANSPOSE = Transform(lambda x: x.transpose(0, -1), lambda x, i: x.transpose(0, -1))  # a view
CONCAT3 = Transform(concatenated, lambda qkv, i: qkv.chunk(3)[i])  # all rows of q, k, then v
# LongCLIP adds the first table of positions up to the 20th token, and the second one from there on.
LONG = Transform(lambda first, rest: concatenated(first[:20], rest[20:]), lambda x, i: x)
SCALAR = Transform(lambda x: x.squeeze(), lambda x, i: x)  # some of OpenCLIP's scalars are stored as [1]


class Row(NamedTuple):
    canonical: str
    foreign: tuple[str, ...]
    transform: Transform


Table = tuple[Row, ...]


def _row(canonical: str, *foreign: str, transform: Transform = SAME) -> Row:
    return Row(canonical, foreign, transform)


OPENAI = (
    _row("logit_scale", "logit_scale", transform=SCALAR),
    _row("**", "**"),
)

# OpenAI's, with 248 positions in two tables.
LONGCLIP = (_row("positional_embedding", "positional_embedding", "positional_embedding_res", transform=LONG), *OPENAI)

# OpenCLIP's CustomTextCLIP. Its plain CLIP has OpenAI's names.
OPENCLIP = (
    _row("logit_scale", "logit_scale", transform=SCALAR),
    _row("token_embedding.weight", "text.token_embedding.weight"),
    _row("positional_embedding", "text.positional_embedding"),
    _row("transformer.**", "text.transformer.**"),
    _row("ln_final.*", "text.ln_final.*"),
    _row("text_projection", "text.text_projection"),
    _row("visual.**", "visual.**"),
)

_HUGGINGFACE_BLOCK = (
    _row("ln_1.*", "layer_norm1.*"),
    _row("attn.in_proj_*", "self_attn.q_proj.*", "self_attn.k_proj.*", "self_attn.v_proj.*", transform=CONCAT3),
    _row("attn.out_proj.*", "self_attn.out_proj.*"),
    _row("ln_2.*", "layer_norm2.*"),
    _row("mlp.c_fc.*", "mlp.fc1.*"),
    _row("mlp.c_proj.*", "mlp.fc2.*"),
)


def huggingface_blocks(canonical: str, foreign: str) -> list[Row]:
    """The rows of a stack of blocks, with what stands before their names."""
    return [Row(canonical + c, tuple(foreign + name for name in f), t) for c, f, t in _HUGGINGFACE_BLOCK]


# transformers' CLIPModel, which has no ResNets.
HUGGINGFACE = (
    _row("logit_scale", "logit_scale", transform=SCALAR),
    _row("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    _row("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    *huggingface_blocks("transformer.resblocks.#.", "text_model.encoder.layers.#."),
    _row("ln_final.*", "text_model.final_layer_norm.*"),
    _row("text_projection", "text_projection.weight", transform=TRANSPOSE),
    _row("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    _row("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    _row("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    _row("visual.ln_pre.*", "vision_model.pre_layrnorm.*"),  # sic
    *huggingface_blocks("visual.transformer.resblocks.#.", "vision_model.encoder.layers.#."),
    _row("visual.ln_post.*", "vision_model.post_layernorm.*"),
    _row("visual.proj", "visual_projection.weight", transform=TRANSPOSE),
)

LAYOUTS = {"openai": OPENAI, "longclip": LONGCLIP, "openclip": OPENCLIP, "huggingface": HUGGINGFACE}

# Tensors in files that are no weights: numbers that are in the config, and constants. They are not read or written.
IGNORED = frozenset(
    {
        *("input_resolution", "context_length", "vocab_size", "attn_mask"),  # OpenAI
        *("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"),  # transformers before 4.31
    }
)

# What all names begin with of a model that was wrapped, compiled, or an attribute of a module. Dropped when read.
WRAPPERS = ("module.", "_orig_mod.", "model.", "clip.", "base_model.model.")


def layout_of(names: Iterable[str]) -> str:
    """The layout, a key of `LAYOUTS`, that a file's tensor names are in: OpenAI's, unless they show another one."""
    names = set(names)
    if "vision_model.pre_layrnorm.weight" in names or "text_model.embeddings.token_embedding.weight" in names:
        return "huggingface"
    if "positional_embedding_res" in names:
        return "longclip"
    return "openclip" if "text.token_embedding.weight" in names else "openai"


class Converted(Mapping[str, Tensor]):
    """Tensors under other names. Each is read and converted whenever it is asked for, and none is kept.

    A tensor that is only renamed or transposed is a view of the source's.
    """

    def __init__(self, tensors: Mapping[str, Tensor], plan: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]]):
        self._tensors = tensors
        self._plan = plan  # name: (function, names of its arguments in `tensors`)

    def __getitem__(self, name: str) -> Tensor:
        return self._convert(name, lambda tensor: tensor)

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self._plan

    def __iter__(self) -> Iterator[str]:
        return iter(self._plan)

    def __len__(self) -> int:
        return len(self._plan)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor. No values are read from memory-mapped sources."""
        return {name: tuple(self._convert(name, lambda tensor: tensor.to("meta")).shape) for name in self._plan}

    def _convert(self, name: str, view: Callable[[Tensor], Tensor]) -> Tensor:
        function, sources = self._plan[name]
        if isinstance(self._tensors, Converted):
            tensors = [self._tensors._convert(source, view) for source in sources]
        else:
            tensors = [view(self._tensors[source]) for source in sources]
        try:
            return function(*tensors)
        except CheckpointError:
            raise
        except (RuntimeError, IndexError, ValueError, TypeError):
            got = ", ".join(f"{source} {list(t.shape)}" for source, t in zip(sources, tensors, strict=True))
            raise CheckpointError(f"{name} can't be made from tensors of these shapes: {got}") from None


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, without reading values from a file."""
    if isinstance(tensors, Converted):
        return tensors.shapes()
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def to_canonical(layout: str, tensors: Mapping[str, Tensor], table: Table | None = None) -> Converted:
    """OpenAI's names for tensors that are named as in `layout`, a key of `LAYOUTS` unless its `table` is given.

    CheckpointError lists names that the layout does not have, or that are missing beside the ones it goes with.
    """
    plan, names = {}, set(tensors)
    for row, filling in _rows(layout, table, tensors, lambda row: row.foreign):
        sources = tuple(_fill(name, filling) for name in row.foreign)
        plan[_fill(row.canonical, filling)] = (row.transform.to_canonical, sources)
    _refuse("missing", layout, [name for _, sources in plan.values() for name in sources if name not in names])
    return Converted(tensors, plan)


def from_canonical(layout: str, tensors: Mapping[str, Tensor], table: Table | None = None) -> Converted:
    """The names of `layout`, a key of `LAYOUTS` unless its `table` is given, for tensors that have OpenAI's.

    CheckpointError lists names that have no place in the layout.
    """
    plan = {}
    for row, filling in _rows(layout, table, tensors, lambda row: (row.canonical,)):
        for i, name in enumerate(row.foreign):
            plan[_fill(name, filling)] = (partial(row.transform.from_canonical, i=i), (_fill(row.canonical, filling),))
    return Converted(tensors, plan)


def _rows(
    layout: str, table: Table | None, names: Iterable[str], side: Callable[[Row], tuple[str, ...]]
) -> dict[tuple, None]:
    """The rows that `names` of one side belong to, each with what its wildcards stand for; in order, none twice."""
    found, unknown = {}, []
    for name in names:
        if name in IGNORED:
            continue
        for row in table or LAYOUTS[layout]:
            match = next(filter(None, (_regex(pattern).fullmatch(name) for pattern in side(row))), None)
            if match:
                found[row, match.groups()] = None
                break
        else:
            unknown.append(name)
    _refuse("unknown", layout, unknown)
    return found


@cache
def _regex(pattern: str) -> re.Pattern:
    pattern = re.escape(pattern).replace(r"\*\*", "(.+)").replace(r"\*", "(weight|bias)")
    return re.compile(pattern.replace(r"\#", r"(\d+)"))


def _fill(pattern: str, filling: tuple[str, ...]) -> str:
    pieces = iter(filling)
    return re.sub(r"\*\*|\*|#", lambda _: next(pieces), pattern)


def _refuse(fault: str, layout: str, names: list[str]) -> None:
    if names:
        raise CheckpointError(f"tensors {fault} in the {layout} layout of a CLIP, {len(names)} in all:{listed(names)}")


def listed(lines: list[str], most: int = 20) -> str:
    """Indented lines for an error message, of which a long list shows only the first."""
    more = [f"... and {len(lines) - most} more"] if len(lines) > most else []
    return "".join(f"\n    {line:.300}" for line in lines[:most] + more)
