"""The kernels of the contrastive loss in Triton's interpreter, against float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import HALVES, LOSS, SCALE_GRADIENT, TOLERANCE, random, relative_error
from torch._subclasses.fake_tensor import FakeTensorMode

from miniclip.kernels import tiles
from miniclip.kernels.contrastive_loss import contrastive_loss


def pairs(n: int, width: int, scale: float, dtype: torch.dtype) -> list[torch.Tensor]:
    """Unit embeddings, pairs about as close as the closest strangers, and the multiplier: leaves for a gradient."""
    image, noise = (F.normalize(random(n, width, dtype=torch.float64, seed=seed), dim=1) for seed in (0, 1))
    text = F.normalize(image + math.sqrt(width / (2 * math.log(n + 1))) * noise, dim=1)
    return [x.requires_grad_() for x in (image.to(dtype), text.to(dtype), torch.tensor(scale))]


def plain_loss(image, text, scale) -> torch.Tensor:
    logits, own = scale * image @ text.T, torch.arange(len(image))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def check(image, text, scale) -> None:
    leaves = [image, text, scale]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = plain_loss(*exact)
    # Of float32 embeddings, which the public function refuses, the operation is as exact as float32.
    loss = torch.ops.miniclip.contrastive_loss(*leaves)[0]
    assert abs(loss - expected) <= LOSS * max(1, expected)
    got = torch.autograd.grad(3 * loss, leaves)
    wanted = torch.autograd.grad(3 * expected, exact)
    tolerance = LOSS if image.dtype == torch.float32 else TOLERANCE[image.dtype]
    assert [x.shape for x in got] == [x.shape for x in wanted]
    assert relative_error(got[0], wanted[0]) < tolerance
    assert relative_error(got[1], wanted[1]) < tolerance
    assert abs(got[2] - wanted[2]) < 3 * SCALE_GRADIENT


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("n, width, scale", [(2, 16, 1.0), (33, 100, 14.3), (130, 64, 100.0), (50, 512, 100.0)])
def test_matches_float64(n, width, scale, dtype):
    check(*pairs(n, width, scale, dtype))


def test_wide_embeddings():
    check(*pairs(18, 640, 100.0, torch.bfloat16))


@pytest.mark.parametrize("architecture", tiles.ARCHITECTURES)
def test_every_tile(architecture, monkeypatch):
    monkeypatch.setattr(tiles, "architecture", lambda device: architecture)
    check(*pairs(70, 32, 100.0, torch.float16))
    check(*pairs(20, 520, 100.0, torch.float16))


def test_one_pair_has_no_loss_and_no_gradient():
    leaves = pairs(1, 64, 100.0, torch.float16)
    loss = contrastive_loss(*leaves)
    assert loss == 0 and all(not g.any() for g in torch.autograd.grad(loss, leaves))


def test_a_fixed_maximum_would_underflow():
    """All logits far below the scale, the largest there can be: exp(logit - scale) is zero in float32."""
    away = random(64, dtype=torch.float64, seed=1)
    image, text = (
        F.normalize(sign * away + 0.1 * random(20, 64, dtype=torch.float64, seed=seed), dim=1).half().requires_grad_()
        for sign, seed in ((1, 2), (-1, 3))
    )
    logits = 100 * image.float() @ text.float().T
    assert ((logits - 100).exp() == 0).all()
    leaves = image, text, torch.tensor(100.0, requires_grad=True)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    loss, expected = contrastive_loss(*leaves), plain_loss(*exact)
    assert abs(loss - expected) < LOSS * expected
    got, wanted = torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, exact)
    # Looser than elsewhere: the other side's embeddings are all alike, so that what is left of their sum is small.
    assert all(relative_error(a, b) < 0.02 for a, b in zip(got, wanted, strict=True))


def test_equal_pairs():
    """Every logit the same: the loss is ln N, and nothing depends on the scale."""
    image, _, scale = pairs(1, 64, 100.0, torch.float16)
    same = image.detach().expand(40, 64).contiguous().requires_grad_()
    loss = contrastive_loss(same, same, scale)
    assert abs(loss - torch.tensor(40.0).log()) < 1e-6
    assert torch.autograd.grad(loss, scale)[0].abs() < 1e-6


def test_nan_is_not_hidden():
    image, text, scale = pairs(40, 64, 100.0, torch.float16)
    image.data[3, 5] = float("nan")
    loss = contrastive_loss(image, text, scale)
    assert loss.isnan() and torch.autograd.grad(loss, text)[0].isnan().all()


def test_strides_and_repeatability():
    wide = random(40, 3, 96, dtype=torch.float16) / 10
    image, text = wide[:, 0, :64], wide[:, 2, 32:]
    scale = torch.tensor(20.0, requires_grad=True)
    leaves = [image.detach().requires_grad_(), text.detach().requires_grad_(), scale]
    assert not leaves[0].is_contiguous()
    check(*leaves)
    first, second = (torch.autograd.grad(contrastive_loss(*leaves), leaves) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_gradcheck():
    """In float32, which only the operation itself takes, and therefore with a wide step."""
    leaves = pairs(5, 16, 10.0, torch.float32)
    options = {"eps": 1e-2, "atol": 2e-3, "rtol": 2e-3, "fast_mode": True}
    assert torch.autograd.gradcheck(lambda *x: torch.ops.miniclip.contrastive_loss(*x)[0], leaves, **options)


@pytest.mark.filterwarnings("ignore")
def test_opcheck_and_compile():
    leaves = pairs(5, 16, 10.0, torch.float16)
    torch.library.opcheck(torch.ops.miniclip.contrastive_loss.default, tuple(leaves))
    _, largest, total = torch.ops.miniclip.contrastive_loss(*leaves)
    saved = (torch.ones(()), *(x.detach() for x in (*leaves, largest, total)))
    torch.library.opcheck(torch.ops.miniclip.contrastive_loss_backward.default, saved)
    compiled = torch.compile(contrastive_loss, backend="aot_eager", fullgraph=True)
    got, expected = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, contrastive_loss))
    assert all(map(torch.equal, got, expected))


def test_shapes_on_a_gpu_that_is_not_there():
    with FakeTensorMode():
        image, scale = torch.empty(32_768, 512, device="cuda", dtype=torch.bfloat16), torch.ones((), device="cuda")
        loss = contrastive_loss(image, image, scale)
        assert loss.shape == () and loss.dtype == torch.float32 and loss.is_cuda


def test_errors():
    image, text, scale = (x.detach() for x in pairs(4, 32, 1.0, torch.float16))
    for arguments, message in (
        ((image, text[:3], scale), r"image has shape \[4, 32\] and text \[3, 32\]"),
        ((image[:0], text[:0], scale), r"image has shape \[0, 32\]"),
        ((image.float(), text.float(), scale), "both float16 or both bfloat16"),
        ((image.new_ones(2, 1032), image.new_ones(2, 1032), scale), "1032 wide; the kernel takes at most 1024"),
        ((image.T.contiguous().T, text, scale), "image has a last stride of 4; expected 1"),
        ((image, text, scale.half()), "logit_scale is torch.float16"),
    ):
        with pytest.raises(ValueError, match=message):
            contrastive_loss(*arguments)
