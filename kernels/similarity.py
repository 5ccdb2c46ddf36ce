"""Zero-shot classification and search: the softmax of scaled cosine similarities over classes, and the k best classes.

Queries and classes need no unit length: the dot products are divided by their lengths in float32, so that nothing is
rounded between the embeddings and the probability. For similarity_topk a program holds some queries and goes through
its share of the classes tile by tile. It keeps each query's largest logit, its sum of exp(logit - largest), and its k
best classes so far. The N x M logits are never stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from miniclip.kernels import limits, tiles
from miniclip.kernels.dots import dots
from miniclip.kernels.eager import function_or_operator

NOTHING = tl.constexpr(-(2**63))  # less than any entry
DEPTH = 64  # how much of the embeddings' width is multiplied at a time


@triton.jit
def inverse_norm_kernel(X, OUT, n, width, stride, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """1 / max(|x|, 1e-12) for every row of X, in float32."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    squares = tl.zeros([ROWS], tl.float32)
    for start in range(0, width, DEPTH):
        d = start + tl.arange(0, DEPTH)
        inside = (rows < n)[:, None] & (d < width)[None, :]
        x = tl.load(X + rows.to(tl.int64)[:, None] * stride + d[None, :], inside, 0.0).to(tl.float32)
        squares += tl.sum(x * x, 1)
    tl.store(OUT + rows, 1.0 / tl.maximum(tl.sqrt(squares), 1e-12), rows < n)


