"""CLIP with the fast forms of its towers: what `load` returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from miniclip.fast import gpu, resnet, vit
from miniclip.fast import text as text_tower
from miniclip.fast.untouched import applies
from miniclip.models.clip import CLIP
from miniclip.models.resnet import ModifiedResNet
from miniclip.models.vit import VisionTransformer


class FastCLIP(CLIP):
    """A CLIP whose towers run in their fast forms where these apply; with `model.fast = False` in their plain forms.

    A family with other towers is a subclass that adds their fast forms to `image_forms`. A tower without one runs in
    its plain form.
    """

    fast = True
    image_forms: ClassVar[dict[tuple[str, type[nn.Module]], Callable[[nn.Module, Tensor], Tensor]]] = {
        ("cpu", VisionTransformer): vit.image_embedding,
        ("cpu", ModifiedResNet): resnet.image_embedding,
        ("cuda", VisionTransformer): gpu.image_embedding,
    }

    def image_embedding(self, image: Tensor) -> Tensor:
        form = self.image_forms.get((image.device.type, type(self.visual)))
        if self.fast and form and applies(image, self.visual):
            return form(self.visual, image)
        return super().image_embedding(image)

    def text_embedding(self, text: Tensor) -> Tensor:
        parts = (self.token_embedding, self.transformer, self.ln_final)
        if self.fast and self.transformer.causal and applies(text, *parts):
            return (gpu if text.is_cuda else text_tower).text_embedding(self, text)
        return super().text_embedding(text)
