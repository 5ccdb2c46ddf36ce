"""The name tables, against literal lists, against the peers' own names, and against themselves."""

from collections.abc import Mapping

import pytest
import torch
from meta_calls import SLOW, MetaCalls

from miniclip.config import CLIPConfig, PreprocessConfig, ResNetConfig, TextConfig, TransformerConfig, ViTConfig
from miniclip.models import CLIP
from miniclip.weights.errors import CheckpointError
from miniclip.weights.names import LAYOUTS, from_canonical, layout_of, to_canonical

TEXT = TextConfig(9, 50, TransformerConfig(12, 1, 2, 20))
VIT = CLIPConfig(6, ViTConfig(6, 2, TransformerConfig(16, 1, 2, 30)), TEXT, PreprocessConfig(6))
RESNET = CLIPConfig(6, ResNetConfig(32, 4, (1, 1, 2, 1), 2), TEXT, PreprocessConfig(32))

HUGGINGFACE_SHAPES = {
    "logit_scale": (),
    "text_model.embeddings.token_embedding.weight": (50, 12),
    "text_model.embeddings.position_embedding.weight": (9, 12),
    "text_model.encoder.layers.0.layer_norm1.weight": (12,),
    "text_model.encoder.layers.0.layer_norm1.bias": (12,),
    "text_model.encoder.layers.0.self_attn.q_proj.weight": (12, 12),
    "text_model.encoder.layers.0.self_attn.q_proj.bias": (12,),
    "text_model.encoder.layers.0.self_attn.k_proj.weight": (12, 12),
    "text_model.encoder.layers.0.self_attn.k_proj.bias": (12,),
    "text_model.encoder.layers.0.self_attn.v_proj.weight": (12, 12),
    "text_model.encoder.layers.0.self_attn.v_proj.bias": (12,),
    "text_model.encoder.layers.0.self_attn.out_proj.weight": (12, 12),
    "text_model.encoder.layers.0.self_attn.out_proj.bias": (12,),
    "text_model.encoder.layers.0.layer_norm2.weight": (12,),
    "text_model.encoder.layers.0.layer_norm2.bias": (12,),
    "text_model.encoder.layers.0.mlp.fc1.weight": (20, 12),
    "text_model.encoder.layers.0.mlp.fc1.bias": (20,),
    "text_model.encoder.layers.0.mlp.fc2.weight": (12, 20),
    "text_model.encoder.layers.0.mlp.fc2.bias": (12,),
    "text_model.final_layer_norm.weight": (12,),
    "text_model.final_layer_norm.bias": (12,),
    "text_projection.weight": (6, 12),
    "vision_model.embeddings.class_embedding": (16,),
    "vision_model.embeddings.patch_embedding.weight": (16, 3, 2, 2),
    "vision_model.embeddings.position_embedding.weight": (10, 16),
    "vision_model.pre_layrnorm.weight": (16,),
    "vision_model.pre_layrnorm.bias": (16,),
    "vision_model.encoder.layers.0.layer_norm1.weight": (16,),
    "vision_model.encoder.layers.0.layer_norm1.bias": (16,),
    "vision_model.encoder.layers.0.self_attn.q_proj.weight": (16, 16),
    "vision_model.encoder.layers.0.self_attn.q_proj.bias": (16,),
    "vision_model.encoder.layers.0.self_attn.k_proj.weight": (16, 16),
    "vision_model.encoder.layers.0.self_attn.k_proj.bias": (16,),
    "vision_model.encoder.layers.0.self_attn.v_proj.weight": (16, 16),
    "vision_model.encoder.layers.0.self_attn.v_proj.bias": (16,),
    "vision_model.encoder.layers.0.self_attn.out_proj.weight": (16, 16),
    "vision_model.encoder.layers.0.self_attn.out_proj.bias": (16,),
    "vision_model.encoder.layers.0.layer_norm2.weight": (16,),
    "vision_model.encoder.layers.0.layer_norm2.bias": (16,),
    "vision_model.encoder.layers.0.mlp.fc1.weight": (30, 16),
    "vision_model.encoder.layers.0.mlp.fc1.bias": (30,),
    "vision_model.encoder.layers.0.mlp.fc2.weight": (16, 30),
    "vision_model.encoder.layers.0.mlp.fc2.bias": (16,),
    "vision_model.post_layernorm.weight": (16,),
    "vision_model.post_layernorm.bias": (16,),
    "visual_projection.weight": (6, 16),
}

