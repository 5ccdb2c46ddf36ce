"""Finding out where NaN or infinity came from."""

from __future__ import annotations

import torch
from torch import Tensor

from miniclip.errors import MiniclipError
from miniclip.models import CLIP


class TrainingDivergedError(MiniclipError, ArithmeticError):
    """The loss or the gradient is no longer a finite number."""

    def __init__(self, step: int, loss: float, norm: float, cause: str):
        super().__init__(
            f"step {step}: the loss is {loss:.4g}, the gradient's norm {norm:.4g}; not finite: {cause}. The last "
            "checkpoint is from before it. Try a lower --lr, a longer --warmup, a smaller --clip, or more precision: "
            "--precision bf16 instead of fp16, fp32 instead of bf16"
        )


@torch.no_grad()
def explain(model: CLIP, images: Tensor, texts: Tensor) -> str:
    """Name the first tensor that is not finite, in the order in which a step computes them.

    Call it after the backward pass that failed, with the same precision.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"the weights {name}, since an earlier step"
    if not images.isfinite().all():
        return "the pixels"
    for name, embed, inputs in (("image", model.encode_image, images), ("text", model.encode_text, texts)):
        module = _first_not_finite(model, embed, inputs)
        if module:
            return f"the output of {module}, in the {name} tower"
        if not embed(inputs, normalize=True).isfinite().all():
            return f"the {name} embeddings divided by their lengths: one of them is zero"
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return f"the gradient of {name}, although all activations are finite"
    return "the loss, although the embeddings are finite"


def _first_not_finite(model: CLIP, embed, inputs: Tensor) -> str:
    """The name of the first module, in the order of execution, with an output that is not finite; "" if none has."""
    found: list[str] = []
    hooks = []
    for name, module in model.named_modules():
        if not list(module.children()):  # the innermost modules, whose outputs are computed first

            def hook(module, args, output, name=name):
                if isinstance(output, Tensor) and not output.isfinite().all():
                    found.append(name)

            hooks.append(module.register_forward_hook(hook))
    try:
        output = embed(inputs)
    finally:
        for handle in hooks:
            handle.remove()
    if found:
        return found[0]
    return "" if output.isfinite().all() else "the last projection"
