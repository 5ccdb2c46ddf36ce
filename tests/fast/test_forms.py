"""The fast forms of the towers against the plain ones."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conformance.openai_cases import CASES
from fast_cases import TOLERANCE, difference, ids, pixels, seeded_model, spy
from hypothesis import given, settings
from hypothesis import strategies as st

from miniclip.fast import blocks, gpu, half, resnet, vit
from miniclip.fast import text as text_tower
from miniclip.fast.blocks import Arithmetic
from miniclip.fast.clip import FastCLIP, Form
from miniclip.fast.prepared import Prepared
from miniclip.fast.untouched import tensors_of
from miniclip.models import CLIP, convert_weights

COSINE = {torch.float16: 0.9999, torch.bfloat16: 0.999}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_images_are_embedded_equally(case, count, calls):
    model = seeded_model(case)
    assert difference(model, lambda model: model.encode_image(pixels(model, count))) <= TOLERANCE
    assert calls == ["image"]


@pytest.mark.parametrize("case", CASES)
def test_texts_are_embedded_equally(case, calls):
    model = seeded_model(case)
    longest = model.context_length
    for lengths in ([longest], [1], [4, 4, 4], [2, longest, 5, 1], [3, 7]):
        text = ids(model, lengths)
        assert difference(model, lambda model: model.encode_text(text)) <= TOLERANCE  # noqa: B023, called at once
    assert calls == ["text"] * 5


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 13), min_size=1, max_size=6), st.integers(0, 1000))
def test_texts_of_any_lengths(lengths, seed):
    model = seeded_model("vit")
    torch.manual_seed(seed)
    text = ids(model, lengths)
    assert difference(model, lambda model: model.encode_text(text)) <= TOLERANCE
    assert difference(model, lambda model: model.encode_text(text[:, : max(lengths)])) <= TOLERANCE


def alike(model: CLIP) -> torch.Tensor:
    """Texts of 3 to 8 tokens that share 0 to all of them at their beginnings, and one of them later, too."""
    text = ids(model, [6, 6, 8, 6, 3, 3])
    text[1, :2], text[2, :5], text[3, :6] = text[0, :2], text[0, :5], text[0, :6]
    text[1, 2], text[1, 3] = (text[0, 2] + 1) % (model.vocab_size - 2), text[0, 3]
    return text


def test_texts_that_begin_alike():
    model = seeded_model("vit")
    text = alike(model)
    assert difference(model, lambda model: model.encode_text(text)) <= TOLERANCE
    assert difference(model, lambda model: model.encode_text(text[:1].expand(20, -1))) <= TOLERANCE  # 6 tokens


def test_what_begins_alike_is_computed_once():
    text = torch.tensor([[1, 2, 3, 9, 0], [1, 2, 4, 9, 7], [5, 2, 3, 9, 0], [1, 2, 9, 3, 9], [1, 2, 3, 9, 8]])
    prefix, first = text_tower.distinct_prefixes(text, torch.tensor([3, 3, 3, 2, 3]))
    assert first.tolist() == [0, 10, 1, 11, 2, 7, 17, 12, 3, 8, 13]  # by place, there by what was before
    assert torch.equal(text.flatten()[first][prefix[:3, :4]], text[:3, :4])
    assert torch.equal(prefix[0], prefix[4]) and prefix[0, 1] == prefix[1, 1] != prefix[2, 1]
    assert prefix[3, 2:].tolist() == [6, 6, 6] and prefix[0, 3:].tolist() == [8, 8]  # padding is its text's end
    prefix, first = text_tower.distinct_prefixes(text[3:4], torch.tensor([2]))
    assert prefix.tolist() == [[0, 1, 2, 2, 2]] and first.tolist() == [0, 1, 2]


def test_sharing_more_than_what_begins_alike_is_seen(monkeypatch):
    """Negative control: equal tokens at the same place, whatever was before."""

    def wrong(text, end):
        found, prefix = torch.unique(torch.arange(text.shape[1]) << 32 | text, return_inverse=True)
        places = torch.arange(prefix.numel())
        return prefix, found.new_empty(len(found)).scatter_reduce_(
            0, prefix.flatten(), places, "amin", include_self=False
        )

    monkeypatch.setattr(text_tower, "distinct_prefixes", wrong)
    model = seeded_model("vit")
    text = alike(model)
    assert difference(model, lambda model: model.encode_text(text)) > 100 * TOLERANCE


@pytest.mark.parametrize("case", ["vit", "vit-deep"])
def test_the_form_for_gpus(case, monkeypatch, calls):
    """Its arithmetic, on the CPU: there it is slower."""

    for name, key in (("image", vit.VisionTransformer), ("text", True)):
        run = partial(spy, calls, name, getattr(gpu, f"{name}_embedding"))
        monkeypatch.setattr(FastCLIP, f"{name}_forms", {key: Form(lambda tower, derive, arithmetic: tower, run)})
    model = seeded_model(case)
    assert difference(model, lambda model: model.encode_image(pixels(model))) <= TOLERANCE
    text = ids(model, [3, 13, 1])
    assert difference(model, lambda model: model.encode_text(text)) <= TOLERANCE
    assert len(calls) == 2


def test_gelu_too():
    config = CASES["vit"]
    transformer = type(config.vision.transformer)(128, 2, 2, 512, activation="gelu")
    vision = type(config.vision)(config.vision.image_size, config.vision.patch_size, transformer)
    model = FastCLIP(type(config)(config.embed_dim, vision, config.text, config.preprocess)).eval()
    assert difference(model, lambda model: model.encode_image(pixels(model))) <= TOLERANCE


@pytest.mark.parametrize("case", ["vit", "resnet"])
def test_layers_may_have_a_bias_or_none(case, calls):
    model = seeded_model(case)
    torch.manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
            layer.bias = torch.nn.Parameter(torch.randn(len(layer.weight))) if layer.bias is None else None
        elif isinstance(layer, torch.nn.LayerNorm):
            layer.bias = None
    assert difference(model, lambda model: model.encode_image(pixels(model))) <= 10 * TOLERANCE
    text = ids(model, [3, 5])
    assert difference(model, lambda model: model.encode_text(text)) <= TOLERANCE
    assert calls == ["image", "text"]


def test_pixels_may_lie_in_any_order():
    model = seeded_model("vit")
    upside_down = pixels(model).flip(2).contiguous(memory_format=torch.channels_last)
    assert difference(model, lambda model: model.encode_image(upside_down)) <= TOLERANCE
    assert difference(model, lambda model: model.encode_image(pixels(model).transpose(2, 3))) <= TOLERANCE


@torch.no_grad()
def test_parts_of_a_resnet():
    model = seeded_model("resnet")
    tower = model.visual
    x = torch.randn(2, 3, 20, 20)
    prepare = partial(resnet.prepare, tower, arithmetic=Arithmetic(torch.float32))
    prepared = Prepared().get(tensors_of(tower), prepare)
    plain = tower.bn1(tower.conv1(x)).relu()
    torch.testing.assert_close(prepared.stem[0](x, "relu"), plain, atol=1e-6, rtol=1e-5)
    features = tower.features(pixels(model))
    torch.testing.assert_close(resnet.features(prepared, pixels(model)), features, atol=1e-5, rtol=1e-5)
    pooled = resnet.attention_pool(prepared.attention_pool, features)
    torch.testing.assert_close(pooled, tower.attnpool(features), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", COSINE, ids=str)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_half_precision_stays_close_to_float32(case, dtype, calls, monkeypatch):
    """In arithmetic of that precision, emulated or not; float32's is in test_half.py."""
    monkeypatch.setattr(half, "EMULATED", frozenset())
    expected, model = seeded_model(case), convert_weights(seeded_model(case), dtype)
    expected.fast = False
    text = ids(model, [2, 9, 5])
    for mine, other in (
        (model.encode_image(pixels(model)), expected.encode_image(pixels(model))),
        (model.encode_text(text), expected.encode_text(text)),
    ):
        assert mine.dtype == dtype
        assert F.cosine_similarity(mine.float(), other).min() >= COSINE[dtype]
    assert len(calls) == 2


