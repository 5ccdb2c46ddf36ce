"""The attention kernel in Triton's interpreter, against float64."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
from kernel_cases import HALVES, TOLERANCE, random, relative_error
from torch._subclasses.fake_tensor import FakeTensorMode

from miniclip import ops
from miniclip.fast import ops as fused
from miniclip.kernels import attention as kernel_module
from miniclip.kernels import tiles
from miniclip.kernels.attention import attention, attention_varlen

LENGTHS = [1, 16, 50, 77, 197, 257, pytest.param(577, marks=pytest.mark.slow)]


def check(out: torch.Tensor, qkv: torch.Tensor, causal: bool) -> None:
    """Within the tolerance, and nowhere more than twice as far from float64 as PyTorch is."""
    expected = ops.attention(qkv.double(), causal)
    assert out.shape == expected.shape and out.dtype == qkv.dtype
    assert relative_error(out, expected) < TOLERANCE[qkv.dtype]
    pytorch = ops.attention(qkv, causal)
    assert (out - expected).abs().max() <= 2 * (pytorch - expected).abs().max()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_attention_matches_float64(length, causal, dtype):
    qkv = random(2 if length < 100 else 1, length, 3, 2, 64, dtype=dtype)
    check(attention(qkv, causal), qkv, causal)


@pytest.mark.parametrize("d", [32, 80, 128])
def test_other_head_dimensions(d):
    qkv = random(1, 77, 3, 2, d, dtype=torch.float16)
    check(attention(qkv, True), qkv, True)


@pytest.mark.parametrize("architecture", tiles.ARCHITECTURES)
@pytest.mark.parametrize("length", [16, 32, 64, 150])
def test_every_tile(architecture, length, monkeypatch):
    monkeypatch.setattr(tiles, "architecture", lambda device: architecture)
    qkv = random(1, length, 3, 1, 64, dtype=torch.float16)
    check(attention(qkv, True), qkv, True)


LAYOUTS = {
    "sequence first": lambda: random(50, 3, 3, 2, 64, dtype=torch.float16).transpose(0, 1),
    "heads first": lambda: random(2, 2, 50, 3, 64, dtype=torch.float16).permute(0, 2, 3, 1, 4),
    "rows of a longer batch": lambda: random(2, 60, 3, 2, 64, dtype=torch.float16)[:, 3:53],
    "every other token": lambda: random(2, 40, 3, 2, 64, dtype=torch.float16)[:, ::2],
    "some heads": lambda: random(2, 33, 3, 5, 64, dtype=torch.float16)[:, :, :, 1:3],
    "each head's q, k and v together": lambda: random(2, 33, 2, 3, 64, dtype=torch.float16).transpose(2, 3),
    "part of wider vectors": lambda: random(2, 33, 3, 2, 72, dtype=torch.float16)[..., 8:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout):
    qkv = LAYOUTS[layout]()
    assert not qkv.is_contiguous()
    check(attention(qkv, True), qkv, True)
    check(attention(qkv, False), qkv, False)


def starts_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [[1, 7, 1, 16, 0, 9, 1], [22, 1, 32, 8], [77, 1, 50]])
def test_varlen_matches_float64(lengths, causal, dtype):
    qkv = random(sum(lengths), 3, 2, 64, dtype=dtype)
    out = attention_varlen(qkv, starts_of(lengths), max(lengths), causal)
    expected = fused.attention_varlen(qkv.double(), starts_of(lengths), max(lengths), causal)
    assert out.shape == expected.shape and relative_error(out, expected) < TOLERANCE[dtype]
    for one, start in zip(lengths, starts_of(lengths).tolist(), strict=False):
        if one == 1:
            assert torch.equal(out[start], qkv[start, 2].flatten())  # a token alone attends to itself


def test_varlen_with_strides_and_a_generous_max_len():
    qkv = random(40, 2, 3, 4, 64, dtype=torch.float16)[::2, 0, :, 1:3]
    expected = fused.attention_varlen(qkv.double(), starts_of([13, 7]), 13, True)
    for max_len in 13, 16, 17, 64, 1000:
        assert relative_error(attention_varlen(qkv, starts_of([13, 7]), max_len, True), expected) < 5e-4


def test_nan_goes_where_it_should_and_nowhere_else():
    qkv = random(2, 50, 3, 2, 64, dtype=torch.float16)
    clean = attention(qkv)
    qkv[0, 7, 0, 1] = float("nan")  # one head's query of one token
    hit = attention(qkv).isnan().unflatten(2, (2, 64))
    assert hit[0, 7, 1].all() and hit.sum() == 64
    qkv[0, 20] = float("nan")  # a whole token, as a key too: of its sequence all
    out = attention(qkv)
    assert out[0].isnan().all() and torch.equal(out[1], clean[1])


def test_nan_does_not_leak_between_packed_sequences():
    lengths = [5, 1, 20, 16]
    qkv = random(sum(lengths), 3, 2, 64, dtype=torch.float16)
    clean = attention_varlen(qkv, starts_of(lengths), 20)
    for i, (start, end) in enumerate(starts_of(lengths).unfold(0, 2, 1).tolist()):
        poisoned = qkv.clone()
        poisoned[start:end] = float("nan")
        out = attention_varlen(poisoned, starts_of(lengths), 20)
        assert out[start:end].isnan().all(), i
        assert torch.equal(out[:start], clean[:start]) and torch.equal(out[end:], clean[end:]), i


@pytest.mark.parametrize("dtype", HALVES)
def test_saturated_softmax(dtype):
    """Logits of thousands, rows that differ by more than exp can hold, and zeros: the mean of all values."""
    qkv = random(1, 77, 3, 2, 64, dtype=dtype)
    qkv[:, :, :2] *= 40
    check(attention(qkv), qkv, False)
    qkv[:, :, 0] = 0
    mean = qkv[:, :, 2].double().mean(1, keepdim=True).expand(1, 77, 2, 64).flatten(2)
    assert relative_error(attention(qkv), mean) < TOLERANCE[dtype]


def test_logsumexp():
    qkv = random(2, 50, 3, 2, 64, dtype=torch.float16)
    q, k, _ = qkv.double().permute(2, 0, 3, 1, 4)
    _, lse = torch.ops.miniclip.attention(qkv, False)
    assert (lse - (q @ k.mT / 8).logsumexp(-1)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("causal", [False, True])
def test_gradient_matches_float64(causal, dtype):
    qkv, weights = random(2, 50, 3, 2, 64, dtype=dtype), random(2, 50, 128, dtype=dtype, seed=1)
    got = torch.autograd.grad(attention(qkv.requires_grad_(), causal), qkv, weights)[0]
    exact = qkv.detach().double().requires_grad_()
    expected = torch.autograd.grad(ops.attention(exact, causal), exact, weights.double())[0]
    pytorch = torch.autograd.grad(ops.attention(qkv, causal), qkv, weights)[0]
    assert relative_error(got, expected) < 2 * max(TOLERANCE[dtype], relative_error(pytorch, expected))


def test_gradcheck():
    """In float32, which only the operation itself takes, and therefore with a wide step."""
    qkv = random(1, 5, 3, 2, 32, dtype=torch.float32).requires_grad_()
    weights = random(1, 5, 2, 32, dtype=torch.float32, seed=1)
    for causal in False, True:
        function = lambda x, causal=causal: (torch.ops.miniclip.attention(x, causal)[0] * weights).sum()  # noqa: E731
        options = {"eps": 1e-2, "atol": 2e-2, "rtol": 2e-3, "fast_mode": True}
        assert torch.autograd.gradcheck(function, qkv, **options)


@pytest.mark.filterwarnings("ignore")
def test_opcheck():
    dense, packed = random(2, 9, 3, 2, 32, dtype=torch.float16), random(9, 3, 2, 32, dtype=torch.float16)
    torch.library.opcheck(torch.ops.miniclip.attention.default, (dense, True))
    torch.library.opcheck(torch.ops.miniclip.attention.default, (dense.clone().requires_grad_(), False))
    torch.library.opcheck(torch.ops.miniclip.attention_varlen.default, (packed, starts_of([5, 4]), 5, True))


def test_compile_export_and_inference_mode():
    qkv = random(2, 9, 3, 2, 32, dtype=torch.float16)
    expected = attention(qkv, True)

    class Doubled(torch.nn.Module):
        def forward(self, x):
            return attention(x * 1, True) * 2

    compiled = torch.compile(Doubled(), backend="aot_eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(qkv), expected * 2)
    leaf = qkv.clone().requires_grad_()
    compiled(leaf).sum().backward()
    plain = qkv.clone().requires_grad_()
    (attention(plain, True) * 2).sum().backward()
    assert torch.equal(leaf.grad, plain.grad)
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    exported = torch.export.export(Doubled(), (qkv,), dynamic_shapes={"x": batch})
    assert "miniclip.attention" in str(exported.graph)
    more = random(5, 9, 3, 2, 32, dtype=torch.float16)
    assert torch.equal(exported.module()(more), attention(more, True) * 2)
    with torch.inference_mode():
        assert torch.equal(attention(qkv.clone(), True), expected)


def test_shapes_on_a_gpu_that_is_not_there():
    with FakeTensorMode():
        qkv = torch.empty(4, 77, 3, 8, 64, device="cuda", dtype=torch.float16)
        out, lse = torch.ops.miniclip.attention(qkv, True)
        assert out.shape == (4, 77, 8, 64) and out.is_cuda and attention(qkv, True).shape == (4, 77, 512)
        # On CUDA the gradient has a path of its own. Called directly: autograd itself would look for the GPU.
        grad, _ = kernel_module._backward(SimpleNamespace(saved_tensors=(qkv, out, lse), causal=True), out, None)
        assert grad.shape == qkv.shape and grad.is_cuda and grad.dtype == torch.float16
        starts = torch.empty(9, device="cuda", dtype=torch.int32)
        assert attention_varlen(qkv.flatten(0, 1), starts, 77, True).shape == (308, 512)


def test_errors():
    good = functools.partial(random, dtype=torch.float16)
    for qkv, message in (
        (good(2, 5, 2, 4, 64), r"expected \[N, L, 3, H, d\]"),
        (good(5, 3, 4, 64), r"expected \[N, L, 3, H, d\]"),
        (good(2, 5, 3, 4, 64).float(), "float32; the kernel takes float16 and bfloat16"),
        (good(2, 5, 3, 4, 16), "head dimension is 16; the kernel takes a multiple of 8 from 32 to 128"),
        (good(2, 5, 3, 4, 100), "head dimension is 100"),
        (good(2, 5, 3, 64, 64).transpose(3, 4), "last stride of 64"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(qkv)
    with pytest.raises(ValueError, match=r"cu_seqlens is torch.int64 \[3\] on cpu; expected torch.int32"):
        attention_varlen(good(5, 3, 4, 64), torch.tensor([0, 2, 5]), 3)
    with pytest.raises(ValueError, match="the kernel has no gradient"):
        attention_varlen(good(5, 3, 4, 64).requires_grad_(), starts_of([2, 3]), 3)


def test_nothing():
    for shape in (0, 5, 3, 2, 64), (2, 0, 3, 2, 64):
        qkv = random(*shape, dtype=torch.float16).requires_grad_()
        out = attention(qkv)
        assert out.shape == (*shape[:2], 128) and torch.autograd.grad(out.sum(), qkv)[0].shape == shape
    none = random(0, 3, 2, 64, dtype=torch.float16)
    assert attention_varlen(none, starts_of([]), 16).shape == attention_varlen(none, starts_of([0, 0]), 0).shape


@pytest.mark.parametrize("far_apart", ["heads", "tokens"])
def test_heads_and_tokens_may_lie_far_apart(far_apart):
    """The third is 2^31 numbers away from the first: 4 GiB that are reserved, and hardly touched."""
    far, near = 2**30, 3 * 3 * 64
    length, strides = (9, (near, far)) if far_apart == "heads" else (3, (far, 64))
    memory = torch.empty(2 * far + near * length, dtype=torch.float16)
    token, head = strides
    qkv = memory.as_strided((1, length, 3, 3, 64), (0, token, 64 if far_apart == "heads" else 3 * 64, head, 1))
    close = random(1, length, 3, 3, 64, dtype=torch.float16)
    qkv.copy_(close)
    lengths = [length - 2, 2]
    assert torch.equal(attention(qkv, True), attention(close, True))
    packed = (attention_varlen(x[0], starts_of(lengths), max(lengths)) for x in (qkv, close))
    assert torch.equal(*packed)


@pytest.mark.parametrize("length", [63, 64, 65, 127, 128, 129, 191, 193])
def test_the_ends_of_tiles(length):
    """One tile of keys, whole tiles only, and one key more or less; under a causal mask and without."""
    qkv = random(1, length, 3, 1, 64, dtype=torch.float16, seed=length)
    check(attention(qkv, True), qkv, True)
    check(attention(qkv, False), qkv, False)


def test_the_flash_backward_gets_no_larger_batch_than_it_takes(monkeypatch):
    batches, flash = [], kernel_module._flash_backward
    monkeypatch.setattr(kernel_module, "_flash_backward", lambda *x: batches.append(len(x[1])) or flash(*x))
    with FakeTensorMode():
        qkv = torch.empty(150_000, 2, 3, 1, 64, device="cuda", dtype=torch.float16)
        saved = qkv, *torch.ops.miniclip.attention(qkv, True)
        grad, _ = kernel_module._backward(SimpleNamespace(saved_tensors=saved, causal=True), saved[1], None)
        assert grad.shape == qkv.shape and batches == [65_535, 65_535, 18_930]
    qkv = random(5, 7, 3, 1, 64, dtype=torch.float16).requires_grad_()
    whole = torch.autograd.grad(attention(qkv).sum(), qkv)[0]
    monkeypatch.setattr(kernel_module, "MAX_BACKWARD_BATCH", 2)
    assert torch.equal(torch.autograd.grad(attention(qkv).sum(), qkv)[0], whole) and batches[3:] == [5, 2, 2, 1]
