"""When the fast forms must not run, and what finding it out costs."""

import sys

import pytest
import torch
from fast_cases import ids, pixels, seeded_model
from torch.overrides import TorchFunctionMode

from miniclip.fast.untouched import tensors_of
from miniclip.models.transformer import ResidualAttentionBlock


def hooked(model):
    model.visual.transformer.resblocks[1].mlp.c_fc.register_forward_hook(lambda *_: None)


def pre_hooked(model):
    model.visual.register_forward_pre_hook(lambda *_: None)


def patched(model):
    attention = model.visual.transformer.resblocks[0].attn
    attention.forward = attention.forward


def replaced(model):
    class Adapted(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model.visual.transformer.resblocks[0].mlp.c_fc = Adapted(128, 512)


def foreign(model):
    model.visual.ln_pre = torch.nn.LayerNorm(128).eval()


def partly_in_training(model):
    model.visual.ln_pre.train()


def reparametrised(model):
    torch.nn.utils.parametrizations.weight_norm(model.visual.transformer.resblocks[0].mlp.c_fc)


CHANGES = [hooked, pre_hooked, patched, replaced, foreign, partly_in_training, reparametrised]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_tower_runs_plainly(change, calls):
    model = seeded_model("vit")
    change(model)
    with torch.no_grad():
        assert torch.equal(model.encode_image(pixels(model)), model.visual(pixels(model)))
        model.encode_text(ids(model, [4]))  # the other tower is as it was
    assert calls == ["text"]


def test_a_patched_class_runs_plainly(calls, monkeypatch):
    block = ResidualAttentionBlock
    monkeypatch.setattr(block, "forward", lambda self, x, causal: x)
    model = seeded_model("vit")
    with torch.no_grad():
        model.encode_image(pixels(model))
    assert calls == []


def test_gradients_and_autocast_run_plainly(calls):
    model = seeded_model("vit")
    assert model.encode_image(pixels(model)).requires_grad
    assert model.encode_text(ids(model, [4])).requires_grad
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model.encode_image(pixels(model))
    with torch.no_grad():
        model.train().encode_image(pixels(model))
        assert model.encode_text(ids(model, [])).shape == (0, 48)
    assert calls == []


def test_the_check_is_cheap():
    """At most ten Python and C calls a module, and no operation on a tensor: 0.1 ms for twelve blocks."""
    model = seeded_model("vit-deep")
    counted = []

    class Operations(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            counted.append(function)
            return function(*args, **(kwargs or {}))

    with Operations():
        assert tensors_of(model.visual) is not None
    assert counted == []
    sys.setprofile(lambda frame, event, arg: counted.append(event) if event in ("call", "c_call") else None)
    try:
        tensors_of(model.visual)
    finally:
        sys.setprofile(None)
    assert 0 < len(counted) <= 10 * len(list(model.visual.modules()))