def _with_other_eps(right, x, shape, weight, bias, eps, *rest):
    return right(x, shape, weight, bias, 1e-3, *rest)


@pytest.mark.parametrize(
    ("where", "name", "wrong"),
    [
        (blocks, "QUICK_GELU", 1.5),
        (torch, "layer_norm", partial(_with_other_eps, torch.layer_norm)),
        (torch.nn.functional, "embedding", lambda ids, weight: weight[ids.clamp(max=110)]),
    ],
)
def test_a_wrong_step_is_seen(where, name, wrong, monkeypatch):
    """Negative control."""
    model = seeded_model("vit")
    text = ids(model, [3, 5])
    plain = CLIP.text_embedding(model, text)
    monkeypatch.setattr(CLIP, "text_embedding", lambda self, text: plain)
    monkeypatch.setattr(where, name, wrong)
    assert difference(model, lambda model: model.encode_text(text)) > 10 * TOLERANCE


def test_a_wrong_patch_order_is_seen(monkeypatch):
    model = seeded_model("vit")
    monkeypatch.setattr(model.visual, "conv1", model.visual.conv1)
    right = vit._tokens
    monkeypatch.setattr(vit, "_tokens", lambda tower, x: right(tower, x.transpose(2, 3)))
    assert difference(model, lambda model: model.encode_image(pixels(model))) > 100 * TOLERANCE


