"""The symmetric contrastive loss (InfoNCE, CLIP paper, figure 3) and its gradient, with no N x N matrix in memory.

In the forward pass a program holds some rows of the logits and goes through the columns. For each row it keeps the
largest logit, the sum of exp(logit - largest) and the pair's logit. A second launch does the same for the columns: it
swaps images and texts. The backward pass computes the logits again, tile by tile, and from them the weights of the
other side's embeddings. There are no atomics: results do not vary from run to run.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from miniclip.kernels import limits, tiles
from miniclip.kernels.dots import dots
from miniclip.kernels.eager import function_or_operator

LN_2 = tl.constexpr(math.log(2))
LOG2_E = tl.constexpr(math.log2(math.e))  # logits are in units of log 2, because exp2 is the hardware's instruction
DEPTH = 64  # how much of the embeddings' width the forward pass multiplies at a time


@triton.jit
def statistics_kernel(
    A, B, SCALE, LARGEST, TOTAL, LOSS, n, width, stride_a, stride_b,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Each row's largest logit, its sum of exp2(logit - largest), and its cross-entropy. All [N]."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    scale = tl.load(SCALE) * LOG2_E
    # A running maximum: with `scale`, the largest logit that can be, in its place most sums would be denormal or zero.
    largest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    pair = tl.zeros([ROWS], tl.float32)
    for start in range(0, n, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        logits = scale * dots(A, B, rows, columns, n, n, width, stride_a, stride_b, ROWS, COLUMNS, DEPTH)
        pair += tl.sum(tl.where(rows[:, None] == columns[None, :], logits, 0.0), 1)
        logits = tl.where((columns < n)[None, :], logits, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(logits, 1))
        total = total * tl.exp2(largest - new_largest) + tl.sum(tl.exp2(logits - new_largest[:, None]), 1)
        largest = new_largest
    tl.store(LARGEST + rows, largest, rows < n)
    tl.store(TOTAL + rows, total, rows < n)
    tl.store(LOSS + rows, (largest - pair + tl.log2(total)) * LN_2, rows < n)


@triton.jit
def gradient_kernel(
    A, B, SCALE, GRAD, LARGEST_A, TOTAL_A, LARGEST_B, TOTAL_B, GRAD_A, GRAD_SCALE, n, width, stride_a, stride_b,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """GRAD_A [N, width], contiguous; GRAD_SCALE [N], what each row adds to the gradient of the scale."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    scale = tl.load(SCALE)
    a_inside = (rows < n)[:, None] & (d < width)[None, :]
    a = tl.load(A + rows.to(tl.int64)[:, None] * stride_a + d[None, :], a_inside, 0.0)
    # The largest logit and the sum are kept apart: at a scale of 100 the rounding of their logsumexp would show.
    largest_a = tl.load(LARGEST_A + rows, rows < n, 0.0)
    inverse_a = 1.0 / tl.load(TOTAL_A + rows, rows < n, 1.0)
    grad_a = tl.zeros([ROWS, WIDTH], tl.float32)
    grad_scale = tl.zeros([ROWS], tl.float32)
    for start in range(0, n, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        b_inside = (columns < n)[:, None] & (d < width)[None, :]
        b = tl.load(B + columns.to(tl.int64)[:, None] * stride_b + d[None, :], b_inside, 0.0)
        largest_b = tl.load(LARGEST_B + columns, columns < n, 0.0)
        inverse_b = 1.0 / tl.load(TOTAL_B + columns, columns < n, 1.0)
        cosines = tl.dot(a, tl.trans(b), input_precision="ieee")
        logits = cosines * (scale * LOG2_E)
        by_row = tl.exp2(logits - largest_a[:, None]) * inverse_a[:, None]
        by_column = tl.exp2(logits - largest_b[None, :]) * inverse_b[None, :]
        weights = by_row + by_column - tl.where(rows[:, None] == columns[None, :], 2.0, 0.0)
        weights = tl.where((columns < n)[None, :], weights, 0.0)
        grad_scale += tl.sum(weights * cosines, 1)
        grad_a = tl.dot(weights.to(b.dtype), b, grad_a, input_precision="ieee")
    factor = tl.load(GRAD) / (2 * n)
    out = GRAD_A + rows.to(tl.int64)[:, None] * width + d[None, :]
    tl.store(out, (grad_a * (factor * scale)).to(GRAD_A.dtype.element_ty), a_inside)
    tl.store(GRAD_SCALE + rows, grad_scale * factor, rows < n)


def contrastive_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE: each image picks its text out of the batch, each text its image. Differentiable, once.

    image, text: float16 or bfloat16 [N, E] of unit length, E at most 1024, last strides 1; row i of both is a pair.
    logit_scale: float32 scalar tensor, the multiplier of the cosines, exp(model.logit_scale). Returns a float32 scalar.
    Gradients of the embeddings are in their dtype, and so are the softmax's weights when they multiply embeddings.
    """
    limits.require(limits.contrastive_loss(image, text, logit_scale))
    operator = torch.ops.miniclip.contrastive_loss
    return function_or_operator(_contrastive_loss, operator, image, text, logit_scale)(image, text, logit_scale)[0]


def _contrastive_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the loss and, for the backward pass, `largest` and `total` [2, N]: the rows' and the columns'."""
    n, width = image.shape
    largest, total, losses = image.new_empty(3, 2, n, dtype=torch.float32)
    tile = tiles.tile_for(tiles.CONTRASTIVE, image.device, n)
    with torch.cuda.device_of(image):
        for side, (a, b) in enumerate(((image, text), (text, image))):
            statistics_kernel[triton.cdiv(n, tile.rows),](
                a, b, logit_scale, largest[side], total[side], losses[side], n, width, a.stride(0), b.stride(0),
                ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=DEPTH, **tile.options(),
            )  # fmt: skip
    return losses.mean(), largest.clone(), total.clone()


def _fake_contrastive_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    loss, statistics = image.new_empty((), dtype=torch.float32), image.new_empty(2, len(image), dtype=torch.float32)
    return loss, statistics, torch.empty_like(statistics)


def _contrastive_loss_backward(
    grad: Tensor, image: Tensor, text: Tensor, logit_scale: Tensor, largest: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    n, width = image.shape
    grads = [x.new_empty(x.shape) for x in (image, text)]
    grad_scale = largest.new_empty(2, n)
    tile = tiles.tile_for(tiles.CONTRASTIVE_GRADIENT, image.device, width)
    with torch.cuda.device_of(image):
        for side, (a, b) in enumerate(((image, text), (text, image))):
            gradient_kernel[triton.cdiv(n, tile.rows),](
                a, b, logit_scale, grad, largest[side], total[side], largest[1 - side], total[1 - side],
                grads[side], grad_scale[side], n, width, a.stride(0), b.stride(0),
                WIDTH=max(16, triton.next_power_of_2(width)), ROWS=tile.rows, COLUMNS=tile.columns, **tile.options(),
            )  # fmt: skip
    # The rows and the columns have the same sum; the mean of both is taken.
    return *grads, (grad_scale.sum() / 2).reshape(logit_scale.shape)


def _fake_contrastive_loss_backward(grad, image, text, logit_scale, largest, total) -> tuple[Tensor, Tensor, Tensor]:
    return image.new_empty(image.shape), text.new_empty(text.shape), logit_scale.new_empty(logit_scale.shape)


def _save(ctx, inputs, output) -> None:
    _, largest, total = output
    ctx.save_for_backward(*inputs, largest, total)
    ctx.mark_non_differentiable(largest, total)


def _backward(ctx, grad: Tensor, *_) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.miniclip.contrastive_loss_backward(grad, *ctx.saved_tensors)


_operator = torch.library.custom_op("miniclip::contrastive_loss", _contrastive_loss, mutates_args=())
_operator.register_fake(_fake_contrastive_loss)
_operator.register_autograd(_backward, setup_context=_save)
_backward_operator = torch.library.custom_op(
    "miniclip::contrastive_loss_backward", _contrastive_loss_backward, mutates_args=()
)
_backward_operator.register_fake(_fake_contrastive_loss_backward)
