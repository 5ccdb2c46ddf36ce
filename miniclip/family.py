"""What is particular to a family of models. Each family is a folder, and a row of `miniclip.loading.FAMILIES`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from miniclip.config import CLIPConfig, NamedModel
from miniclip.models import CLIP
from miniclip.stages import Stage
from miniclip.weights.fields import Fields

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Family:
    """A family's own answers to what loading, saving, conformance and the bench ask.

    config, model, fast   the config; the model as it reads; the same with fast forms, or `model` if there are none
    models                the models that `load` takes by name
    owns                  tensor names of a file -> whether it is one of this family's
    read                  a file's tensors, the config (None: to be inferred), an activation that the user stated (None:
                          the usual one) -> the config, the tensors under the model's own names
    write_directory       the config, a model's tensors, an empty folder to fill; None: there is no such format.
                          CheckpointError for a model that the format can't hold
    read_openclip         `model_cfg` of an open_clip_config.json -> the config, or None if it describes no such model
    stages                config -> every stage of a forward pass, in order
    """

    config: type[CLIPConfig]
    model: type[CLIP]
    fast: type[CLIP]
    owns: Callable[[Collection[str]], bool]
    read: Callable[[Tensors, CLIPConfig | None, str | None], tuple[CLIPConfig, Tensors]]
    stages: Callable[[CLIPConfig], list[Stage]]
    models: Mapping[str, NamedModel]
    write_directory: Callable[[CLIPConfig, Tensors, Path], None] | None = None
    read_openclip: Callable[[Fields], CLIPConfig | None] = lambda fields: None

    @property
    def name(self) -> str:
        return self.config.family
