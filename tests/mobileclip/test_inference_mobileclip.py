"""The fast form of MobileCLIP's towers computes what the plain one does, and only where no difference is visible."""

import pytest
import torch
import torch.nn.functional as F
from conformance.mobileclip_cases import inputs
from mobileclip_small import SMALL_MCI, outputs, texts, tiny

from miniclip.fast import half, untouched
from miniclip.loading import build_model
from miniclip.mobileclip import fast as forms
from miniclip.mobileclip.towers import MCi
from miniclip.models import convert_weights
from miniclip.models.text import TextTransformer


def model_of(norm: str = "batch", taps: int = 0, dtype=torch.float32):
    tensors, config = tiny(norm=norm, text_taps=taps)
    return build_model(tensors, config, dtype=dtype)


def pixels(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(count))


@pytest.fixture
def runs(monkeypatch) -> list[str]:
    """Which towers ran in their plain form."""
    found = []
    for kind, name in ((MCi, "forward"), (TextTransformer, "text_embedding")):
        plain = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *args, plain=plain, name=name: found.append(name) or plain(*args))
    monkeypatch.setitem(untouched.FORWARD, MCi, MCi.forward)
    return found


@pytest.mark.parametrize("taps", [0, 11])
@pytest.mark.parametrize("norm", SMALL_MCI)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_the_plain_form(norm, taps, dtype, runs):
    model, tolerance = model_of(norm, taps, dtype), 1e-6 if dtype == torch.float32 else 1e-14
    with torch.inference_mode():
        fast = [F.normalize(x) for x in (model.encode_image(pixels(3).to(dtype)), model.encode_text(texts()))]
        assert runs == ["text_embedding"] * bool(taps)
        model.fast = False
        plain = [F.normalize(x) for x in (model.encode_image(pixels(3).to(dtype)), model.encode_text(texts()))]
        assert runs[-2:] == ["forward", "text_embedding"]
    for mine, expected in zip(fast, plain, strict=True):
        torch.testing.assert_close(mine, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("emulated", [set(), {torch.float16, torch.bfloat16}], ids=["native", "emulated"])
@pytest.mark.parametrize("norm", SMALL_MCI)
@pytest.mark.parametrize("cast", [convert_weights, torch.nn.Module.to])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_equals_the_plain_form_in_half_precision(dtype, cast, norm, emulated, monkeypatch):
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("PyTorch has no FBGEMM here")
    monkeypatch.setattr(half, "EMULATED", emulated)
    model, config = model_of(norm), tiny(norm=norm, text_taps=0)[1]
    cast(model, dtype)
    fast = outputs(model, config)
    model.fast = False
    difference = (outputs(model, config) - fast).abs().max()
    assert difference <= (2e-3 if dtype == torch.float16 else 1.6e-2)


def test_parts_of_batches_make_the_whole(monkeypatch):
    model = model_of()
    with torch.inference_mode():
        ids = texts().repeat(3, 1)
        image, text = model.encode_image(pixels(5)), model.encode_text(ids)
        for name, value in (("PICTURES", 2), ("TEXTS", 4)):
            monkeypatch.setattr(forms, name, value)
        torch.testing.assert_close(model.encode_image(pixels(5)), image, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.encode_text(ids), text, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_inputs_and_weights_are_left_alone(memory_format):
    model = model_of()
    given = inputs(64)[0].contiguous(memory_format=memory_format)
    before, weights = given.clone(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.inference_mode():
        model.encode_image(given)
        model.encode_text(texts())
    assert torch.equal(given, before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_a_changed_weight_counts_at_once():
    model, config = model_of(), tiny(text_taps=0)[1]
    before = outputs(model, config)
    with torch.no_grad():
        model.visual.stages[1].blocks[0].mlp.fc2.weight += 0.1
        model.transformer.resblocks[0].mlp.c_proj.weight += 0.1
    after = outputs(model, config)
    model.fast = False
    torch.testing.assert_close(outputs(model, config), after, atol=1e-6, rtol=0)
    assert not torch.allclose(before, after, atol=1e-3)


def test_only_where_no_difference_is_visible(runs):
    """With gradients, in training, with a hook or another module in it, the towers run as they are written."""
    model = model_of()
    plain = ["forward", "text_embedding"]

    def run():
        runs.clear()
        model.encode_image(pixels(1))
        model.encode_text(texts())
        return runs

    assert run() == plain  # gradients
    with torch.inference_mode():
        assert run() == []
        model.train()
        assert run() == plain
        model.eval()
        handles = [
            part.register_forward_hook(lambda *_: None)
            for part in (model.visual.stages[2].blocks[0].mlp.fc1, model.transformer.resblocks[1].mlp.c_fc)
        ]
        assert run() == plain
        for handle in handles:
            handle.remove()
        assert run() == []
        model.visual.se = torch.nn.Sequential(model.visual.se)
        assert run() == ["forward"]
