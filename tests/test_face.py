"""What `from miniclip import ...` offers: names found by completion, imported at first use, and typed."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import miniclip
from miniclip import TrainOptions, classify, embed_images, load, search_pictures, similarity, train
from miniclip.answers import find_pictures
from miniclip.config import CLIPConfig, PreprocessConfig, TextConfig, ViTConfig, openai_transformer, to_json
from miniclip.errors import UsageError
from miniclip.io import write_json
from miniclip.preprocess import ImageError

IMAGES = Path(__file__).parents[1] / "examples" / "images"
DOG = IMAGES / "dog.png"

TYPED = """
from pathlib import Path
from PIL import Image
from torch import Tensor
from miniclip import (
    CLIP, Index, TrainOptions, ZeroShotClassifier, available_models, build_model, classify, compare, embed_images,
    embed_texts, evaluate, explore, load, open_image, search_pictures, similarity, tokenize, trace, train,
)

model, preprocess = load("tiny-ViT", dtype="float32")
pixels: Tensor = preprocess(open_image("a.png"))
embedding: Tensor = model.encode_image(pixels[None], normalize=True)
words: Tensor = model.encode_text(tokenize(["a", "b"]))
names: list[str] = available_models()
rebuilt: CLIP = build_model(model.state_dict())
label: str = classify([Path("a.png"), Image.new("RGB", (3, 3))], ["a", "b"], model="tiny-ViT")[0][0].label
cosines: Tensor = similarity(model, "a.png", "a")
score: float = search_pictures((model, preprocess), "a", "folder")[0].score
images, rejected = embed_images(model, preprocess, "a.png")
why: str = rejected[0]
passed: bool = compare(trace(model, text="a"), trace(model, text="a")).passed
table: str = explore("temperature", model="tiny-ViT", seed=1).table
figures: dict[str, object] = evaluate(model, preprocess, "sample")
again: CLIP = train("pictures.json", epochs=1)
trained: CLIP = train(TrainOptions(create_synthetic=True, epochs=1))
both: int = len(Index("photos.index")) + len(ZeroShotClassifier(model, ["a", "b"]).classes)
texts: Tensor = embed_texts(model, "a")[0]
"""
WRONG = 'load(5)\nclassify("a.png", 3)\nlabel = 5\nmodel.encode_img(pixels)\n'


def test_names_are_listed_and_lead_somewhere():
    assert dir(miniclip) == sorted([*miniclip.__all__, "__version__"])
    assert miniclip._MODULES.keys() == set(miniclip.__all__)
    for name in miniclip.__all__:
        assert callable(getattr(miniclip, name))
    with pytest.raises(AttributeError, match="no attribute 'clasify'"):
        miniclip.clasify  # noqa: B018
    with pytest.raises(AttributeError, match=r"in clip.model is in miniclip.models"):
        miniclip.model  # noqa: B018


def test_type_checkers_and_python_find_the_same():
    source = Path(miniclip.__file__).read_text(encoding="utf-8")
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    typed = {a.name: node.module for node in nodes if node.module.startswith("miniclip") for a in node.names}
    assert typed.pop("__version__") == "miniclip.version"
    assert typed.keys() == set(miniclip.__all__)
    for name, module in typed.items():
        assert getattr(import_module(module), name) is getattr(miniclip, name)
    assert (Path(miniclip.__file__).parent / "py.typed").exists()


def test_a_checkout_has_no_second_copy_of_anything():
    for module in ("setup", "miniclip", "tests", "examples"):
        with pytest.raises(ModuleNotFoundError):
            import_module(f"miniclip.{module}")
    assert import_module("miniclip.weights").__name__ == "miniclip.weights"


@pytest.mark.slow  # reads the types of PyTorch
def test_the_face_is_typed(tmp_path):
    pytest.importorskip("mypy")
    file = tmp_path / "face.py"
    for code, errors in (TYPED, 0), (TYPED + WRONG, 4):
        file.write_text(code)
        command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", str(file)]
        environment = {"MYPYPATH": str(Path(__file__).parents[1]), "MYPY_CACHE_DIR": str(tmp_path / "cache")}
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout.count(" error: ") == errors, done.stdout + done.stderr


@pytest.fixture(scope="module")
def tiny():
    return load("tiny-ViT", device="cpu")


def test_classify(tiny):
    labels = ["a dog", "a guitar", "a pizza"]
    found = classify([DOG, IMAGES / "guitar.png"], labels, model="tiny-ViT")
    assert [each[0].label for each in found] == ["a dog", "a guitar"]
    for each in found:
        assert [label.score for label in each] == sorted((label.score for label in each), reverse=True)
        assert sum(label.score for label in each) == pytest.approx(1)
        logits = tiny[0].logit_scale.exp().item() * torch.tensor([label.cosine for label in each])
        torch.testing.assert_close(logits.softmax(0), torch.tensor([label.score for label in each]))
    assert repr(found[0]).startswith(f"{DOG}: a dog {found[0][0].score:.1%}, ")
    assert found[0]._repr_png_()[:4] == b"\x89PNG"
    with pytest.raises(UsageError, match="a single label"):
        classify(DOG, ["a dog"], model=tiny)
    with pytest.raises(UsageError, match="a single label"):
        classify(DOG, "dog", model=tiny)  # not three letters
    with pytest.raises(UsageError, match="there are no labels"):
        classify(DOG, [], model=tiny)


def test_a_model_in_another_place(tiny):
    expected = similarity(tiny, DOG, ["a dog"])
    assert torch.equal(similarity(DOG, ["a dog"], model="tiny-ViT"), expected)
    assert torch.equal(similarity(texts=["a dog"], pictures=DOG, model=tiny), expected)
    found = search_pictures("a guitar", IMAGES, 3, model=tiny)
    assert found == search_pictures(tiny, "a guitar", IMAGES, top=3) and len(found) == 3
    labels = ["a dog", "a cat"]
    for call in (
        lambda: classify(tiny, DOG, labels),
        lambda: classify("tiny-ViT", DOG, tuple(labels)),
        lambda: similarity(DOG, labels, "tiny-ViT"),
        lambda: similarity([DOG], labels, "tiny-ViT"),
        lambda: search_pictures(["a guitar"], IMAGES, tiny),
    ):
        with pytest.raises(UsageError, match=r"for the model; .* classify\(pictures, labels, model\), similarity"):
            call()


def test_pictures_in_every_form_are_the_same_picture(tiny, tmp_path):
    pixels = np.asarray(Image.open(DOG).convert("RGB"))
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    Image.new("RGB", (9, 9), "red").save(tmp_path / "b.png")
    model, _ = tiny
    one, red = similarity(tiny, tmp_path, ["a dog", "a guitar"])
    for form in (tmp_path / "a.png", str(tmp_path / "a.png"), image, pixels, [pixels]):
        torch.testing.assert_close(similarity(model, form, ["a dog", "a guitar"]), one[None], atol=1e-6, rtol=0)
    assert (one - red).abs().max() > 0.01
    assert [picture.name for picture in find_pictures([image, pixels])] == ["picture 1", "picture 2"]
    for form in (image, pixels, [pixels, image][:1]):
        embeddings, rejected = embed_images(*tiny, form)
        assert not rejected and torch.equal(embeddings, embed_images(*tiny, image)[0])
    assert "float32" in embed_images(*tiny, np.zeros((3, 3, 3), np.float32))[1][0]


def test_train_takes_what_its_options_take(monkeypatch):
    taken = []
    monkeypatch.setattr("miniclip.training.train.complete", lambda options, device: taken.append(options) or 1 / 0)
    options = TrainOptions("a.json", epochs=3)
    for call in (lambda: train("a.json", epochs=3), lambda: train(options), lambda: train(data="a.json", epochs=3)):
        with pytest.raises(ZeroDivisionError):
            call()
    with pytest.raises(ZeroDivisionError):
        train(options, seed=1)
    assert taken == [options] * 3 + [TrainOptions("a.json", epochs=3, seed=1)]
    with pytest.raises(TypeError, match="epoch"):
        train("a.json", epoch=3)


def test_a_picture_from_the_web(tiny, tmp_path, monkeypatch):
    urls = []
    monkeypatch.setattr("miniclip.answers.urlopen", lambda url, timeout: urls.append(url) or DOG.open("rb"))
    url = "https://example.com/dog.png"
    assert torch.equal(similarity(tiny, url, "a dog"), similarity(tiny, DOG, "a dog"))
    assert urls == [url]
    monkeypatch.setattr("miniclip.answers.MOST_BYTES", 100)
    with pytest.raises(ImageError, match="too many for a picture"):
        similarity(tiny, url, "a dog")


def test_search_pictures(tiny):
    found = search_pictures(tiny, "a guitar", IMAGES, top=3)
    cosines = similarity(tiny, sorted(IMAGES.glob("*.png")), "a guitar")[:, 0]
    assert [match.score for match in found] == sorted(cosines.tolist(), reverse=True)[:3]
    assert found[0].picture.name.endswith("guitar.png") and repr(found[0]).endswith("guitar.png")
    assert len(search_pictures(tiny, ["a guitar", "a dog"], [DOG])) == 1


def test_train_classify_and_search_in_a_few_lines(tmp_path, monkeypatch):
    """With the names of the face alone; the config is there to make it quick."""
    layers = openai_transformer(64, 1)
    config = CLIPConfig(32, ViTConfig(32, 16, layers), TextConfig(77, 49408, layers), PreprocessConfig(32))
    write_json(tmp_path / "small.json", to_json(config))
    monkeypatch.chdir(tmp_path)
    model = train(TrainOptions(create_synthetic=True, synthetic_pictures=2, steps=1, model_size="small.json"))
    (labels,) = classify("shapes/train/red_square_000.png", ["a red square", "a blue circle"], model=model)
    assert {label.label for label in labels} == {"a red square", "a blue circle"}
    found = search_pictures(model, "a red shape", "shapes", top=3)
    assert len(found) == 3 and all(match.picture.name.startswith("shapes/") for match in found)


@pytest.mark.parametrize(
    ("pictures", "error", "message"),
    [
        ("gone.png", ImageError, "gone.png"),
        ([], ImageError, "no pictures in an empty list"),
        (5, TypeError, "got int"),
        ([DOG, 5], TypeError, "picture 2 is a int"),
        (np.zeros((3, 3)), ImageError, "float64"),
        (["gone.png", "lost.png"], ImageError, "1 others"),
    ],
)
def test_pictures_that_can_not_be_used(tiny, pictures, error, message):
    with pytest.raises(error, match=message):
        similarity(tiny, pictures, "a dog")
