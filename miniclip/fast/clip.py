"""CLIP with the fast forms of its towers: what `load` returns."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from miniclip.fast import gpu, half, int8, resnet, vit
from miniclip.fast import text as text_tower
from miniclip.fast.blocks import Arithmetic
from miniclip.fast.graphs import MOST_INPUTS, Graphs
from miniclip.fast.prepared import Prepared
from miniclip.fast.untouched import applies, tensors_of
from miniclip.models.clip import CLIP
from miniclip.models.resnet import ModifiedResNet
from miniclip.models.transformer import Attention
from miniclip.models.vit import VisionTransformer


class Form(NamedTuple):
    """The fast form of a tower on a CPU."""

    prepare: Callable[..., Any]  # the module, derive, arithmetic -> what `run` needs of it
    run: Callable[[Any, Tensor], Tensor]  # that, a batch -> embeddings


class FastCLIP(CLIP):
    """A CLIP whose towers run in their fast forms where these apply; with `model.fast = False` in their plain forms.

    On a CPU, what the fast forms derive from weights is kept between calls, see prepared.py; it takes about as much
    memory as the weights. Training mode, moving or casting the model, and `forget` drop it. A family with other towers
    is a subclass that adds their forms to `image_forms` and `text_forms`; a tower without one runs in its plain form.
    """

    fast = True
    int8 = False  # see `miniclip.fast.int8.quantize`
    graphs = False  # on a GPU, whether small batches run as CUDA graphs: graphs.py
    image_forms: ClassVar[dict[type[nn.Module], Form]] = {
        VisionTransformer: Form(vit.prepare, vit.image_embedding),
        ModifiedResNet: Form(resnet.prepare, resnet.image_embedding),
    }
    text_forms: ClassVar[dict[bool, Form]] = {True: Form(text_tower.prepare, text_tower.text_embedding)}  # by causality

    def image_embedding(self, image: Tensor) -> Tensor:
        form, tower = self.image_forms.get(type(self.visual)), self.visual
        tensors = tensors_of(tower) if self.fast and form and applies(image) else None
        if tensors is None or (image.is_cuda and not isinstance(tower, VisionTransformer)):
            return super().image_embedding(image)
        if image.is_cuda:
            return self._on_gpu("image", partial(gpu.image_embedding, tower), image, tensors)
        return form.run(self._prepared("image", tower, form, tensors), image)

    def text_embedding(self, text: Tensor) -> Tensor:
        parts = self.token_embedding, self.positional_embedding, self.transformer, self.ln_final, self.text_projection
        form = self.text_forms.get(self.transformer.causal)
        tensors = tensors_of(*parts) if self.fast and form and applies(text) else None
        if tensors is None or (text.is_cuda and not self.transformer.causal):
            return super().text_embedding(text)
        if text.is_cuda and self._takes_graph(text):
            return self._on_gpu("text", partial(gpu.text_embedding, self, whole=True), gpu.cut(text), tensors)
        if text.is_cuda:
            return gpu.text_embedding(self, text, whole=torch.cuda.is_current_stream_capturing())
        return form.run(self._prepared("text", self, form, tensors), text)

    def _takes_graph(self, inputs: Tensor) -> bool:
        return self.graphs and len(inputs) <= MOST_INPUTS and not torch.cuda.is_current_stream_capturing()

    def _on_gpu(self, name: str, form: Callable[[Tensor], Tensor], inputs: Tensor, tensors: list[Tensor]) -> Tensor:
        if not self._takes_graph(inputs):
            return form(inputs)
        kept = self.__dict__.setdefault("_kept", {}).setdefault(f"{name} graphs", Graphs())
        backends = {module.backend for module in self.modules() if isinstance(module, Attention)}
        return kept.run(form, inputs, tensors, *sorted(map(str, backends)))

    def _prepared(self, name: str, tower: nn.Module, form: Form, tensors: list[Tensor]) -> Any:
        kept = self.__dict__.setdefault("_kept", {}).setdefault(name, Prepared())
        arithmetic = int8.arithmetic() if self.int8 else Arithmetic(half.arithmetic(self.dtype))
        return kept.get(tensors, partial(form.prepare, tower, arithmetic=arithmetic))

    def forget(self) -> None:
        """Drop what was derived from the weights: the next call derives it again."""
        self.__dict__.pop("_kept", None)

    def train(self, mode: bool = True) -> FastCLIP:
        if mode:
            self.forget()
        return super().train(mode)

    def _apply(self, *args, **kwargs) -> FastCLIP:
        self.forget()
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:  # what copy.deepcopy and pickle take
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}