@triton.jit
def logits_of(
    X, C, X_INVERSE, C_INVERSE, SCALE, rows, columns, n, m, width, stride_x, stride_c,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of the logits, [ROWS, COLUMNS] in float32, -inf beyond the last class."""
    cosines = dots(X, C, rows, columns, n, m, width, stride_x, stride_c, ROWS, COLUMNS, DEPTH)
    x_inverse = tl.load(X_INVERSE + rows, rows < n, 0.0)
    c_inverse = tl.load(C_INVERSE + columns, columns < m, 0.0)
    logits = cosines * x_inverse[:, None] * c_inverse[None, :] * tl.load(SCALE)
    return tl.where((columns < m)[None, :], logits, -float("inf"))


@triton.jit
def sortable(x):
    """float32 -> int32 in the same order, with NaN above everything, as torch.topk has it, and one zero."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def best_of(keys, ranks):
    """The best entry of each row, as in BEST below, and its rank. A key of -2^31 means that there is no class."""
    key = tl.max(keys, 1)
    rank = tl.max(tl.where(keys == key[:, None], ranks, -1), 1)
    return tl.where(key == -0x80000000, NOTHING, (key.to(tl.int64) << 32) | rank.to(tl.int64)), rank


@triton.jit
def statistics_kernel(
    X, C, X_INVERSE, C_INVERSE, SCALE, LARGEST, TOTAL, BEST, n, m, width, stride_x, stride_c, share,
    K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """LARGEST, TOTAL [N, splits] and BEST [N, splits, K] over `share` classes; K a power of two, or 0 for no BEST.

    An entry of BEST is a sortable logit in the upper 32 bits and, below, 2^31 - 1 - class: the maximum of such entries
    has the largest logit and, where logits are equal, the lowest class. Entries are unique.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    largest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if K > 0:
        best = tl.full([ROWS, K], NOTHING, tl.int64)
        worst = tl.full([ROWS], NOTHING, tl.int64)
    first = tl.program_id(1) * share
    end = tl.minimum(first + share, m)
    for start in range(first, end, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        logits = logits_of(
            X, C, X_INVERSE, C_INVERSE, SCALE, rows, columns, n, end, width, stride_x, stride_c, ROWS, COLUMNS, DEPTH
        )
        new_largest = tl.maximum(largest, tl.max(logits, 1))
        total = total * tl.exp(largest - new_largest) + tl.sum(tl.exp(logits - new_largest[:, None]), 1)
        largest = new_largest
        if K > 0:
            keys = tl.where((columns < end)[None, :], sortable(logits), -0x80000000)
            ranks = (0x7FFFFFFF - columns)[None, :]
            entry, rank = best_of(keys, ranks)
            while tl.max((entry > worst).to(tl.int32), 0) > 0:  # some row still has a class better than its worst
                better = (entry > worst)[:, None]
                # The worst entry is replaced. It is unique, or it is one of several NOTHING, and argmin takes one.
                replaced = better & (tl.arange(0, K)[None, :] == tl.argmin(best, 1)[:, None])
                best = tl.where(replaced, entry[:, None], best)
                worst = tl.min(best, 1)
                keys = tl.where(better & (ranks == rank[:, None]), -0x80000000, keys)
                entry, rank = best_of(keys, ranks)
    out = rows.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(LARGEST + out, largest, rows < n)
    tl.store(TOTAL + out, total, rows < n)
    if K > 0:
        tl.store(BEST + out[:, None] * K + tl.arange(0, K)[None, :], best, (rows < n)[:, None])


@triton.jit
def softmax_kernel(
    X, C, X_INVERSE, C_INVERSE, SCALE, LARGEST, TOTAL, OUT, n, m, width, stride_x, stride_c,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of OUT [N, M]: exp(logit - LARGEST) / TOTAL, with LARGEST and TOTAL [N]."""
    row_tiles = tl.cdiv(n, ROWS)  # a grid of one dimension: the second one ends at 65,535
    rows = tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) // row_tiles * COLUMNS + tl.arange(0, COLUMNS)
    logits = logits_of(
        X, C, X_INVERSE, C_INVERSE, SCALE, rows, columns, n, m, width, stride_x, stride_c, ROWS, COLUMNS, DEPTH
    )
    largest = tl.load(LARGEST + rows, rows < n, 0.0)
    total = tl.load(TOTAL + rows, rows < n, 1.0)
    probability = tl.exp(logits - largest[:, None]) / total[:, None]
    out = OUT + rows.to(tl.int64)[:, None] * m + columns[None, :]
    tl.store(out, probability, (rows < n)[:, None] & (columns < m)[None, :])


def similarity_softmax(x: Tensor, c: Tensor, logit_scale: Tensor) -> Tensor:
    """softmax(logit_scale * cosine(x, c)) over the classes.

    x [N, E], c [M, E]: of the same dtype, float16, bfloat16 or float32, and of any length: they are normalised here; a
    zero vector's cosines are 0. logit_scale: float32 scalar tensor, exp(model.logit_scale). Last strides must be 1.
    Returns float32 [N, M]. No gradient.
    """
    limits.require(limits.similarity_softmax(x, c, logit_scale))
    run = function_or_operator(_similarity_softmax, torch.ops.miniclip.similarity_softmax, x, c, logit_scale)
    return run(x, c, logit_scale)


def similarity_topk(x: Tensor, c: Tensor, logit_scale: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k best classes of `similarity_softmax`, without the N x M logits in memory.

    k: at most 16 and at most M. Returns (probability float32 [N, k], best first; index int64 [N, k]; lse float32 [N],
    the logarithm of the softmax's denominator). Where logits are equal the lower index comes first. A NaN counts as the
    largest logit, and makes the row's probabilities NaN.
    """
    limits.require(limits.similarity_topk(x, c, logit_scale, k))
    run = function_or_operator(_similarity_topk, torch.ops.miniclip.similarity_topk, x, c, logit_scale)
    return run(x, c, logit_scale, k)


def _tile(x: Tensor) -> tiles.Tile:
    table = tiles.SIMILARITY_FLOAT if x.dtype == torch.float32 else tiles.SIMILARITY
    return tiles.tile_for(table, x.device, len(x))


def _arguments(x: Tensor, c: Tensor, logit_scale: Tensor) -> tuple[list, list]:
    """The arguments that both kernels have before their outputs, and those that both have after them."""
    inverses = [x.new_empty(len(y), dtype=torch.float32) for y in (x, c)]
    for y, inverse in zip((x, c), inverses, strict=True):
        grid = (triton.cdiv(len(y), 16),)
        inverse_norm_kernel[grid](y, inverse, *y.shape, y.stride(0), ROWS=16, DEPTH=256, num_warps=4)
    return [x, c, *inverses, logit_scale], [len(x), *c.shape, x.stride(0), c.stride(0)]


def _statistics(inputs: list, sizes: list, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each query's largest logit and sum of exp(logit - largest), [N], and its best entries, at least k if k > 0."""
    x, (n, m) = inputs[0], sizes[:2]
    tile = _tile(x)
    row_tiles = triton.cdiv(n, tile.rows)
    share = triton.cdiv(triton.cdiv(m, max(1, tiles.PROGRAMS // row_tiles)), tile.columns) * tile.columns
    splits = triton.cdiv(m, share)
    largest, total = x.new_empty(2, n, splits, dtype=torch.float32)
    entries = triton.next_power_of_2(k) if k else 0
    best = x.new_empty(n, splits, entries, dtype=torch.int64)
    statistics_kernel[row_tiles, splits](
        *inputs, largest, total, best, *sizes, share,
        K=entries, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=DEPTH, **tile.options(),
    )  # fmt: skip
    overall = largest.amax(1)
    return overall, (total * (largest - overall[:, None]).exp()).sum(1), best.flatten(1)


def _similarity_softmax(x: Tensor, c: Tensor, logit_scale: Tensor) -> Tensor:
    if len(x) == 0:
        return _fake_similarity_softmax(x, c, logit_scale)
    with torch.cuda.device_of(x):
        inputs, sizes = _arguments(x, c, logit_scale)
        largest, total, _ = _statistics(inputs, sizes, 0)
        out = _fake_similarity_softmax(x, c, logit_scale)
        tile = _tile(x)
        softmax_kernel[triton.cdiv(len(x), tile.rows) * triton.cdiv(len(c), tile.columns),](
            *inputs, largest, total, out, *sizes,
            ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=DEPTH, **tile.options(),
        )  # fmt: skip
    return out


def _fake_similarity_softmax(x: Tensor, c: Tensor, logit_scale: Tensor) -> Tensor:
    return x.new_empty(len(x), len(c), dtype=torch.float32)


def _similarity_topk(x: Tensor, c: Tensor, logit_scale: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    if len(x) == 0:
        return _fake_similarity_topk(x, c, logit_scale, k)
    with torch.cuda.device_of(x):
        largest, total, best = _statistics(*_arguments(x, c, logit_scale), k)
    best = best.topk(k).values  # entries are unique: there are no ties for topk to settle as it likes
    bits = (best >> 32).to(torch.int32)
    logits = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)  # `sortable` undone
    probability = (logits - largest[:, None]).exp() / total[:, None]
    return probability, 0x7FFFFFFF - (best & 0xFFFFFFFF), largest + total.log()


def _fake_similarity_topk(x: Tensor, c: Tensor, logit_scale: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    probability = x.new_empty(len(x), k, dtype=torch.float32)
    return probability, probability.new_empty(len(x), k, dtype=torch.int64), probability.new_empty(len(x))


_softmax_operator = torch.library.custom_op("miniclip::similarity_softmax", _similarity_softmax, mutates_args=())
_softmax_operator.register_fake(_fake_similarity_softmax)
_topk_operator = torch.library.custom_op("miniclip::similarity_topk", _similarity_topk, mutates_args=())
_topk_operator.register_fake(_fake_similarity_topk)
