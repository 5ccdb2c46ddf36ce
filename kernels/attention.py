"""Attention over packed queries, keys and values: softmax(q k^T / sqrt(d)) v, for dense batches and for packed texts.

Flash attention (Dao et al. 2022): a program holds some queries of one head and walks over the keys tile by tile. For
each query it keeps the largest logit so far, the sum of exp(logit - largest), and the sum of the values weighted so;
when a larger logit turns up, both sums are scaled down. The L x L logits never leave the chip.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from miniclip.kernels import tiles

LN_2 = tl.constexpr(math.log(2))


@triton.jit
def attention_kernel(
    Q, K, V, OUT, LSE, STARTS,
    stride_n, stride_l, stride_h,  # of Q, K and V, three views of one packed tensor
    length, heads, row_tiles,
    logits_scale,  # log2(e) / sqrt(d): logits are in units of log 2, because exp2 is what the hardware has
    CAUSAL: tl.constexpr, VARLEN: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) % row_tiles  # the row tiles of a head are neighbours: they share its keys in the L2 cache
    head = tl.program_id(0) // row_tiles % heads
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

    rows = tile * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    inside = (rows < length)[:, None] & (d < D)[None, :]
    q = tl.load(Q + inputs + rows.to(tl.int64)[:, None] * stride_l + d[None, :], inside, 0.0)
    largest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    values = tl.zeros([ROWS, BLOCK_D], tl.float32)
    end = tl.minimum(length, (tile + 1) * ROWS) if CAUSAL else length
    for start in range(0, end, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        offset = inputs + columns.to(tl.int64) * stride_l
        # What lies past the end must read as zero: it gets a weight of zero, and zero times NaN would be NaN.
        k = tl.load(K + offset[None, :] + d[:, None], (columns < length)[None, :] & (d < D)[:, None], 0.0)
        v = tl.load(V + offset[:, None] + d[None, :], (columns < length)[:, None] & (d < D)[None, :], 0.0)
        logits = tl.dot(q, k, input_precision="ieee") * logits_scale
        visible = (columns < length)[None, :]
        if CAUSAL:
            visible = visible & (columns[None, :] <= rows[:, None])
        logits = tl.where(visible, logits, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(logits, 1))  # finite: every row sees column 0, in the first tile
        weights = tl.exp2(logits - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(weights, 1)
        values = tl.dot(weights.to(v.dtype), v, values * shrink[:, None], input_precision="ieee")
        largest = new_largest

    out = OUT + (rows.to(tl.int64)[:, None] * heads + head) * D + d[None, :]
    tl.store(out, (values / total[:, None]).to(OUT.dtype.element_ty), inside)
    if not VARLEN:
        tl.store(LSE + rows, (largest + tl.log2(total)) * LN_2, rows < length)


def attention(qkv: Tensor, causal: bool = False) -> Tensor:
    """Multi-head softmax(q k^T / sqrt(d)) v over packed projections; differentiable, once.

    qkv: float16 or bfloat16 [N, L, 3, H, d], read in place: any strides, but the last must be 1. d: a multiple of 8
    from 32 to 128. causal: token i sees tokens 0..i only. Returns [N, L, H * d] in qkv's dtype.
    """
    _check(qkv, "[N, L, 3, H, d]")
    out, _ = torch.ops.miniclip.attention(qkv, causal)
    return out.flatten(2)


def attention_varlen(qkv: Tensor, cu_seqlens: Tensor, max_len: int, causal: bool = False) -> Tensor:
    """Attention within each of many sequences that stand one after the other, without padding; no gradient.

    qkv: float16 or bfloat16 [T, 3, H, d], as `attention` takes it. cu_seqlens: int32 [N + 1] on the same device, from 0
    to T: sequence i is rows cu_seqlens[i] to cu_seqlens[i + 1]. max_len: at least the longest sequence's length. The
    kernel cannot check that without waiting for the GPU: a longer sequence's last rows would be left unwritten.
    Returns [T, H * d].
    """
    _check(qkv, "[T, 3, H, d]")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or cu_seqlens.device != qkv.device:
        got = f"{cu_seqlens.dtype} {list(cu_seqlens.shape)} on {cu_seqlens.device}"
        raise ValueError(f"cu_seqlens is {got}; expected torch.int32 [N + 1] on {qkv.device}")
    return torch.ops.miniclip.attention_varlen(qkv, cu_seqlens, max_len, causal).flatten(1)


def _check(qkv: Tensor, shape: str) -> None:
    if qkv.ndim != shape.count(",") + 1 or qkv.shape[-3] != 3:
        raise ValueError(f"qkv has shape {list(qkv.shape)}; expected {shape}")
    if qkv.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f'qkv is {qkv.dtype}; the kernel takes float16 and bfloat16: cast it, or use backend="torch"')
    if qkv.shape[-1] % 8 or not 32 <= qkv.shape[-1] <= 128:
        expected = "a multiple of 8 from 32 to 128"
        raise ValueError(f'the head dimension is {qkv.shape[-1]}; the kernel takes {expected}: use backend="torch"')
    if qkv.stride(-1) != 1:
        raise ValueError(f"qkv has a last stride of {qkv.stride(-1)}; expected 1: call .contiguous() on it")


def launch(qkv: Tensor, out: Tensor, lse: Tensor, starts: Tensor, sequences: int, length: int, causal: bool) -> None:
    """Run the kernel. qkv [..., 3, H, d]; starts has no elements for a dense batch, lse none for packed sequences."""
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
            CAUSAL=causal, VARLEN=varlen, D=d, BLOCK_D=triton.next_power_of_2(d), ROWS=tile.rows, COLUMNS=tile.columns,
            **tile.options(),
        )  # fmt: skip


@torch.library.custom_op("miniclip::attention", mutates_args=())
def _attention(qkv: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse = _fake_attention(qkv, causal)
    launch(qkv, out, lse, qkv.new_empty(0, dtype=torch.int32), len(qkv), qkv.shape[1], causal)
    return out, lse


@_attention.register_fake
def _fake_attention(qkv: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    n, length, _, heads, d = qkv.shape
    return qkv.new_empty(n, length, heads, d), qkv.new_empty(n, heads, length, dtype=torch.float32)


@torch.library.custom_op("miniclip::attention_varlen", mutates_args=())
def _attention_varlen(qkv: Tensor, cu_seqlens: Tensor, max_len: int, causal: bool) -> Tensor:
    out = _fake_attention_varlen(qkv, cu_seqlens, max_len, causal)
    launch(qkv, out, qkv.new_empty(0, dtype=torch.float32), cu_seqlens, len(cu_seqlens) - 1, max_len, causal)
    return out


@_attention_varlen.register_fake
def _fake_attention_varlen(qkv: Tensor, cu_seqlens: Tensor, max_len: int, causal: bool) -> Tensor:
    total, _, heads, d = qkv.shape
    return qkv.new_empty(total, heads, d)


def _save(ctx, inputs, output) -> None:
    (qkv, ctx.causal), (out, lse) = inputs, output
    ctx.save_for_backward(qkv, out, lse)
    ctx.mark_non_differentiable(lse)


def _backward(ctx, grad_out: Tensor, _) -> tuple[Tensor, None]:
    """PyTorch's flash attention computes the gradient from our output and logsumexp. Its kernels want [N, H, L, d]."""
    qkv, out, lse = ctx.saved_tensors
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    grad_out, out = grad_out.transpose(1, 2), out.transpose(1, 2)
    if qkv.is_cuda:
        length, unused = qkv.shape[1], lse.new_empty(2, dtype=torch.uint64)  # a dropout's seed; there is none
        grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad_out, q, k, v, out, lse, None, None, length, length, 0.0, ctx.causal, unused, unused
        )
    else:
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, q, k, v, out, lse, 0.0, ctx.causal
        )
    return torch.stack(grads).permute(1, 3, 0, 2, 4), None


_attention.register_autograd(_backward, setup_context=_save)