OPENCLIP_TEXT_SHAPES = {
    "text.token_embedding.weight": (50, 12),
    "text.positional_embedding": (9, 12),
    "text.transformer.resblocks.0.ln_1.weight": (12,),
    "text.transformer.resblocks.0.ln_1.bias": (12,),
    "text.transformer.resblocks.0.attn.in_proj_weight": (36, 12),
    "text.transformer.resblocks.0.attn.in_proj_bias": (36,),
    "text.transformer.resblocks.0.attn.out_proj.weight": (12, 12),
    "text.transformer.resblocks.0.attn.out_proj.bias": (12,),
    "text.transformer.resblocks.0.ln_2.weight": (12,),
    "text.transformer.resblocks.0.ln_2.bias": (12,),
    "text.transformer.resblocks.0.mlp.c_fc.weight": (20, 12),
    "text.transformer.resblocks.0.mlp.c_fc.bias": (20,),
    "text.transformer.resblocks.0.mlp.c_proj.weight": (12, 20),
    "text.transformer.resblocks.0.mlp.c_proj.bias": (12,),
    "text.ln_final.weight": (12,),
    "text.ln_final.bias": (12,),
    "text.text_projection": (12, 6),
}


def random_state(config: CLIPConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = CLIP(config).state_dict()
    return {name: torch.randn(tensor.shape, generator=generator).to(tensor.dtype) for name, tensor in state.items()}


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_huggingface_names_and_shapes():
    converted = from_canonical("huggingface", random_state(VIT))
    assert shapes_of(converted) == HUGGINGFACE_SHAPES
    assert layout_of(converted) == "huggingface"


def test_openclip_names_and_shapes():
    for config in (VIT, RESNET):
        converted = from_canonical("openclip", random_state(config))
        shared = {k: s for k, s in shapes_of(random_state(config)).items() if k.startswith(("visual.", "logit_scale"))}
        assert shapes_of(converted) == OPENCLIP_TEXT_SHAPES | shared
        assert layout_of(converted) == "openclip"


def test_queries_keys_and_values_keep_their_places():
    block, hf = "transformer.resblocks.0.attn.in_proj_bias", "text_model.encoder.layers.0.self_attn.{}_proj.bias"
    state = random_state(VIT) | {block: torch.arange(36)}
    converted = from_canonical("huggingface", state)
    assert [converted[hf.format(letter)][0].item() for letter in "qkv"] == [0, 12, 24]
    swapped = dict(converted) | {hf.format("q"): converted[hf.format("k")], hf.format("k"): converted[hf.format("q")]}
    assert to_canonical("huggingface", converted)[block].tolist() == list(range(36))
    assert to_canonical("huggingface", swapped)[block].tolist() != list(range(36))


def test_projections_are_transposed():
    state = random_state(VIT)
    converted = from_canonical("huggingface", state)
    assert torch.equal(converted["text_projection.weight"], state["text_projection"].T)
    assert torch.equal(converted["visual_projection.weight"], state["visual.proj"].T)


@pytest.mark.parametrize(
    ("layout", "config"),
    [(layout, config) for layout in LAYOUTS for config in (VIT, RESNET) if (layout, config) != ("huggingface", RESNET)],
)
def test_round_trip(layout, config):
    state = random_state(config)
    back = to_canonical(layout, from_canonical(layout, state))
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), name
        assert back[name].dtype == tensor.dtype
    assert back.shapes() == shapes_of(state)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scalar_stored_as_vector(layout):
    foreign = dict(from_canonical(layout, random_state(VIT)))
    foreign["logit_scale"] = torch.tensor([4.5])
    logit_scale = to_canonical(layout, foreign)["logit_scale"]
    assert logit_scale.shape == () and logit_scale == 4.5


def test_what_is_no_weight_is_dropped():
    state = random_state(VIT)
    numbers = {"input_resolution": torch.tensor(6), "attn_mask": torch.zeros(9, 9)}
    assert to_canonical("openai", state | numbers).keys() == state.keys()
    assert from_canonical("huggingface", state | numbers).keys() == HUGGINGFACE_SHAPES.keys()
    ids = {f"{tower}_model.embeddings.position_ids": torch.arange(9)[None] for tower in ("text", "vision")}
    assert to_canonical("huggingface", dict(from_canonical("huggingface", state)) | ids).keys() == state.keys()


class Counted(Mapping):
    """A mapping that knows what was read from it."""

    def __init__(self, tensors):
        self.tensors, self.read = tensors, []

    def __getitem__(self, name):
        self.read.append(name)
        return self.tensors[name]

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)


def test_tensors_are_converted_when_asked_for():
    source = Counted(dict(from_canonical("huggingface", random_state(VIT))))
    converted = to_canonical("huggingface", source)
    assert len(converted) == len(random_state(VIT)) and "visual.proj" in converted and not source.read
    projection = converted["visual.proj"]
    assert source.read == ["visual_projection.weight"]
    assert projection.data_ptr() == source.tensors["visual_projection.weight"].data_ptr()  # a view, no copy
    fused = converted["visual.transformer.resblocks.0.attn.in_proj_weight"]
    assert fused is not converted["visual.transformer.resblocks.0.attn.in_proj_weight"]  # and not kept


