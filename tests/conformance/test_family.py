"""A family with an image tower of its own is traced and compared with no edit in miniclip/conformance."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from conformance import seeded
from PIL import Image
from torch import nn

from miniclip.config import CLIPConfig, PreprocessConfig, TextConfig, VisionConfig, check_sizes, openai_transformer
from miniclip.conformance import compare, trace
from miniclip.family import Family
from miniclip.loading import FAMILIES, build_model
from miniclip.models import CLIP
from miniclip.openai import stages as openai
from miniclip.stages import IMAGE, LOGITS, Stage, rows

PICTURE = Image.effect_mandelbrot((50, 41), (-2, -1.5, 1, 1.5), 90).convert("RGB")


@dataclass(frozen=True)
class GatedConfig(VisionConfig, kind="gated"):
    width: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, "width")


class GatedTower(nn.Module):
    """Patches, each multiplied by a gate between 0 and 1; their mean is projected."""

    def __init__(self, config: GatedConfig, embed_dim: int):
        super().__init__()
        self.input_resolution, self.output_dim = config.image_size, embed_dim
        self.patches = nn.Conv2d(3, config.width, 8, stride=8)
        self.gate = nn.Conv2d(config.width, 1, 1)
        self.head = nn.Linear(config.width, embed_dim)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.patches(image)
        return self.head((x * torch.sigmoid(self.gate(x))).mean(dim=(2, 3)))


class GatedCLIP(CLIP):
    towers: ClassVar = {GatedConfig: GatedTower}


@dataclass(frozen=True)
class GatedCLIPConfig(CLIPConfig, family="gated"):
    pass


TOWER = (
    ("visual.patches", "N D G G", "8 x 8 convolution, stride 8"),
    ("visual.gates", "N 1 G G", "the sigmoid of visual.gate"),
    ("visual.pooled", "N D", "mean of patches * gates"),
    ("visual.head", "N E", "linear layer"),
)


def stages(config: CLIPConfig) -> list[Stage]:
    places = {
        "visual.gates": {"input_of": "visual.gate", "compute": lambda gate, x: torch.sigmoid(gate(x))},
        "visual.pooled": {"input_of": "visual.head"},
    }
    tower = [stage._replace(rule="", **places.get(stage.name, {})) for stage in rows(TOWER, {})]
    image = [*rows(IMAGE, {}), *tower, *rows(openai.IMAGE_END, {})]
    return [*image, *openai.text_stages(config), *rows(LOGITS, {})]


FAMILY = Family(
    config=GatedCLIPConfig,
    model=GatedCLIP,
    fast=GatedCLIP,
    owns=lambda names: "visual.gate.weight" in names,
    read=lambda tensors, config, activation: (config, tensors),
    stages=stages,
    models={},
)


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr("miniclip.loading.FAMILIES", [FAMILY, *FAMILIES])
    text = TextConfig(77, 49408, openai_transformer(64, 1))
    config = GatedCLIPConfig(24, GatedConfig(32, 16), text, PreprocessConfig(32))
    with torch.device("meta"):
        shapes = {name: tuple(x.shape) for name, x in GatedCLIP(config).state_dict().items()}
    return build_model(seeded.weights(shapes), config)


def test_every_stage_is_recorded(model):
    golden = trace(model, PICTURE, ["a dog", "two cats"])
    assert list(golden) == [stage.name for stage in stages(model.config)]
    patches, gates = golden["visual.patches"], golden["visual.gates"]
    assert gates.shape == (1, 1, 4, 4) and gates.min() > 0 and gates.max() < 1
    torch.testing.assert_close((patches * gates).mean((2, 3)), golden["visual.pooled"])
    with torch.no_grad():
        assert torch.equal(golden["visual.head"], model.encode_image(golden["image.pixels"]))


def test_what_has_a_rule_is_checked_and_diagnosed_and_the_rest_is_compared(model):
    golden = trace(model, PICTURE, ["a dog", "two cats"])
    assert compare(golden, golden, model).passed
    wrong = {"visual.gates": golden["visual.gates"] * 2, "visual.head": golden["visual.head"]}
    comparison = compare(golden, wrong, model)
    assert comparison.first_wrong == "visual.gates" and comparison.diagnosis is None
    wrong = {"visual.head": golden["visual.head"], "image_embedding": golden["visual.head"]}
    assert compare(golden, wrong, model).diagnosis.mistake == "image embedding not normalised"
    model.ln_final.eps = 1e-2
    with pytest.raises(RuntimeError, match=r"ln_final is .* away from its definition"):
        trace(model, text=["a dog", "two cats"])


def test_a_stage_that_the_model_skips_is_noticed(model):
    model.visual.forward = lambda image: model.visual.head(model.visual.patches(image).mean((2, 3)))
    with pytest.raises(RuntimeError, match=r"without computing visual\.gates"):
        trace(model, PICTURE)
