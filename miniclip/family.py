"""What is particular to a family of models. Each family is a row of a folder's `FAMILIES`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from miniclip.config import CLIPConfig, NamedModel
from miniclip.models import CLIP
from miniclip.stages import Stage
from miniclip.weights.errors import CheckpointError
from miniclip.weights.fields import Fields

Tensors = Mapping[str, Tensor]


def read_own(tensors: Tensors, config: CLIPConfig | None, activation: str | None) -> tuple[CLIPConfig, Tensors]:
    """The tensors as they are. CheckpointError if no config is stated: a family by default infers none."""
    if config is None:
        raise CheckpointError("nothing states this model's config, and its family can't infer one from tensors")
    return config, tensors


class HubModel(NamedTuple):
    """A well-known model on the Hugging Face Hub, where `load` finds it by its name."""

    config: CLIPConfig
    data: str  # what it was trained on
    imagenet: float | None  # published zero-shot top-1 accuracy, %
    source: str  # of the accuracy


@dataclass(frozen=True)
class Family:
    """A family's own answers to what loading, saving, conformance and the bench ask.

    config, model         the class of its configs, and config -> the model in its plain form
    stages                config -> every stage of a forward pass, in order
    fast                  the model with fast forms of its towers; None: there are none
    models                the models that `load` takes by name
    hub                   well-known models on the Hugging Face Hub, by name
    owns                  tensor names of a file that states no config -> whether it is one of this family's
    read                  a file's tensors, the config (None: to be inferred), an activation that the user stated (None:
                          the usual one) -> the config, the tensors under the model's own names
    write_directory       the config, a model's tensors, an empty folder to fill; None: there is no such format.
                          CheckpointError for a model that the format can't hold
    resize                config, tensors, image size, context length (None: as they are) -> the config and the tensors
                          for other sizes; None: the sizes are fixed
    add_tokenizer         the config, the tensors under the model's own names, a tokenizer file or the directory of the
                          weights -> the config and the tensors, with the tokenizer; None: the tokenizer is CLIP's
    write_tokenizer       a model, a directory in which the tokenizer file is put; None: the tokenizer is CLIP's
    read_openclip         `model_cfg` of an open_clip_config.json -> the config, or None if it describes no such model
    read_huggingface      a config.json and its directory -> the same
    """

    config: type[CLIPConfig]
    model: Callable[[CLIPConfig], CLIP]
    stages: Callable[[CLIPConfig], list[Stage]]
    fast: Callable[[CLIPConfig], CLIP] | None = None
    models: Mapping[str, NamedModel] = field(default_factory=dict)
    hub: Mapping[str, HubModel] = field(default_factory=dict)
    owns: Callable[[Collection[str]], bool] = lambda names: False
    read: Callable[[Tensors, CLIPConfig | None, str | None], tuple[CLIPConfig, Tensors]] = read_own
    write_directory: Callable[[CLIPConfig, Tensors, Path], None] | None = None
    resize: Callable[[CLIPConfig, Tensors, int | None, int | None], tuple[CLIPConfig, Tensors]] | None = None
    add_tokenizer: Callable[[CLIPConfig, Tensors, Path], tuple[CLIPConfig, Tensors]] | None = None
    write_tokenizer: Callable[[CLIP, Path], None] | None = None
    read_openclip: Callable[[Fields], CLIPConfig | None] = lambda fields: None
    read_huggingface: Callable[[Fields, Path], CLIPConfig | None] = lambda fields, folder: None
