"""The operations' plain forms by hand, and the choice between them and the kernels."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from miniclip import cosines, ops
from miniclip.config import CLIPConfig, PreprocessConfig, TextConfig, TransformerConfig, ViTConfig
from miniclip.fast import ops as fused
from miniclip.models import CLIP, set_backend
from miniclip.models.transformer import Attention
from miniclip.training.loss import contrastive_loss


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("causal", [False, True])
def test_attention_by_hand(causal):
    qkv = random(2, 5, 3, 2, 4)
    out = ops.attention(qkv, causal)
    for n in range(2):
        for head in range(2):
            q, k, v = qkv[n, :, :, head].unbind(1)
            for i in range(5):
                seen = i + 1 if causal else 5
                weights = torch.tensor([math.exp(q[i] @ k[j] / 2) for j in range(seen)], dtype=torch.float64)
                expected = (weights / weights.sum()) @ v[:seen]
                torch.testing.assert_close(out[n, i, 4 * head : 4 * head + 4], expected)


def test_attention_varlen_is_attention_of_each():
    qkv, starts = random(9, 3, 2, 4), torch.tensor([0, 1, 1, 6, 9], dtype=torch.int32)
    out = fused.attention_varlen(qkv, starts, 5, True)
    expected = torch.cat([ops.attention(qkv[None, a:b], True)[0] for a, b in ((0, 1), (1, 6), (6, 9))])
    assert torch.equal(out, expected)
    assert not torch.allclose(ops.attention(qkv[None], True)[0], expected)
    with pytest.raises(ValueError, match="max_len is 4; the longest sequence has 5 tokens"):
        fused.attention_varlen(qkv, starts, 4, True)


def test_add_layer_norm_and_bias_quick_gelu_by_hand():
    x, residual, weight, bias = random(4, 3, 8).unbind()
    total, out = fused.add_layer_norm(x, residual, weight[0], bias[0], 1e-3)
    assert torch.equal(total, x + residual)
    centred = total - total.mean(-1, keepdim=True)
    torch.testing.assert_close(
        out, centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight[0] + bias[0]
    )
    y = x + bias[0]
    torch.testing.assert_close(fused.bias_quick_gelu(x, bias[0]), y / (1 + (-1.702 * y).exp()))


def test_similarity_by_hand():
    x, c, scale = random(3, 6), random(5, 6, seed=1), torch.tensor(7.0, dtype=torch.float64)
    logits = torch.tensor([[7 * F.cosine_similarity(a, b, dim=0) for b in c] for a in x], dtype=torch.float64)
    torch.testing.assert_close(cosines.similarity_softmax(x, c, scale), logits.softmax(1))
    probability, index, lse = cosines.similarity_topk(x, c, scale, 2)
    torch.testing.assert_close((probability, index), tuple(logits.softmax(1).topk(2)))
    torch.testing.assert_close(lse, logits.logsumexp(1))
    same = cosines.similarity_topk(x, c[:1].expand(50, 6), scale, 4)
    assert same[1].tolist() == [[0, 1, 2, 3]] * 3  # ties
    zero = cosines.similarity_softmax(x * 0, c, scale)
    assert torch.allclose(zero, torch.full_like(zero, 0.2))
    assert cosines.similarity_softmax(x.half(), c.half(), scale.float()).dtype == torch.float32
    with pytest.raises(ValueError, match="k is 6; expected 1 to 5"):
        cosines.similarity_topk(x, c, scale, 6)


def test_gradcheck():
    qkv = random(2, 3, 3, 2, 4).requires_grad_()
    starts = torch.tensor([0, 2, 6], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda x: ops.attention(x, True), qkv)
    assert torch.autograd.gradcheck(lambda x: fused.attention_varlen(x.flatten(0, 1), starts, 4), qkv)
    rows = [x.requires_grad_() for x in (random(3, 4), random(3, 4, seed=1), random(4), random(4, seed=1))]
    assert torch.autograd.gradcheck(fused.add_layer_norm, rows)
    assert torch.autograd.gradcheck(fused.bias_quick_gelu, (rows[0], rows[2]))
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cosines.similarity_softmax, (*rows[:2], scale))
    assert torch.autograd.gradcheck(contrastive_loss, (*rows[:2], scale))


def small_clip() -> CLIP:
    torch.manual_seed(0)
    block = TransformerConfig(width=64, layers=2, heads=2, mlp_width=128)
    config = CLIPConfig(16, ViTConfig(16, 8, block), TextConfig(8, 50, block), PreprocessConfig(16))
    return CLIP(config).eval()


def test_set_backend(monkeypatch):
    model = small_clip()
    with pytest.raises(ValueError, match='backend="triton" needs a GPU, and the model is on cpu'):
        set_backend(model, "triton")
    with pytest.raises(ValueError, match="backend is 'flash'"):
        set_backend(model, "flash")
    assert all(m.backend is None for m in model.modules() if isinstance(m, Attention))
    monkeypatch.setattr("miniclip.models.clip.check_backend", lambda *args: None)
    assert set_backend(model, "triton") is model
    backends = [m.backend for m in model.modules() if isinstance(m, Attention)]
    assert backends == ["triton"] * 4
    model(torch.zeros(1, 3, 16, 16), torch.ones(1, 8, dtype=torch.long))  # on a CPU it runs in PyTorch
