"""The similarity kernels in Triton's interpreter, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import HALVES, PROBABILITY, random
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from miniclip import cosines
from miniclip.kernels import similarity as kernel_module
from miniclip.kernels import tiles
from miniclip.kernels.similarity import similarity_softmax, similarity_topk

SCALE = torch.tensor(100.0)


def embeddings(n: int, m: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Of lengths other than 1, as the towers give them."""
    return 3 * random(n, width, dtype=dtype), random(m, width, dtype=dtype, seed=1)


def check(x, c, scale, k) -> None:
    probability, index, lse = cosines.similarity_topk(x.double(), c.double(), scale.double(), k)
    got = similarity_topk(x, c, scale, k)
    assert torch.equal(got[1], index)
    assert (got[0] - probability).abs().max() < PROBABILITY
    assert (got[2] - lse).abs().max() < 5e-7 * scale.clamp(min=10)
    everything = similarity_softmax(x, c, scale)
    assert everything.dtype == torch.float32
    expected = cosines.similarity_softmax(x.double(), c.double(), scale.double())
    assert everything.shape == expected.shape and (everything - expected).abs().max() < PROBABILITY


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize(
    "n, m, width, k", [(1, 1, 64, 1), (1, 130, 64, 5), (3, 65, 100, 3), (37, 64, 512, 16), (2, 20, 640, 16)]
)
def test_matches_float64(n, m, width, k, dtype):
    check(*embeddings(n, m, width, dtype), SCALE, k)


@pytest.mark.parametrize("scale", [0.0, 1.0, -14.0, 100.0])
def test_scales(scale):
    x, c = embeddings(2, 30, 32, torch.float16)
    if scale == 0:  # all logits are equal
        assert similarity_topk(x, c, torch.tensor(0.0), 4)[1].tolist() == [[0, 1, 2, 3]] * 2
        c = c[:1]
    check(x, c, torch.tensor(scale), 1)


@pytest.mark.parametrize("architecture", tiles.ARCHITECTURES)
@pytest.mark.parametrize("n", [20, 40, 260])
def test_every_tile(architecture, n, monkeypatch):
    monkeypatch.setattr(tiles, "architecture", lambda device: architecture)
    check(*embeddings(n, 70, 32, torch.float16), SCALE, 2)


@pytest.mark.parametrize("programs", [1, 2, 256])
def test_split_classes(programs, monkeypatch):
    """Also a last share that is not full, and shares with fewer classes than k. At this scale every class counts."""
    monkeypatch.setattr(tiles, "PROGRAMS", programs)
    check(*embeddings(2, 200, 32, torch.float16), torch.tensor(1.0), 12)


def test_ties_go_to_the_lower_index():
    """Vectors of -1, 0 and 1, of equal length, give logits that are equal to the last bit; 200 classes, in 4 shares."""
    generator = torch.Generator().manual_seed(0)
    c = torch.zeros(200, 32).scatter(1, torch.rand(200, 32, generator=generator).argsort(1)[:, :16], 1.0)
    c = c * (torch.randint(0, 2, (200, 32), generator=generator) * 2 - 1)
    x = torch.cat([c[:2], torch.ones(1, 32)]).half()
    logits = x.float() @ c.T
    assert all(len(row.unique()) < 20 for row in logits)
    expected = logits.sort(dim=1, descending=True, stable=True).indices[:, :16]
    assert torch.equal(similarity_topk(x, c.half(), torch.tensor(1.0), 16)[1], expected)
    assert torch.equal(similarity_topk(x, -c.half(), torch.tensor(-1.0), 16)[1], expected)
    assert not torch.equal(logits.flip(1).sort(dim=1, descending=True, stable=True).indices[:, :16], expected)


def test_zero_rows():
    x, c = embeddings(3, 70, 32, torch.float16)
    x[1], c[5] = 0, 0
    check(x[::2].contiguous(), c, SCALE, 3)
    probability, index, _ = similarity_topk(x, c, SCALE, 3)
    assert index[1].tolist() == [0, 1, 2] and (probability[1] - 1 / 70).abs().max() < 1e-7
    assert (similarity_softmax(x, c, SCALE)[1] - 1 / 70).abs().max() < 1e-7


@pytest.mark.parametrize("bits", [0x7E00, -0x200])  # NaN of either sign
def test_nan(bits):
    nan = torch.tensor(bits, dtype=torch.int16).view(torch.float16)
    x, c = embeddings(3, 70, 32, torch.float16)
    clean = similarity_topk(x, c, SCALE, 3)
    x[1] = nan
    got = similarity_topk(x, c, SCALE, 3)
    assert got[0][1].isnan().all() and got[2][1].isnan() and similarity_softmax(x, c, SCALE)[1].isnan().all()
    assert got[1][1].tolist() == [0, 1, 2]  # equals
    for a, b in zip(clean, got, strict=True):
        assert torch.equal(a[[0, 2]], b[[0, 2]])
    c[66] = nan  # a class in every softmax
    probability, index, _ = similarity_topk(x, c, SCALE, 3)
    assert probability.isnan().all() and index[0, 0] == 66 and index[0, 1:].tolist() == clean[1][0, :2].tolist()
    expected = cosines.similarity_topk(x, c, SCALE, 3)
    assert torch.equal(index, expected[1]) and expected[0].isnan().all()


