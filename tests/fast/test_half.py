"""Half-precision weights where a CPU has no arithmetic for them: exact products, and copies that follow the weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conformance.openai_cases import CASES
from conformance.seeded import image, weights

from miniclip.fast import half
from miniclip.fast.clip import FastCLIP
from miniclip.models import CLIP, convert_weights

HALF = (torch.float16, torch.bfloat16)

if "fbgemm" not in torch.backends.quantized.supported_engines:
    pytest.skip("PyTorch has no FBGEMM here", allow_module_level=True)


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    """As on a CPU that is slow at both, whichever this is."""
    monkeypatch.setattr(half, "EMULATED", frozenset(HALF))


def seeded_model(case: str = "vit", dtype: torch.dtype = torch.float16) -> CLIP:
    model = FastCLIP(CASES[case]).eval()
    model.load_state_dict(weights({name: tuple(value.shape) for name, value in model.state_dict().items()}))
    return convert_weights(model, dtype)


def pixels(model: CLIP) -> torch.Tensor:
    return image(3, model.config.vision.image_size)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_products_are_float32s(dtype):
    x, weight = torch.randn(2, 5, 64, 16, generator=torch.Generator().manual_seed(0))
    weight = weight[:2].to(dtype).view(2, 64, 4, 4)
    exact = x.double() @ weight[0].flatten(1).T.double()

    def error(weight):
        return ((half.product(x, half.pack(weight)) - exact).norm() / exact.norm()).item()

    assert error(weight[0]) < 1e-6
    assert error(weight[0].bfloat16() if dtype is torch.float16 else weight[0] * 1.01) > 1e-4  # negative control


def test_what_float16_cannot_hold_of_bfloat16():
    values = torch.tensor([2.0**-14, 3e-7, 2.0**-30, -1e6]).bfloat16()
    got = half.product(torch.ones(1, 1), half.pack(values[:, None]))[0]
    assert got.tolist() == [2.0**-14, 5 * 2.0**-24, 0, -65504]


@torch.no_grad()
@pytest.mark.parametrize(
    ("cast", "limit"), [(lambda model: model, 1e-7), (torch.nn.Module.half, 1e-6)], ids=["as released", "norms too"]
)
@pytest.mark.parametrize("case", CASES)
def test_embeddings_are_float32s_of_the_same_weights(case, cast, limit, monkeypatch):
    """But for their last rounding."""
    model = cast(seeded_model(case))
    exact = copy.deepcopy(model).float()
    x = pixels(model).half()
    ids = torch.randint(model.vocab_size - 1, (4, 9), generator=torch.Generator().manual_seed(0))
    ids[:, 5] = model.vocab_size - 1

    def angle() -> float:
        """1 - cosine, at the most."""
        got, expected = (torch.cat([m.encode_image(x.to(m.dtype)), m.encode_text(ids)]) for m in (model, exact))
        assert got.dtype == torch.float16
        return 1 - F.cosine_similarity(got.double(), expected.double()).min().item()

    assert angle() < limit
    right = half.product
    monkeypatch.setattr(half, "product", lambda x, packed: right(x.bfloat16().float(), packed))
    assert angle() > limit


@pytest.mark.parametrize("emulated", [HALF, frozenset()], ids=["emulated", "native"])
def test_what_is_computed_in(emulated, monkeypatch):
    monkeypatch.setattr(half, "EMULATED", emulated)
    for dtype in HALF:
        assert half.arithmetic(dtype) is (torch.float32 if emulated else dtype)
    for dtype in (torch.float32, torch.float64):
        assert half.arithmetic(dtype) is dtype
