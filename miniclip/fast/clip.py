"""CLIP with the fast forms of its towers: what `load` returns."""

from __future__ import annotations

from torch import Tensor

from miniclip.fast import towers
from miniclip.models.clip import CLIP


class FastCLIP(CLIP):
    """A CLIP whose towers run in the fast forms where these apply; with `model.fast = False` in their plain forms."""

    fast = True

    def image_embedding(self, image: Tensor) -> Tensor:
        if self.fast and towers.applies(image, self.visual):
            return towers.image_embedding(self.visual, image)
        return super().image_embedding(image)

    def text_embedding(self, text: Tensor) -> Tensor:
        parts = (self.token_embedding, self.transformer, self.ln_final)
        if self.fast and self.transformer.causal and towers.applies(text, *parts):
            return towers.text_embedding(self, text)
        return super().text_embedding(text)
