"""The matrix product inside the kernels that never store it: one tile of x y^T, added up in float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dots(
    X, Y, rows, columns, n, m, width, stride_x, stride_y,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """x_row . y_column for X [n, width] and Y [m, width]: [ROWS, COLUMNS], 0 where either is beyond the end.

    Half-precision products are exact in float32; "ieee" keeps float32 inputs from being cut to TF32.
    """
    x_row = X + rows.to(tl.int64)[:, None] * stride_x
    y_column = Y + columns.to(tl.int64)[None, :] * stride_y
    out = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, width, DEPTH):
        d = start + tl.arange(0, DEPTH)
        x = tl.load(x_row + d[None, :], (rows < n)[:, None] & (d < width)[None, :], 0.0)
        y = tl.load(y_column + d[:, None], (columns < m)[None, :] & (d < width)[:, None], 0.0)
        out = tl.dot(x, y, out, input_precision="ieee")
    return out
