"""What is derived from weights is kept, and follows every edit of the weights."""

import copy
import io
import threading

import pytest
import torch
from fast_cases import difference, ids, pixels, seeded_model

from miniclip import load
from miniclip.errors import MiniclipError
from miniclip.fast import half, int8, prepared
from miniclip.fast.prepared import Prepared
from miniclip.models import CLIP, convert_weights

KINDS = ("float32", "bfloat16", "emulated", "int8")


@pytest.fixture
def model(kind: str, case: str, monkeypatch) -> CLIP:
    model = seeded_model(case)
    if kind == "int8":
        return int8.quantize(model)
    if kind == "emulated":
        if not half.HAS_FBGEMM:
            pytest.skip("PyTorch has no FBGEMM here")
        monkeypatch.setattr(half, "EMULATED", frozenset([torch.float16, torch.bfloat16]))
        return convert_weights(model, torch.float16)
    return convert_weights(model, getattr(torch, kind))


def embed(model: CLIP) -> torch.Tensor:
    text = torch.tensor([[1, 5, 6, model.vocab_size - 1], [2, model.vocab_size - 1, 0, 0]])
    return torch.cat([model.encode_image(pixels(model).to(model.dtype)), model.encode_text(text)])


def first_matrix(model: CLIP) -> torch.nn.Parameter:
    """A weight of the text tower, which every case has."""
    return model.transformer.resblocks[0].mlp.c_fc.weight


def step(model: CLIP) -> None:
    weight = first_matrix(model)
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.1).step()
    weight.grad = None


def replace(model: CLIP) -> None:
    model.transformer.resblocks[0].mlp.c_fc.weight = torch.nn.Parameter(first_matrix(model) * 0.5)


def replace_module(model: CLIP) -> None:
    changed = copy.deepcopy(model.transformer.resblocks[0].mlp)
    changed.c_fc.weight.mul_(0.5)
    model.transformer.resblocks[0].mlp = changed


def assign_data(model: CLIP) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.9


def load_weights(model: CLIP, **options) -> None:
    model.load_state_dict({name: value * 0.9 for name, value in model.state_dict().items()}, **options)


@torch.inference_mode()
def edit_in_inference_mode(model: CLIP) -> None:
    first_matrix(model).mul_(0.5)


def average(model: CLIP) -> None:
    """As helpers for averages of weights do it, uncounted by PyTorch."""
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data * 0.9)


def cast_and_back(model: CLIP) -> None:
    first = first_matrix(model)
    model.to(torch.float64)
    first.data = first.data * 0.5
    convert_weights(model, torch.float32)


def train_and_back(model: CLIP) -> None:
    model.train()
    first_matrix(model).data[9, 3] = 100.0
    model.eval()


EDITS = {
    "in place": lambda model: first_matrix(model).mul_(0.5),
    "one value": lambda model: first_matrix(model).__setitem__((3, 2), 100.0),
    "optimiser": step,
    "assignment": replace,
    "module": replace_module,
    "load_state_dict": load_weights,
    "load_state_dict, assign": lambda model: load_weights(model, assign=True),
    ".data =": assign_data,
    ".data.mul_": lambda model: first_matrix(model).data.mul_(0.5),
    ".data.copy_": average,
    "inference mode": edit_in_inference_mode,
    "through NumPy": lambda model: first_matrix(model).data.view(torch.int8).numpy().__imul__(0),
    "position": lambda model: model.positional_embedding.data.mul_(2),
    "norm": lambda model: model.ln_final.weight.data.mul_(torch.linspace(0, 1, len(model.ln_final.weight))),
    "projection": lambda model: model.text_projection.data.mul_(2),
    "training": train_and_back,
    "forget": lambda model: (first_matrix(model).data[7, 5].fill_(100.0), model.forget()),
}


