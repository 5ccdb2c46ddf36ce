"""CLIP with the fast forms of its towers: what `load` returns."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from miniclip.errors import UsageError
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

FREED = "the model's weights were freed by prepare(free=True), so that it can only embed"


class Form(NamedTuple):
    """The fast form of a tower."""

    prepare: Callable[..., Any]  # the module, derive, arithmetic -> what `run` needs of it
    run: Callable[[Any, Tensor], Tensor]  # that, a batch on a CPU -> embeddings
    on_gpu: bool = False  # whether gpu.py has the tower, too; else it runs in its plain form there


class FastCLIP(CLIP):
    """A CLIP whose towers run in their fast forms where these apply; with `model.fast = False` in their plain forms.

    On a CPU, what the fast forms derive from weights is kept between calls, see prepared.py. It takes about as much
    memory as the weights, and is made at the first call, which takes two to five times as long as the next, or by
    `prepare`. Training mode, moving or casting the model, and `forget` drop it.

    A family with other towers is a subclass that adds their forms to `image_forms` and `text_forms`; a tower without
    one runs in its plain form.
    """

    fast = True
    int8 = False  # see `miniclip.fast.int8.quantize`
    freed = False  # see `prepare`
    graphs = True  # on a GPU, whether small batches run as CUDA graphs: graphs.py
    image_forms: ClassVar[dict[type[nn.Module], Form]] = {
        VisionTransformer: Form(vit.prepare, vit.image_embedding, on_gpu=True),
        ModifiedResNet: Form(resnet.prepare, resnet.image_embedding),
    }
    text_forms: ClassVar[dict[bool, Form]] = {  # by whether the tower is causal
        True: Form(text_tower.prepare, text_tower.text_embedding, on_gpu=True)
    }

    def image_embedding(self, image: Tensor) -> Tensor:
        return self._embed("image", image, super().image_embedding)

    def text_embedding(self, text: Tensor) -> Tensor:
        return self._embed("text", text, super().text_embedding)

    def _embed(self, name: str, inputs: Tensor, plain: Callable[[Tensor], Tensor]) -> Tensor:
        form, parts = self._form(name)
        may_run = self.fast and form is not None and applies(inputs)
        if self.freed and len(inputs) == 0:
            return inputs.new_empty(0, self.config.embed_dim, dtype=self.dtype)
        if self.freed:
            if not may_run or inputs.is_cuda:
                raise UsageError(f"{FREED}: embed under torch.inference_mode(), on the CPU, without autocast")
            return form.run(self._kept[name].result, inputs)
        tensors = tensors_of(*parts) if may_run else None
        if tensors is None:
            return plain(inputs)
        if not inputs.is_cuda:
            return form.run(self._derived(name, form, tensors), inputs)
        if not form.on_gpu:
            return self._on_gpu(name, plain, inputs, tensors)
        if name == "image":
            return self._on_gpu("image", partial(gpu.image_embedding, self.visual), inputs, tensors)
        if self._takes_graph(inputs):
            return self._on_gpu("text", partial(gpu.text_embedding, self, whole=True), gpu.cut(inputs), tensors)
        return gpu.text_embedding(self, inputs, whole=torch.cuda.is_current_stream_capturing())

    def _form(self, name: str) -> tuple[Form | None, tuple[nn.Module | nn.Parameter, ...]]:
        """A tower's fast form, and what the tower consists of."""
        if name == "image":
            return self.image_forms.get(type(self.visual)), (self.visual,)
        parts = self.token_embedding, self.positional_embedding, self.transformer, self.ln_final, self.text_projection
        return self.text_forms.get(self.transformer.causal), parts

    def _takes_graph(self, inputs: Tensor) -> bool:
        return self.graphs and len(inputs) <= MOST_INPUTS and not torch.cuda.is_current_stream_capturing()

    def _on_gpu(self, name: str, form: Callable[[Tensor], Tensor], inputs: Tensor, tensors: list[Tensor]) -> Tensor:
        if not self._takes_graph(inputs):
            return form(inputs)
        kept = self.__dict__.setdefault("_kept", {}).setdefault(f"{name} graphs", Graphs())
        backends = {module.backend for module in self.modules() if isinstance(module, Attention)}
        try:
            return kept.run(form, inputs, tensors, *sorted(map(str, backends)))
        except RuntimeError as error:
            warnings.warn(f"small batches run without CUDA graphs: {error}", stacklevel=2)
            self.graphs = False
            return form(inputs)

    def _derived(self, name: str, form: Form, tensors: list[Tensor]) -> Any:
        kept = self.__dict__.setdefault("_kept", {}).setdefault(name, Prepared())
        arithmetic = int8.arithmetic() if self.int8 else Arithmetic(half.arithmetic(self.dtype))
        tower = self.visual if name == "image" else self
        return kept.get(tensors, partial(form.prepare, tower, arithmetic=arithmetic))

    def prepare(self, free: bool = False) -> FastCLIP:
        """On a CPU, derive everything from the weights now rather than at the first call. Returns the model.

        free: drop the weights themselves, so that the model takes about as much memory as without `prepare`. From then
        on it can only embed, on the CPU and without gradient. UsageError if a tower has no fast form or was changed.
        """
        for name in ("image", "text"):
            form, parts = self._form(name)
            tensors = tensors_of(*parts) if form and not self.freed and self.logit_scale.device.type == "cpu" else None
            if tensors is not None:
                self._derived(name, form, tensors)
            elif free and not self.freed:
                raise UsageError(f"the weights can't be freed: the {name} tower has no fast form here, or was changed")
        if free and not self.freed:
            self.freed = True
            for name, parameter in self.named_parameters():
                if name != "logit_scale":
                    parameter.data = parameter.data.new_empty(0)
            for kept in self._kept.values():
                kept.release()
        return self

    def forget(self) -> None:
        """Drop what was derived from the weights: the next call derives it again."""
        self._refuse_if_freed()
        self.__dict__.pop("_kept", None)

    def train(self, mode: bool = True) -> FastCLIP:
        if mode:
            self.forget()
        return super().train(mode)

    def _apply(self, *args, **kwargs) -> FastCLIP:
        self.forget()
        return super()._apply(*args, **kwargs)

    def state_dict(self, *args, **kwargs) -> dict[str, Any]:
        self._refuse_if_freed()
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *args, **kwargs) -> Any:
        self._refuse_if_freed()
        return super().load_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:  # what copy.deepcopy and pickle take
        self._refuse_if_freed()
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}

    def _refuse_if_freed(self) -> None:
        if self.freed:
            raise UsageError(f"{FREED}: load the model again")
