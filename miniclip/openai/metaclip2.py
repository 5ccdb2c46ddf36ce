"""MetaCLIP 2: OpenAI's architecture with XLM-V's or mT5's vocabulary, whose end-of-text token is not the largest id.

miniclip does not have their tokenizers: `encode_text` takes the ids that transformers' AutoTokenizer makes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NoReturn

from torch import Tensor

from miniclip.config import CLIPConfig, ConfigError
from miniclip.errors import IncompleteModelError
from miniclip.family import Family
from miniclip.models import CLIP
from miniclip.openai.resize import resize
from miniclip.openai.stages import image_stages
from miniclip.weights import huggingface, openclip
from miniclip.weights.errors import CheckpointError
from miniclip.weights.fields import Fields
from miniclip.weights.names import layout_of, to_canonical

TOKENIZERS = {"facebook/xlm-v-base": 2, "google/mt5-base": 1}  # the ids of their end-of-text tokens
XLM_V = "facebook/xlm-v-base"
OWN_FIELDS = ("hf_tokenizer_name", "tokenizer_kwargs", "pool_type")  # of OpenCLIP's text_cfg; ids need no cleaning


@dataclass(frozen=True)
class MetaCLIP2Config(CLIPConfig, family="metaclip2"):
    tokenizer: str  # its name on the Hugging Face Hub
    end: int  # id of the end-of-text token

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.end < self.text.vocab_size:
            raise ConfigError(f"end is {self.end}; expected an id of the vocabulary, below {self.text.vocab_size}")


class MetaCLIP2(CLIP):
    """A CLIP for token ids alone."""

    def end_of_text(self, text: Tensor) -> Tensor:
        return (text == self.config.end).int().argmax(dim=-1)

    def tokenize(self, texts: str | Iterable[str], truncate: bool = False) -> NoReturn:
        raise IncompleteModelError(
            f"this model's texts are tokenized by {self.config.tokenizer:.100}, which miniclip does not have: give "
            "encode_text the ids that transformers' AutoTokenizer makes"
        )


def read(
    tensors: Mapping[str, Tensor], config: MetaCLIP2Config | None, activation: str | None
) -> tuple[MetaCLIP2Config, Mapping[str, Tensor]]:
    """The tensors under OpenAI's names."""
    if config is None:
        raise CheckpointError("nothing states the config of this MetaCLIP 2: load the directory that holds it")
    return config, to_canonical(layout_of(tensors), tensors)


def read_openclip(model: Fields) -> MetaCLIP2Config | None:
    """The config that `model_cfg` describes, or None if a text is not pooled at such a tokenizer's end token."""
    text = model.section("text_cfg")
    tokenizer = text.values.get("hf_tokenizer_name")
    if text.values.get("pool_type") != "eos" or tokenizer not in [*TOKENIZERS]:
        return None
    as_clip = {key: value for key, value in text.values.items() if key not in OWN_FIELDS}
    config = openclip.read_model(Fields(model.path, model.values | {"text_cfg": as_clip}, model.prefix))
    return _with_tokenizer(config, tokenizer, text.integer("eos_id", TOKENIZERS[tokenizer]))


def read_huggingface(directory: Fields, folder: Path) -> MetaCLIP2Config | None:
    """The config of a directory of transformers' MetaClip2Model, or None if it is of another model."""
    if directory.values.get("model_type") != "metaclip_2":
        return None
    directory.section("text_config", {}).one_of("eos_token_id", (TOKENIZERS[XLM_V],))
    return _with_tokenizer(huggingface.read_config(folder, "metaclip_2"), XLM_V, TOKENIZERS[XLM_V])


def _with_tokenizer(config: CLIPConfig, tokenizer: str, end: int) -> MetaCLIP2Config:
    values = {each.name: getattr(config, each.name) for each in fields(config)}
    return MetaCLIP2Config(**values, tokenizer=tokenizer, end=end)


FAMILY = Family(
    config=MetaCLIP2Config,
    model=MetaCLIP2,
    stages=lambda config: list(image_stages(config)),  # those of a text begin with the tokenizer
    read=read,
    resize=resize,
    read_openclip=read_openclip,
    read_huggingface=read_huggingface,
)