@pytest.mark.parametrize("case", ["vit", "resnet"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_no_edit_leaves_a_stale_answer(model, kind):
    for name, edit in EDITS.items():
        before = embed(model)
        edit(model)
        after = embed(model)
        assert not torch.equal(after, before), name
        assert torch.equal(after, embed(copy.deepcopy(model))), name


@pytest.mark.parametrize("case", ["resnet"])
@pytest.mark.parametrize("kind", ["float32"])
@torch.no_grad()
def test_batch_norms_count_too(model):
    for buffer in (model.visual.bn1.running_var, model.visual.layer2[0].bn3.running_mean):
        before = embed(model)
        buffer.data.add_(0.5)
        after = embed(model)
        assert not torch.equal(after, before) and torch.equal(after, embed(copy.deepcopy(model)))


@pytest.mark.parametrize("case", ["vit"])
@pytest.mark.parametrize("kind", ["float32"])
@torch.no_grad()
def test_without_samples_an_uncounted_edit_is_missed(model, monkeypatch):
    """Negative control."""
    monkeypatch.setattr(prepared, "_sample", lambda tensor: torch.zeros(1).numpy())
    before = embed(model)
    first_matrix(model).data.mul_(0.5)
    assert torch.equal(embed(model), before)


@torch.no_grad()
def test_only_what_changed_is_derived_again():
    made, tensors = [], [torch.ones(3, 2), torch.ones(4)]

    def double(tensor):
        made.append(len(tensor))
        return 2 * tensor

    kept = Prepared()

    def get():
        return kept.get(tensors, lambda derive: [derive(double, tensor) for tensor in tensors])

    first = get()
    assert made == [3, 4] and get() is first
    tensors[1].mul_(3)
    assert made == [3, 4] and get()[1].tolist() == [6, 6, 6, 6] and made == [3, 4, 4]
    assert get()[0] is first[0]


@pytest.mark.parametrize("case", ["vit", "resnet"])
@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_a_copy_has_copies_of_its_own(model):
    with torch.no_grad():
        expected = embed(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert torch.equal(embed(other), expected) and other.fast
            first_matrix(other).mul_(0.5)
            assert not torch.equal(embed(other), expected) and torch.equal(embed(model), expected)


@pytest.mark.parametrize("case", ["vit"])
@pytest.mark.parametrize("kind", ["float32"])
def test_when_it_is_dropped(model):
    for drop in (model.forget, model.train, lambda: model.to(torch.float64)):
        with torch.no_grad():
            embed(model.eval())
        assert "_kept" in model.__dict__
        drop()
        assert "_kept" not in model.__dict__


@pytest.mark.parametrize("case", ["vit", "resnet"])
@pytest.mark.parametrize("kind", ["float32"])
@torch.no_grad()
def test_functional_weights(model):
    before, halved = embed(model), {name: value * 0.5 for name, value in model.named_parameters()}
    arguments = pixels(model), ids(model, [3, 5])
    for weights in (halved, {name: torch.nn.Parameter(value) for name, value in halved.items()}):
        expected = copy.deepcopy(model)
        expected.load_state_dict(weights, strict=False)
        expected.fast = False
        found = torch.func.functional_call(model, weights, arguments)
        torch.testing.assert_close(found[0], expected(*arguments)[0], atol=1e-4, rtol=1e-4)
        assert torch.equal(embed(model), before)


@pytest.mark.parametrize("case", ["vit"])
@pytest.mark.parametrize("kind", ["float32"])
@torch.no_grad()
def test_function_transforms_run_plainly(model):
    images = pixels(model, 3)
    mapped = torch.func.vmap(lambda image: model.encode_image(image[None])[0])(images)
    torch.testing.assert_close(mapped, model.encode_image(images), atol=1e-5, rtol=1e-5)


def test_a_model_loaded_in_inference_mode_can_be_trained():
    with torch.inference_mode():
        model, _ = load("tiny-ViT", device="cpu")
        embed(model)
    embed(model.train()).sum().backward()
    assert not any(tensor.is_inference() for tensor in model.state_dict().values())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = first_matrix(model).clone()
    optimizer.step()
    assert not torch.equal(first_matrix(model), before)


@pytest.mark.parametrize("case", ["vit"])
@pytest.mark.parametrize("kind", ["float32"])
def test_threads_agree(model):
    with torch.no_grad():
        expected, found = embed(model), []
    model.forget()

    @torch.no_grad()
    def run():
        found.extend(embed(model) for _ in range(5))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20
    for embedding in found:
        torch.testing.assert_close(embedding, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_channels_last_weights_are_watched():
    model = seeded_model("resnet").to(memory_format=torch.channels_last)
    before = model.encode_image(pixels(model))
    model.visual.conv2.weight.data.mul_(torch.linspace(0, 2, len(model.visual.conv2.weight))[:, None, None, None])
    assert not torch.equal(model.encode_image(pixels(model)), before)
    assert difference(model, lambda model: model.encode_image(pixels(model))) <= 1e-6


@pytest.mark.parametrize("case", ["vit", "resnet"])
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_prepare_makes_everything_and_may_free_the_weights(model, kind, monkeypatch):
    expected = embed(model)
    model.forget()
    assert model.prepare() is model
    with monkeypatch.context() as patched:
        patched.setattr(prepared, "_State", None)  # nothing is made any more
        assert torch.equal(embed(model), expected)
    assert model.prepare(free=True).prepare(free=True).freed
    assert torch.equal(embed(model), expected)
    assert [name for name, parameter in model.named_parameters() if parameter.numel()] == ["logit_scale"]


@pytest.mark.parametrize("case", ["vit"])
@pytest.mark.parametrize("kind", ["float32"])
def test_what_a_model_without_weights_refuses(model):
    text, weights = ids(model, [3]), model.state_dict()
    model.prepare(free=True)
    for refused in (
        lambda: model.encode_text(text),  # with gradients
        lambda: model.load_state_dict(weights),
        lambda: copy.deepcopy(model),
        lambda: model.to(torch.float64),
        model.state_dict,
        model.train,
        model.forget,
    ):
        with pytest.raises(MiniclipError, match="weights were freed"):
            refused()
    model.fast = False
    with torch.no_grad(), pytest.raises(MiniclipError, match="weights were freed"):
        model.encode_text(text)


@pytest.mark.parametrize("case", ["vit"])
@pytest.mark.parametrize("kind", ["float32"])
def test_a_changed_tower_keeps_its_weights(model):
    model.visual.register_forward_hook(lambda *_: None)
    with pytest.raises(MiniclipError, match="image tower has no fast form here, or was changed"):
        model.prepare(free=True)
    assert not model.freed and model.visual.proj.numel()
