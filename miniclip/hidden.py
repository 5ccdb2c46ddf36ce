"""Hidden states: all tokens before and after each block, as diffusion and vision-language models take them."""

from __future__ import annotations

from torch import Tensor

from miniclip.models import CLIP


def hidden_states(model: CLIP, image: Tensor | None = None, text: Tensor | None = None) -> list[Tensor]:
    """Every token [N, L, D] before the first block of a transformer, and after each block: layers + 1 tensors.

    image: pixels as `encode_image` takes them, for a ViT, whose token 0 is the class token; or
    text: ids as `encode_text` takes them.

    The same as `hidden_states` of Hugging Face's transformers. `model.ln_final` and `model.visual.ln_post` norm them:

        hidden_states(model, text=ids)[-2]                    CLIP skip 2 of a diffusion model
        model.ln_final(hidden_states(model, text=ids)[-1])    transformers' last_hidden_state
        hidden_states(model, image=pixels)[-2][:, 1:]         LLaVA's patches

    ValueError for an image and a text together or none, and for a tower that is no transformer.
    """
    if (image is None) == (text is None):
        raise ValueError("expected an image or a text: hidden states are those of one tower")
    transformer = getattr(model.visual if text is None else model, "transformer", None)
    if transformer is None:
        raise ValueError("the image tower is no transformer: it has no tokens in blocks")
    states: list[Tensor] = []
    handles = [transformer.resblocks[0].register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))]
    handles += [
        block.register_forward_hook(lambda module, inputs, x: states.append(x)) for block in transformer.resblocks
    ]
    fast = getattr(model, "fast", False)
    try:
        model.fast = False
        model.encode_text(text) if image is None else model.encode_image(image)
    finally:
        model.fast = fast
        for handle in handles:
            handle.remove()
    return states
