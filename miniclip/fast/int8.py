"""Matrix products of eight-bit integers on a CPU, an opt-in: `load(..., dtype="int8")`.

The four weights of each transformer block are rounded to int8, each row with a scale of its own; activations are
rounded to uint8 while they are computed, with one scale and zero point for all tokens. What lies between is bfloat16
where the CPU multiplies bfloat16, otherwise float32. The model itself stays float32: its parameters, its state dict,
and the towers as `model.fast = False` runs them.

How close embeddings stay depends on the weights. Cosines with the float32 embeddings, the lowest of images and of
texts: tiny-ViT 0.9997 and 0.9998, tiny-RN's texts 0.9994, ViT-B/32 with random weights 0.9999 and 0.9992 (0.9988 with
the seven bits of `weight_limit`). Compare your model's before you rely on it.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor, nn

from miniclip.errors import UsageError
from miniclip.fast import half
from miniclip.fast.blocks import Arithmetic
from miniclip.fast.linear import ONEDNN_FORMS, ONEDNN_NAMES, ROWS, Linear
from miniclip.models.transformer import ResidualAttentionBlock


class Int8Linear(Linear):
    """A linear layer whose weight, and x while it is multiplied, have eight bits."""

    def __init__(self, weight, bias, dtype, weight_scale=1.0, bias_scale=1.0):  # of the types in Linear
        weight = weight.float() * weight_scale
        self.scales = (weight.abs().amax(dim=1) / weight_limit()).clamp_min(1e-30)
        rounded = (weight / self.scales[:, None]).round().to(torch.int8)
        self.weight = torch.ops.onednn.qlinear_prepack(rounded, [ROWS, weight.shape[1]])
        self.zeros = torch.zeros(len(weight), dtype=torch.int64)
        self.bias, self.dtype = None if bias is None else bias.float() * bias_scale, dtype

    def __call__(self, x: Tensor, activation: str = "none") -> Tensor:
        name = ONEDNN_NAMES.get(activation, activation)
        dtype = self.dtype if activation == "none" else torch.float32  # the next product would widen it to quantise it
        weight = self.weight, self.scales, self.zeros, self.bias
        return torch.ops.onednn.qlinear_pointwise.default(
            *quantize_activations(x), *weight, 1.0, 0, dtype, name, [], ONEDNN_FORMS.get(activation, "none")
        )

    def add(self, x: Tensor, total: Tensor) -> Tensor:
        weight = self.weight, self.scales, self.zeros
        return torch.ops.onednn.qlinear_pointwise.binary(
            *quantize_activations(x), *weight, total, self.bias, 1.0, 0, self.dtype, 1.0, 0, "add", 1.0, "none", [], ""
        )


def quantize_activations(x: Tensor) -> tuple[Tensor, float, int]:
    """x -> uint8, scale, zero point, with x = scale * (uint8 - zero point) up to rounding."""
    lowest, highest = (bound.item() for bound in torch.aminmax(x))
    lowest, highest = min(lowest, 0.0), max(highest, 0.0)  # 0 has to be among the values
    scale = max(highest - lowest, 1e-30) / 255
    zero = round(-lowest / scale)
    quantised = torch.quantize_per_tensor(x.float(), scale, zero, torch.quint8)
    integers = torch.empty(0, dtype=torch.uint8)  # the same memory: int_repr would copy it, one value at a time
    return integers.set_(quantised.untyped_storage(), 0, quantised.shape, quantised.stride()), scale, zero


@functools.cache
def weight_limit() -> int:
    """The largest absolute value of int8 weights. Without VNNI or AMX, processors add pairs of products in 16 bits,
    which overflow at 2 * 255 * 127: there weights have seven bits.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns once that it means to replace its quantised tensors
        quantize_activations(torch.ones(1, 1))
    weight = torch.ops.onednn.qlinear_prepack(torch.full((64, 64), 127, dtype=torch.int8), [ROWS, 64])
    x = torch.full((ROWS, 64), 255, dtype=torch.uint8)
    scales, zeros = torch.ones(64), torch.zeros(64, dtype=torch.int64)
    y = torch.ops.onednn.qlinear_pointwise.default(
        x, 1.0, 0, weight, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return 127 if bool((y == 64 * 255 * 127).all()) else 63


def arithmetic() -> Arithmetic:
    """What a tower with int8 products is computed in."""
    return Arithmetic(torch.bfloat16 if torch.bfloat16 in half.ONEDNN_DTYPES else torch.float32, Int8Linear)


def quantize(model: nn.Module) -> nn.Module:
    """Let a FastCLIP's inference on the CPU multiply in int8, in place.

    A ModifiedResNet has no blocks: only the model's texts become faster. Raises UsageError for a model that is not
    float32 on a CPU, or where PyTorch has no such products.
    """
    if any(p.dtype is not torch.float32 or p.device.type != "cpu" for p in model.parameters()):
        raise UsageError('expected a float32 model on the CPU: load(name, device="cpu", dtype=torch.float32)')
    if not hasattr(model, "int8") or not any(type(module) is ResidualAttentionBlock for module in model.modules()):
        raise UsageError("int8 is for the fast form of transformer blocks, and the model has none: use another dtype")
    if torch.float32 not in half.ONEDNN_DTYPES or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        raise UsageError("int8 needs oneDNN, which this PyTorch was built without: load the model in another dtype")
    model.forget()
    model.int8 = True
    return model
