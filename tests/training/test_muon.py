"""Muon changes matrices as torch.optim.Muon does, whatever their shape, and the rest as AdamW."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_runs import VIT

from miniclip.config import CLIPConfig, ResNetConfig, TextConfig, openai_transformer
from miniclip.loading import new_model
from miniclip.training.gradient_cache import Embedder
from miniclip.training.muon import Muon, orthogonalize
from miniclip.training.optim import build_optimizer
from miniclip.training.options import TrainOptions

SETTINGS = {"lr": 0.1, "weight_decay": 0.2}
SHAPES = [(4, 4), (4, 4), (6, 4), (2, 5), (7, 3)]


def trained(optimizer, parameters, steps: int = 3) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=rng)
        optimizer.step()
    return [parameter.detach().clone() for parameter in parameters]


def parameters(shapes) -> list[torch.nn.Parameter]:
    rng = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=rng)) for shape in shapes]


def test_equals_pytorchs():
    theirs, mine = parameters(SHAPES), parameters(SHAPES)
    expected = trained(torch.optim.Muon(theirs, momentum=0.95, **SETTINGS), theirs)
    got = trained(Muon([{"params": mine, "muon": True}], **SETTINGS), mine)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-2 * SETTINGS["lr"])  # products in bfloat16
    other = parameters(SHAPES)  # negative control: without Nesterov's step ahead
    other = trained(torch.optim.Muon(other, momentum=0.95, nesterov=False, **SETTINGS), other)
    assert max((a - b).abs().max() for a, b in zip(got, other, strict=True)) > 0.05


def test_a_convolution_is_a_matrix_and_a_packed_weight_three():
    (kernel,), (matrix,) = parameters([(5, 2, 3, 3)]), parameters([(5, 18)])
    optimizers = [Muon([{"params": [x], "muon": True}], **SETTINGS) for x in (kernel, matrix)]
    kernel.data = kernel.data.to(memory_format=torch.channels_last)
    rng = torch.Generator().manual_seed(1)
    for _ in range(3):
        matrix.grad = torch.randn(5, 18, generator=rng)
        kernel.grad = matrix.grad.reshape(5, 2, 3, 3)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(kernel.detach().flatten(1), matrix.detach(), rtol=0, atol=1e-6)

    (packed,) = parameters([(12, 4)])
    parts = [torch.nn.Parameter(part.clone()) for part in packed.detach().chunk(3)]
    packed.grad = torch.randn(12, 4, generator=rng)
    for part, gradient in zip(parts, packed.grad.chunk(3), strict=True):
        part.grad = gradient.clone()
    for group in ([packed], parts):
        Muon([{"params": group, "muon": True}], **SETTINGS).step()
    torch.testing.assert_close(packed.detach(), torch.cat(parts).detach(), rtol=0, atol=1e-6)


def test_other_groups_are_adamws():
    theirs, mine = parameters([(3, 2), (4,)]), parameters([(3, 2), (4,)])
    matrices = parameters([(4, 4)])
    groups = [{"params": matrices, "muon": True}, {"params": mine, "muon": False}]
    expected = trained(torch.optim.AdamW(theirs, **SETTINGS, fused=True), theirs)
    assert all(map(torch.equal, trained(Muon(groups, **SETTINGS, fused=True), mine), expected))
    assert torch.equal(matrices[0], parameters([(4, 4)])[0])  # it had no gradient


def test_a_step_that_overflows_changes_nothing():
    matrices = parameters([(4, 4)])
    optimizer = Muon([{"params": matrices, "muon": True}], **SETTINGS, fused=True)
    matrices[0].grad = torch.full((4, 4), torch.inf)
    optimizer.found_inf = torch.ones(1)
    optimizer.step()
    assert torch.equal(matrices[0], parameters([(4, 4)])[0])


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_singular_values_are_about_one(rows, columns, seed):
    x = torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(seed))
    change = orthogonalize(x)
    before, after = torch.linalg.svdvals(x), torch.linalg.svdvals(change)
    regular = before > 0.05 * before[:, :1]  # smaller ones are on their way to 1
    assert (after[regular] > 0.6).all() and (after < 1.3).all()


@pytest.mark.parametrize("vision", [VIT.vision, ResNetConfig(32, 8, (1, 1, 1, 1), 4)])
def test_which_parameters_are_matrices(vision):
    config = CLIPConfig(32, vision, TextConfig(7, 60, openai_transformer(64, 1)), VIT.preprocess)
    embedder = Embedder(new_model(config))
    options = TrainOptions(lr=1e-3, muon_lr=0.02, weight_decay=0.3)
    optimizer = build_optimizer(embedder, options)
    of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(of) == len(list(embedder.parameters()))
    matrices = {name for name, p in embedder.clip.named_parameters() if of[id(p)]["muon"]}
    assert {"visual.conv1.weight", "transformer.resblocks.0.attn.in_proj_weight", "text_projection"} <= matrices
    assert not any("embedding" in name or "bias" in name or "ln_" in name or ".bn" in name for name in matrices)
    for group in optimizer.param_groups:
        assert group["lr_scale"] == (20 if group["muon"] else 1)
    plain = build_optimizer(embedder, TrainOptions())
    assert type(plain) is torch.optim.AdamW and not any(group["muon"] for group in plain.param_groups)
