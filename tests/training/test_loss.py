"""The losses against values by hand, against each other, and against the memory they promise not to use."""

from __future__ import annotations

import contextlib
import functools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from miniclip.config import CLIPConfig, PreprocessConfig, TextConfig, TransformerConfig, ViTConfig
from miniclip.models.clip import CLIP
from miniclip.training.gradient_cache import Embedder, cached_backward
from miniclip.training.loss import (
    LOSSES,
    MAX_LOGIT_SCALE,
    clamp_logit_scale,
    contrastive_loss,
    sharded_loss,
    sigmoid_loss,
    softmax_loss,
    triton_loss,
    whole_loss,
)

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def small_embedder(dtype: torch.dtype) -> Embedder:
    torch.manual_seed(0)
    image = ViTConfig(16, 8, TransformerConfig(width=32, layers=2, heads=2, mlp_width=128))
    text = TextConfig(8, 50, TransformerConfig(width=32, layers=2, heads=2, mlp_width=128))
    return Embedder(CLIP(CLIPConfig(16, image, text, PreprocessConfig(16))).to(dtype))


def pairs(count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 16, 16, dtype=torch.float64, generator=generator)
    return images.to(dtype), torch.randint(50, (count, 8), generator=generator)


def unit(count: int, width: int, scale: float, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Image and text embeddings, pairs of them close to each other, and the multiplier: leaves for a gradient."""
    generator = torch.Generator().manual_seed(2)
    image = F.normalize(torch.randn(count, width, dtype=torch.float64, generator=generator), dim=1)
    noise = F.normalize(torch.randn(count, width, dtype=torch.float64, generator=generator), dim=1)
    leaves = image, F.normalize(image + noise, dim=1), torch.tensor(scale)
    return [x.to(dtype).requires_grad_() for x in leaves]


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def worst_error(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference in any gradient, as a share of that gradient's largest entry."""
    assert got.keys() == expected.keys() and expected
    return max(((got[k] - g).abs().max() / g.abs().max()).item() for k, g in expected.items())


def whole_batch(dtype: torch.dtype, count: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What everything here must reproduce: loss and gradients of one pass over the batch with the plain loss."""
    embedder = small_embedder(dtype)
    loss = contrastive_loss(*embedder(*pairs(count, dtype)))
    loss.backward()
    return loss.detach(), gradients(embedder)


def by_hand(z: list[list[float]]) -> float:
    rows = [math.log(sum(map(math.exp, row))) - row[i] for i, row in enumerate(z)]
    columns = [math.log(sum(map(math.exp, column))) - column[i] for i, column in enumerate(zip(*z, strict=True))]
    return (sum(rows) + sum(columns)) / (2 * len(z))


@pytest.mark.parametrize("loss_fn", [contrastive_loss, functools.partial(sharded_loss, softmax_loss, chunk=1)])
def test_loss_by_hand(loss_fn):
    image, scale = torch.eye(2, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    assert loss_fn(image, image, scale).item() == pytest.approx(math.log(1 + math.exp(-2)))
    text = torch.tensor([[1, 0], [0.6, 0.8]], dtype=torch.float64)
    assert loss_fn(image, text, scale).item() == pytest.approx(by_hand([[2, 1.2], [0, 1.6]]), abs=1e-12)
    one_direction = F.cross_entropy(scale * image @ text.T, torch.arange(2)).item()
    assert one_direction != pytest.approx(by_hand([[2, 1.2], [0, 1.6]]), abs=1e-2)  # the test sees a missing half


def losses_and_gradients(loss_fn, leaves):
    loss = loss_fn(*leaves)
    names = ["image", "text", "scale", "bias"][: len(leaves)]
    return loss.detach(), dict(zip(names, torch.autograd.grad(loss, leaves), strict=True))


def leaves_of(row, count, width, scale, dtype=torch.float64):
    """`unit`, and where the loss has one a bias."""
    bias = [] if row.bias is None else [torch.tensor(-3.0, dtype=dtype).requires_grad_()]
    return unit(count, width, scale, dtype) + bias


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_sigmoid_loss_is_a_sum_over_all_pairs(scale):
    """SigLIP, algorithm 1: the mean over images of -log sigmoid(z (t x.y + b)) summed over texts, z = 1 for pairs."""
    leaves = image, text, t, b = leaves_of(LOSSES["sigmoid"], 5, 4, scale)

    def by_hand(sign=-1.0):
        terms = []
        for i in range(5):
            for j in range(5):
                z = 1.0 if i == j else sign
                terms.append(-F.logsigmoid(z * (t * (image[i] * text[j]).sum() + b)))
        return sum(terms) / 5

    loss, got = losses_and_gradients(functools.partial(whole_loss, sigmoid_loss), leaves)
    expected_loss, expected = by_hand(), torch.autograd.grad(by_hand(), leaves)
    assert abs(loss - expected_loss) < 1e-10
    assert worst_error(got, dict(zip(got, expected, strict=True))) < 1e-10
    assert abs(loss - by_hand(sign=1.0)) > 0.1  # a wrong sign is seen


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_the_loss_at_chance(name):
    """Equal logits give it, for the sigmoid loss with the best bias; other biases are worse."""
    row, count = LOSSES[name], 12
    image = torch.ones(count, 1, dtype=torch.float64)
    scale = torch.tensor(0.0, dtype=torch.float64)
    biases = [[torch.tensor(-math.log(count - 1) + shift)] for shift in (0.0, 0.1, -0.1)] if row.bias else [[]]
    losses = [whole_loss(row.function, image, image, scale, *bias).item() for bias in biases]
    assert losses[0] == pytest.approx(row.chance(count), abs=1e-6)
    assert all(loss > losses[0] + 1e-4 for loss in losses[1:])


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 11), st.sampled_from([0.5, 14.3, 100.0]))
def test_chunked_sigmoid_matches_whole(count, chunk, scale):
    leaves = leaves_of(LOSSES["sigmoid"], count, 5, scale)
    loss, expected = losses_and_gradients(functools.partial(whole_loss, sigmoid_loss), leaves)
    chunked_loss, got = losses_and_gradients(functools.partial(sharded_loss, sigmoid_loss, chunk=chunk), leaves)
    assert abs(chunked_loss - loss) < 1e-10
    assert all((got[k] - expected[k]).abs().max() < 1e-10 for k in expected)


def test_triton_loss_is_the_kernel_and_takes_whole_batches_only(monkeypatch):
    image, text, scale = unit(6, 4, 14.3, torch.float32)
    seen = []
    kernel = lambda *x, backend: seen.append((x, backend)) or x[2]  # noqa: E731
    monkeypatch.setattr("miniclip.training.loss.contrastive_loss", kernel)
    whole_loss(triton_loss, image, text, scale)
    ((arguments, backend),) = seen
    assert backend == "triton" and arguments[0].dtype == arguments[1].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="leave out --chunk and torchrun"):
        sharded_loss(triton_loss, image, text, scale, chunk=2)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 11), st.sampled_from([0.5, 14.3, 100.0]))
def test_chunked_matches_whole(count, chunk, scale):
    leaves = unit(count, 5, scale)
    loss, expected = losses_and_gradients(contrastive_loss, leaves)
    chunked_loss, got = losses_and_gradients(functools.partial(sharded_loss, softmax_loss, chunk=chunk), leaves)
    assert abs(chunked_loss - loss) < 1e-10
    assert all((got[k] - expected[k]).abs().max() < 1e-10 for k in expected)  # absolute: a single pair's are all zero


@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_chunked_matches_whole_in_float32(scale):
    leaves = unit(200, 32, scale, torch.float32)
    loss, expected = losses_and_gradients(contrastive_loss, leaves)
    chunked_loss, got = losses_and_gradients(functools.partial(sharded_loss, softmax_loss, chunk=7), leaves)
    assert abs(chunked_loss - loss) < 1e-5 and worst_error(got, expected) < 1e-5
    got["scale"] = got["scale"] * 1.001
    assert worst_error(got, expected) > 1e-5


def test_chunked_gradcheck():
    torch.autograd.gradcheck(functools.partial(sharded_loss, softmax_loss, chunk=2), unit(5, 3, 14.3))


class LargestTensor(TorchDispatchMode):
    """Records how many elements the largest tensor has that any operation returns, backward pass included."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


def test_chunked_never_holds_the_logits():
    for row in (LOSSES["softmax"], LOSSES["sigmoid"]):
        for chunk, elements in (16, 16 * 128), (0, 128 * 128):
            with LargestTensor() as largest:
                sharded_loss(row.function, *leaves_of(row, 128, 8, 14.3), chunk=chunk).backward()
            assert largest.elements == elements


def test_losses_ignore_autocast():
    image, text, scale = leaves = unit(64, 16, 100.0, torch.float32)
    chunked = functools.partial(sharded_loss, softmax_loss, chunk=10)
    loss, expected = losses_and_gradients(chunked, leaves)
    with torch.autocast("cpu", torch.bfloat16):
        same_loss = chunked(*leaves)
        assert abs(contrastive_loss(*leaves) - loss) < 1e-6
        assert abs(F.cross_entropy(scale * image @ text.T, torch.arange(64)) - loss) > 1e-4
    got = dict(zip(expected, torch.autograd.grad(same_loss, leaves), strict=True))
    assert same_loss == loss and worst_error(got, expected) == 0


def test_cached_backward_with_a_logit_bias():
    plain, cached = (Embedder(small_embedder(torch.float64).clip, logit_bias=-3.0) for _ in range(2))
    loss_fn = functools.partial(whole_loss, sigmoid_loss)
    loss = loss_fn(*plain(*pairs(12, torch.float64)))
    loss.backward()
    assert abs(cached_backward(cached, *pairs(12, torch.float64), 5, loss_fn) - loss) < 1e-10
    assert "logit_bias" in gradients(cached) and worst_error(gradients(cached), gradients(plain)) < 1e-10
    assert "logit_bias" not in dict(small_embedder(torch.float64).named_parameters())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("micro_batch", [1, 3, 12, 20])
def test_cached_backward_matches_whole_batch(dtype, micro_batch):
    loss, expected = whole_batch(dtype, 12)
    embedder = small_embedder(dtype)
    cached_loss = cached_backward(embedder, *pairs(12, dtype), micro_batch)
    assert abs(cached_loss - loss) < TOLERANCE[dtype] and not cached_loss.requires_grad
    assert worst_error(gradients(embedder), expected) < TOLERANCE[dtype]


def test_micro_batches_with_their_own_losses_are_not_the_whole_batch():
    _, expected = whole_batch(torch.float64, 12)
    embedder = small_embedder(torch.float64)
    for batch in zip(*(x.split(3) for x in pairs(12, torch.float64)), strict=True):
        (contrastive_loss(*embedder(*batch)) / 4).backward()
    assert worst_error(gradients(embedder), expected) > 0.1


def test_cached_backward_composes_and_accumulates():
    _, expected = whole_batch(torch.float64, 12)
    embedder = small_embedder(torch.float64)
    for _ in range(2):
        loss_fn = functools.partial(sharded_loss, softmax_loss, chunk=5)
        cached_backward(embedder, *pairs(12, torch.float64), 4, lambda *x, f=loss_fn: 8 * f(*x))
    assert worst_error(gradients(embedder), {k: 16 * g for k, g in expected.items()}) < 1e-10


@pytest.mark.parametrize("pattern", [r"clip\.visual", r"clip\.(?!visual|logit_scale)", r"clip\.logit_scale"])
def test_cached_backward_with_a_frozen_part(pattern):
    _, expected = whole_batch(torch.float64, 6)
    embedder = small_embedder(torch.float64)
    for name, parameter in embedder.named_parameters():
        parameter.requires_grad_(not re.match(pattern, name))
    cached_backward(embedder, *pairs(6, torch.float64), 4)
    trained = {name: gradient for name, gradient in expected.items() if not re.match(pattern, name)}
    assert len(trained) < len(expected) and worst_error(gradients(embedder), trained) < 1e-10


def test_cached_backward_under_autocast():
    """Also that the cast weights which autocast kept from the pass without graphs do reach the parameters."""
    _, expected = whole_batch(torch.float32, 12)
    plain, cached = small_embedder(torch.float32), small_embedder(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = contrastive_loss(*plain(*pairs(12, torch.float32)))
        cached_loss = cached_backward(cached, *pairs(12, torch.float32), 5)
    loss.backward()
    assert abs(cached_loss - loss) < 1e-3
    assert worst_error(gradients(cached), gradients(plain)) < 0.02
    assert worst_error(gradients(plain), expected) > 1e-3  # it was computed in bfloat16


class Peak:
    """Counts the elements that autograd keeps for the backward pass, now and at most."""

    def __init__(self):
        self.now = self.peak = 0

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: Saved(self, x), lambda saved: saved.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def add(self, elements: int):
        self.now += elements
        self.peak = max(self.peak, self.now)


class Saved:
    def __init__(self, peak: Peak, tensor: torch.Tensor):
        self.peak, self.tensor = peak, tensor
        peak.add(tensor.numel())

    def __del__(self):
        self.peak.add(-self.tensor.numel())


def test_cached_backward_keeps_one_micro_batch_of_activations():
    peaks = []
    for micro_batch in 2, 32:
        embedder = small_embedder(torch.float32)
        with Peak() as memory:
            cached_backward(embedder, *pairs(32, torch.float32), micro_batch)
        assert memory.now == 0
        peaks.append(memory.peak)
    weights = sum(p.numel() for p in embedder.parameters())  # kept as well, whatever the batch
    assert peaks[0] - weights < (peaks[1] - weights) / 10


class Dropout(nn.Module):
    """An embedder that draws random numbers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 4).double()

    def forward(self, images, texts):
        image, text = (F.normalize(F.dropout(self.linear(x), 0.3), dim=1) for x in (images, texts))
        return image, text, torch.tensor(5.0).double()


def test_cached_backward_repeats_random_numbers(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    batch = [torch.randn(9, 6, dtype=torch.float64, generator=generator) for _ in range(2)]

    plain = Dropout()
    torch.manual_seed(4)
    image, text, scale = zip(*(plain(*part) for part in zip(*(x.split(4) for x in batch), strict=True)), strict=True)
    contrastive_loss(torch.cat(image), torch.cat(text), scale[0]).backward()
    after = torch.get_rng_state()

    cached = Dropout()
    torch.manual_seed(4)
    cached_backward(cached, *batch, 4)
    assert worst_error(gradients(cached), gradients(plain)) < 1e-10
    assert torch.equal(torch.get_rng_state(), after)

    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
    other = Dropout()
    torch.manual_seed(4)
    cached_backward(other, *batch, 4)
    assert worst_error(gradients(other), gradients(plain)) > 1e-2


def test_clamp_logit_scale():
    clip = small_embedder(torch.float32).clip
    for value, clamped in (MAX_LOGIT_SCALE + 1, MAX_LOGIT_SCALE), (-1.0, -1.0):
        nn.init.constant_(clip.logit_scale, value)
        clamp_logit_scale(clip)
        assert clip.logit_scale.item() == pytest.approx(clamped) and clip.logit_scale.requires_grad


def test_errors():
    image, text, scale = unit(4, 3, 1.0)
    for loss_fn in contrastive_loss, functools.partial(sharded_loss, softmax_loss, chunk=2):
        with pytest.raises(ValueError, match="4 images and 3 texts"):
            loss_fn(image, text[:3], scale)
        with pytest.raises(ValueError, match="0 images"):
            loss_fn(image[:0], text[:0], scale)
    with pytest.raises(ValueError, match="chunk is -1"):
        sharded_loss(softmax_loss, image, text, scale, chunk=-1)
    with pytest.raises(ValueError, match="micro_batch is 0"):
        cached_backward(small_embedder(torch.float32), *pairs(4, torch.float32), 0)