def test_accuracy_that_half_precision_does_not_have():
    """The claim in numbers: what rounding embeddings, cosines or probabilities to half precision would do."""
    for dtype, loss in (torch.float16, 5e-4), (torch.bfloat16, 5e-3):
        x, c = embeddings(4, 60, 64, dtype)
        exact = cosines.similarity_softmax(x.double(), c.double(), SCALE.double())
        naive = (100 * F.normalize(x, dim=1) @ F.normalize(c, dim=1).T).softmax(1)
        assert (naive - exact).abs().max() > loss
        assert (similarity_softmax(x, c, SCALE) - exact).abs().max() < PROBABILITY


def test_strides():
    x, c = random(9, 80, dtype=torch.float16)[::2, 8:72], random(50, 3, 64, dtype=torch.float16, seed=1)[:, 1]
    assert not x.is_contiguous() and not c.is_contiguous()
    check(x, c, SCALE, 3)


@pytest.mark.filterwarnings("ignore")
def test_opcheck_compile_and_shapes():
    x, c = embeddings(2, 20, 32, torch.float16)
    torch.library.opcheck(torch.ops.miniclip.similarity_topk.default, (x, c, SCALE, 3))
    torch.library.opcheck(torch.ops.miniclip.similarity_softmax.default, (x, c, SCALE))
    compiled = torch.compile(lambda x: similarity_topk(x, c, SCALE, 3), backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, compiled(x), similarity_topk(x, c, SCALE, 3)))
    with FakeTensorMode():
        x = torch.empty(50_000, 768, device="cuda", dtype=torch.float16)
        got = similarity_topk(x, x.narrow(0, 0, 21_841), torch.ones((), device="cuda"), 5)
        assert [y.shape for y in got] == [(50_000, 5), (50_000, 5), (50_000,)] and got[1].dtype == torch.int64


def test_errors():
    x, c = embeddings(2, 20, 32, torch.float16)
    for arguments, message in (
        ((x, c[:, :16], SCALE, 1), r"x has shape \[2, 32\] and c \[20, 16\]"),
        ((x, c.float(), SCALE, 1), "x is torch.float16 and c torch.float32"),
        ((x, c, SCALE.half(), 1), "logit_scale is torch.float16"),
        ((x, c.T.contiguous().T, SCALE, 1), "c has a last stride of 20; expected 1"),
        ((x, c, SCALE, 17), "k is 17; the kernel takes 1 to 16 of 20"),
        ((x, c[:3], SCALE, 4), "k is 4; the kernel takes 1 to 3 of 3"),
        ((x, c, SCALE, 0), "k is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            similarity_topk(*arguments)


def test_no_queries():
    x, c = embeddings(0, 20, 32, torch.float16)
    assert similarity_softmax(x, c, SCALE).shape == (0, 20)
    assert [y.shape for y in similarity_topk(x, c, SCALE, 3)] == [(0, 3), (0, 3), (0,)]
    with pytest.raises(ValueError, match="there are no classes"):
        similarity_softmax(c, x, SCALE)


def test_more_classes_than_a_grids_second_dimension_takes(monkeypatch):
    """The grid's size, and that its programs cover each tile once: the kernels themselves would take minutes here."""
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *_, **__: None

    monkeypatch.setattr(kernel_module, "softmax_kernel", Kernel())
    monkeypatch.setattr(kernel_module, "_statistics", lambda inputs, sizes, k: (None, None, None))
    monkeypatch.setattr(kernel_module, "_arguments", lambda x, c, scale: ([x], []))
    x, c = torch.empty(1, 8, dtype=torch.float16), torch.empty(1, 8, dtype=torch.float16).expand(5_000_000, 8)
    similarity_softmax(x, c, SCALE)
    assert grids == [(5_000_000 // 64,)] and grids[0][0] > 65_535


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_plain_form_in_chunks(dtype, monkeypatch):
    """Against a stable sort of all logits: ties, NaN, rows that end a chunk."""
    generator = torch.Generator().manual_seed(0)
    x, c = ((torch.randint(0, 2, (n, 4), generator=generator) * 2 - 1).to(dtype) for n in (23, 40))  # of length 2
    x[5], c[7] = float("nan"), float("nan")
    x[6], c[8] = 0, 0
    scale = torch.tensor(3.0, dtype=dtype)
    logits = scale * F.normalize(x, dim=1) @ F.normalize(c, dim=1).T
    held = []
    topk = cosines._topk
    monkeypatch.setattr(cosines, "_topk", lambda logits, k: held.append(logits.numel()) or topk(logits, k))
    monkeypatch.setattr(cosines, "CHUNK_LOGITS", 5 * 40)
    for k in 1, 3, 40:
        held.clear()
        probability, index, lse = cosines.similarity_topk(x, c, scale, k)
        assert held == [200] * 4 + [120]
        assert torch.equal(index, logits.sort(dim=1, descending=True, stable=True).indices[:, :k])
        torch.testing.assert_close(probability, logits.softmax(1).gather(1, index), equal_nan=True)
        torch.testing.assert_close(lse, logits.logsumexp(1), equal_nan=True)


def test_the_plain_form_sorts_no_row(monkeypatch):
    x, c = embeddings(3, 5000, 32, torch.float16)
    with Calls() as seen:
        cosines.similarity_topk(x, c, SCALE, 5)
    sorted_ = [args[0].shape[1] for name, args in seen.calls if name.startswith("aten::sort")]
    assert sorted_ and max(sorted_) == 5


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append((function._schema.name, args))
        return function(*args, **(kwargs or {}))