def test_the_plain_form_is_the_tower(calls):
    model = seeded_model("vit")
    model.fast = False
    with torch.no_grad():
        assert torch.equal(model.encode_image(pixels(model)), model.visual(pixels(model)))
        model.encode_text(ids(model, [4]))
    assert calls == []


def test_a_text_tower_that_is_not_causal_is_not_cut(calls):
    model = seeded_model("vit")
    model.transformer.causal = False
    with torch.no_grad():
        model.encode_text(ids(model, [4, 6]))
    assert calls == []


@pytest.mark.slow  # ten seconds each, on a quiet machine
@pytest.mark.parametrize("case", ["vit", "resnet"])
@torch.no_grad()
def test_export_takes_any_batch(case):
    """Of the plain form."""
    model = seeded_model(case)
    for part, example, longer in (
        (Images(model), pixels(model, 2), pixels(model, 5)),
        (Texts(model), ids(model, [3, 5]), ids(model, [1, 9, 7])),
    ):
        exported = torch.export.export(part, (example,), dynamic_shapes=({0: torch.export.Dim("n", max=64)},))
        torch.testing.assert_close(exported.module()(longer), part(longer), atol=1e-5, rtol=1e-5)


@pytest.mark.slow  # the compiler runs: about a minute
@torch.no_grad()
def test_compile_has_no_graph_break_and_takes_any_batch():
    for case in ("vit", "resnet"):
        model = seeded_model(case)
        for part, batches in (
            (Images(model), [pixels(model, 2), pixels(model, 5)]),
            (Texts(model), [ids(model, [3, 5]), ids(model, [1, 9, 7])]),
        ):
            compiled = torch.compile(part, fullgraph=True, dynamic=True)
            for batch in batches:
                torch.testing.assert_close(compiled(batch), part(batch), atol=1e-5, rtol=1e-5)


class Images(torch.nn.Module):
    def __init__(self, model: CLIP):
        super().__init__()
        self.clip = model

    def forward(self, x):
        return self.clip.encode_image(x, normalize=True)


class Texts(Images):
    def forward(self, x):
        return self.clip.encode_text(x, normalize=True)