def test_left_over_and_missing_names_are_listed():
    foreign = dict(from_canonical("huggingface", random_state(VIT)))
    extra = {"classifier.weight": torch.zeros(1), "vision_model.encoder.layers.0.mlp.fc3.bias": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"(?s)unknown in the huggingface.*2 in all.*classifier\.weight.*fc3"):
        to_canonical("huggingface", foreign | extra)
    del foreign["text_model.encoder.layers.0.self_attn.k_proj.bias"]
    with pytest.raises(CheckpointError, match=r"(?s)missing in the huggingface.*1 in all.*self_attn\.k_proj\.bias"):
        to_canonical("huggingface", foreign)
    with pytest.raises(CheckpointError, match=r"(?s)unknown in the huggingface.*visual\.layer1"):
        from_canonical("huggingface", random_state(RESNET))
    with pytest.raises(CheckpointError, match=r"(?s)unknown in the openclip.*text\.proj\.weight"):
        to_canonical("openclip", {"text.proj.weight": torch.zeros(1)})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes_are_found_without_arithmetic(layout):
    state = random_state(VIT)
    foreign = from_canonical(layout, state)
    tensors = to_canonical(layout, {name: foreign[name].to("meta") for name in foreign})
    with MetaCalls() as calls:
        assert tensors.shapes() == {name: tuple(tensor.shape) for name, tensor in state.items()}
        assert calls.names and calls.names.isdisjoint(SLOW)
        torch.cat([torch.empty(2, device="meta")] * 2)  # negative control
        assert "cat" in calls.names


def test_shapes_that_do_not_go_together():
    foreign = dict(from_canonical("huggingface", random_state(VIT)))
    foreign["text_model.encoder.layers.0.self_attn.k_proj.weight"] = torch.zeros(12, 13)
    converted = to_canonical("huggingface", foreign)
    for read in (lambda: converted["transformer.resblocks.0.attn.in_proj_weight"], converted.shapes):
        with pytest.raises(CheckpointError, match=r"in_proj_weight can't be made.*k_proj\.weight \[12, 13\]"):
            read()


def test_huggingface_names_equal_transformers():
    transformers = pytest.importorskip("transformers")
    tower = {"num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={
            **tower, "hidden_size": 12, "intermediate_size": 20, "vocab_size": 50, "max_position_embeddings": 9,
        },
        vision_config={**tower, "hidden_size": 16, "intermediate_size": 30, "image_size": 6, "patch_size": 2},
        projection_dim=6,
    )  # fmt: skip
    assert shapes_of(transformers.CLIPModel(config).state_dict()) == HUGGINGFACE_SHAPES


def test_openclip_names_equal_open_clip():
    open_clip = pytest.importorskip("open_clip")
    text = {"context_length": 9, "vocab_size": 50, "width": 12, "heads": 2, "layers": 1, "mlp_ratio": 20 / 12}
    visions = {
        "vit": {"image_size": 6, "patch_size": 2, "width": 16, "head_width": 8, "layers": 1, "mlp_ratio": 30 / 16},
        "resnet": {"image_size": 32, "width": 4, "layers": [1, 1, 2, 1]},
    }
    for vision, config in ((visions["vit"], VIT), (visions["resnet"], RESNET)):
        flat = open_clip.CLIP(6, vision, text).state_dict()
        assert shapes_of(flat) == shapes_of(random_state(config))
        assert layout_of(flat) == "openai"
        custom = open_clip.CustomTextCLIP(6, vision, text).state_dict()
        assert shapes_of(custom) == shapes_of(from_canonical("openclip", random_state(config)))


def test_longclip_has_two_tables_of_positions():
    """The first 20 positions are of the first table, the others of the second; their sum is what its code adds."""
    shapes = {name: tuple(tensor.shape) for name, tensor in CLIP(VIT).state_dict().items()}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    first, rest = torch.randn(248, 12), torch.randn(248, 12)
    file = tensors | {"positional_embedding": first, "positional_embedding_res": rest}
    assert layout_of(file) == "longclip" and layout_of(tensors) == "openai"
    mask = (torch.arange(248) < 20).float()[:, None]
    read = to_canonical("longclip", file)
    assert torch.equal(read["positional_embedding"], first * mask + rest * (1 - mask))
    assert read.keys() == tensors.keys()
    again = to_canonical("longclip", from_canonical("longclip", read))
    assert torch.equal(again["positional_embedding"], read["positional_embedding"])
    with pytest.raises(CheckpointError, match="missing in the longclip layout"):
        to_canonical("longclip", {name: file[name] for name in file if name != "positional_embedding"})
