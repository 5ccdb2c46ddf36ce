"""Attention over packed queries, keys and values: softmax(q k^T / sqrt(d)) v, for dense batches and for packed texts.

Flash attention (Dao et al. 2022): a program holds some queries of one head and goes through the keys tile by tile. For
each query it keeps the largest logit so far, the sum of exp(logit - largest), and the sum of the values weighted by
that; when a larger logit is found, both sums are scaled down. The L x L logits are never stored. A short sequence has
one tile of keys, which needs neither the loop nor the scaling.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from miniclip.kernels import limits, tiles
from miniclip.kernels.eager import function_or_operator

LN_2 = tl.constexpr(math.log(2))
MAX_BACKWARD_BATCH = 65_535  # of PyTorch's flash backward: the size of a grid's second dimension


@triton.jit
def load_tokens(X, tokens, d, stride, length, D: tl.constexpr, MASKED: tl.constexpr):
    """Rows `tokens` of X [length, D]. With MASKED those past the end are zero, not what lies there: they are multiplied
    by weights of zero, and zero times NaN would be NaN."""
    pointers = X + tokens.to(tl.int64)[:, None] * stride + d[None, :]
    if MASKED:
        return tl.load(pointers, (tokens < length)[:, None] & (d < D)[None, :], 0.0)
    if d.shape[0] > D:
        return tl.load(pointers, (d < D)[None, :], 0.0)
    return tl.load(pointers)


@triton.jit
def products(q, K, columns, d, rows, stride, length, D: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr):
    """q k^T for a tile of keys, -inf where the query must not see the key."""
    k = load_tokens(K, columns, d, stride, length, D, MASKED)
    logits = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        visible = (columns < length)[None, :]
        if CAUSAL:
            visible = visible & (columns[None, :] <= rows[:, None])
        logits = tl.where(visible, logits, -float("inf"))
    return logits


@triton.jit
def add_keys(
    largest, total, values, q, K, V, start, end, rows, d, stride, length, scale,
    D: tl.constexpr, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The statistics of each query after the keys from start to end."""
    for first in range(start, end, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        logits = products(q, K, columns, d, rows, stride, length, D, CAUSAL, MASKED)
        # Finite: every query sees key 0, which is in the first tile.
        new_largest = tl.maximum(largest, tl.max(logits, 1) * scale)
        weights = tl.exp2(logits * scale - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        v = load_tokens(V, columns, d, stride, length, D, MASKED)
        total = total * shrink + tl.sum(weights, 1)
        values = tl.dot(weights.to(v.dtype), v, values * shrink[:, None], input_precision="ieee")
        largest = new_largest
    return largest, total, values


# Otherwise Triton would compile again for lengths and counts that are multiples of 16, and for a length of 1.
@triton.jit(do_not_specialize=["length"], do_not_specialize_on_alignment=["row_tiles"])
def attention_kernel(
    Q, K, V, OUT, LSE, STARTS,
    stride_n, stride_l, stride_h,  # of Q, K and V, three views of one packed tensor
    length, heads, row_tiles,
    scale,  # log2(e) / sqrt(d): logits are in units of log 2, because exp2 is the hardware's instruction
    CAUSAL: tl.constexpr, VARLEN: tl.constexpr, ONE_TILE: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) % row_tiles  # the row tiles of a head are neighbours: they share its keys in the L2 cache
    head = (tl.program_id(0) // row_tiles % heads).to(tl.int64)
    sequence = (tl.program_id(0) // row_tiles // heads).to(tl.int64)

    if VARLEN:  # OUT [T, H, D]
        first = tl.load(STARTS + sequence).to(tl.int64)
        length = (tl.load(STARTS + sequence + 1) - first).to(tl.int32)
        if tile * ROWS >= length:
            return
        inputs = first * stride_l + head * stride_h
        OUT += first * heads * D
    else:  # OUT [N, L, H, D], LSE [N, H, L]
        inputs = sequence * stride_n + head * stride_h
        OUT += sequence * length * heads * D
        LSE += (sequence * heads + head) * length

    K += inputs
    V += inputs
    rows = tile * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    q = load_tokens(Q + inputs, rows, d, stride_l, length, D, True)
    if ONE_TILE:  # length <= COLUMNS
        columns = tl.arange(0, COLUMNS)
        logits = products(q, K, columns, d, rows, stride_l, length, D, CAUSAL, True)
        v = load_tokens(V, columns, d, stride_l, length, D, True)
        largest = tl.max(logits, 1) * scale
        weights = tl.exp2(logits * scale - largest[:, None])
        total = tl.sum(weights, 1)
        values = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    else:
        largest = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        values = tl.zeros([ROWS, BLOCK_D], tl.float32)
        if CAUSAL:  # only the tiles on the diagonal, and the last one, need a mask
            whole = tile * ROWS // COLUMNS * COLUMNS
            end = tl.minimum(length, (tile + 1) * ROWS)
        else:
            whole = length // COLUMNS * COLUMNS
            end = length
        largest, total, values = add_keys(
            largest, total, values, q, K, V, 0, whole, rows, d, stride_l, length, scale, D, COLUMNS, CAUSAL, False
        )
        largest, total, values = add_keys(
            largest, total, values, q, K, V, whole, end, rows, d, stride_l, length, scale, D, COLUMNS, CAUSAL, True
        )

    out = OUT + (rows.to(tl.int64)[:, None] * heads + head) * D + d[None, :]
    tl.store(out, (values / total[:, None]).to(OUT.dtype.element_ty), (rows < length)[:, None] & (d < D)[None, :])
    if not VARLEN:
        tl.store(LSE + rows, (largest + tl.log2(total)) * LN_2, rows < length)


def attention(qkv: Tensor, causal: bool = False) -> Tensor:
    """Multi-head softmax(q k^T / sqrt(d)) v over packed projections; differentiable, once.

    qkv: float16 or bfloat16 [N, L, 3, H, d], read in place: any strides, but the last must be 1. d: a multiple of 8
    from 32 to 128. causal: token i sees tokens 0..i only. Returns [N, L, H * d] in qkv's dtype.
    """
    limits.require(limits.attention(qkv))
    run = function_or_operator(_attention, torch.ops.miniclip.attention, qkv)
    return run(qkv, causal)[0].flatten(2)


def attention_varlen(qkv: Tensor, cu_seqlens: Tensor, max_len: int, causal: bool = False) -> Tensor:
    """Attention within each of many sequences that are packed one after the other, without padding; no gradient.

    qkv: float16 or bfloat16 [T, 3, H, d], as `attention` takes it. cu_seqlens: int32 [N + 1] on the same device, from 0
    to T: sequence i is rows cu_seqlens[i] to cu_seqlens[i + 1]. max_len: at least the longest sequence's length. The
    kernel cannot check that without waiting for the GPU: a longer sequence's last rows would be left unwritten.
    Returns [T, H * d].
    """
    limits.require(limits.attention_varlen(qkv, cu_seqlens, max_len))
    run = function_or_operator(_attention_varlen, torch.ops.miniclip.attention_varlen, qkv, cu_seqlens)
    return run(qkv, cu_seqlens, max_len, causal).flatten(1)


def launch(qkv: Tensor, out: Tensor, lse: Tensor, starts: Tensor, sequences: int, length: int, causal: bool) -> None:
    """Run the kernel. qkv [..., 3, H, d]; starts has no elements for a dense batch, lse none for packed sequences."""
    if out.numel() == 0:
        return
    heads, d = qkv.shape[-2:]
    q, k, v = qkv.unbind(-3)
    tile = tiles.tile_for(tiles.ATTENTION if d <= 64 else tiles.ATTENTION_WIDE, qkv.device, length)
    row_tiles = triton.cdiv(length, tile.rows)
    varlen = qkv.ndim == 4
    with torch.cuda.device_of(qkv):  # the kernel runs on the current device, which need not be qkv's
        attention_kernel[sequences * heads * row_tiles,](
            q, k, v, out, lse, starts,
            0 if varlen else q.stride(0), q.stride(-3), q.stride(-2),
            length, heads, row_tiles, math.log2(math.e) * d**-0.5,
            CAUSAL=causal, VARLEN=varlen, ONE_TILE=length <= tile.columns, D=d, BLOCK_D=triton.next_power_of_2(d),
            ROWS=tile.rows, COLUMNS=tile.columns, **tile.options(),
        )  # fmt: skip


def _attention(qkv: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse = _fake_attention(qkv, causal)
    launch(qkv, out, lse, qkv.new_empty(0, dtype=torch.int32), len(qkv), qkv.shape[1], causal)
    return out, lse


def _fake_attention(qkv: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    n, length, _, heads, d = qkv.shape
    return qkv.new_empty(n, length, heads, d), qkv.new_empty(n, heads, length, dtype=torch.float32)


def _attention_varlen(qkv: Tensor, cu_seqlens: Tensor, max_len: int, causal: bool) -> Tensor:
    out = _fake_attention_varlen(qkv, cu_seqlens, max_len, causal)
    launch(qkv, out, qkv.new_empty(0, dtype=torch.float32), cu_seqlens, len(cu_seqlens) - 1, max_len, causal)
    return out


def _fake_attention_varlen(qkv: Tensor, cu_seqlens: Tensor, max_len: int, causal: bool) -> Tensor:
    total, _, heads, d = qkv.shape
    return qkv.new_empty(total, heads, d)


def _save(ctx, inputs, output) -> None:
    (qkv, ctx.causal), (out, lse) = inputs, output
    ctx.save_for_backward(qkv, out, lse)
    ctx.mark_non_differentiable(lse)


def _backward(ctx, grad_out: Tensor, _) -> tuple[Tensor, None]:
    if grad_out.numel() == 0:
        return torch.zeros_like(ctx.saved_tensors[0]), None
    batches = zip(*(x.split(MAX_BACKWARD_BATCH) for x in (grad_out, *ctx.saved_tensors)), strict=True)
    grads = [_flash_backward(*batch, ctx.causal) for batch in batches]
    return (grads[0] if len(grads) == 1 else torch.cat(grads)), None


def _flash_backward(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, causal: bool) -> Tensor:
    """PyTorch's flash attention computes the gradient from our output and logsumexp. Its kernels want [N, H, L, d]."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    grad_out, out = grad_out.transpose(1, 2), out.transpose(1, 2)
    if qkv.is_cuda:
        length, unused = qkv.shape[1], lse.new_empty(2, dtype=torch.uint64)  # a dropout's seed; there is none
        grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad_out, q, k, v, out, lse, None, None, length, length, 0.0, causal, unused, unused
        )
    else:
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, q, k, v, out, lse, 0.0, causal
        )
    return torch.stack(grads).permute(1, 3, 0, 2, 4)


_operator = torch.library.custom_op("miniclip::attention", _attention, mutates_args=())
_operator.register_fake(_fake_attention)
_operator.register_autograd(_backward, setup_context=_save)
_varlen_operator = torch.library.custom_op("miniclip::attention_varlen", _attention_varlen, mutates_args=())
_varlen_operator.register_fake(_fake_attention_varlen)
