"""The main jobs of CLIP's tutorials as short scripts, with names from `miniclip` alone."""

import ast
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from test_datasets import write_mnist
from test_training_cifar import write_cifar

import miniclip
import miniclip.errors
from miniclip.bench import run
from miniclip.config import CLIPConfig, PreprocessConfig, TextConfig, ViTConfig, openai_transformer, to_json
from miniclip.data.datasets import read_dataset
from miniclip.evaluation.experiments import EXPERIMENTS, models
from miniclip.io import write_json

NINE_EXPERIMENTS = """
from miniclip import explore
for name in ("models", "zero-shot", "retrieval", "embedding-space", "temperature", "prompts"):
    print(explore(name, "tiny-ViT").save("figures"))
for name in ("cifar10", "mnist"):
    print(explore(name, "tiny-ViT", data_root="data").save("figures"))
print(explore("benchmark", "tiny-ViT").save("figures"))
"""

README_OF_OPENAI = """
from miniclip import load, open_image, tokenize
model, preprocess = load("tiny-ViT", device="cpu")
image = preprocess(open_image("dog.png")).unsqueeze(0)
text = tokenize(["a diagram", "a dog", "a cat"])
logits_per_image, logits_per_text = model(image, text)
print("Label probs:", logits_per_image.softmax(dim=-1).tolist())
"""

TOUR = """
from miniclip import *
print(available_models())
model, preprocess = load("tiny-ViT", device="cpu")
pixels = preprocess(open_image("dog.png")).unsqueeze(0)
tokens = tokenize(["a dog", "a guitar", "a pizza"])
image, text = model.encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)
cosines = image @ text.T
logits_per_image, logits_per_text = model(pixels, tokens)
print(logits_per_image.softmax(dim=-1))
tiny = (model, preprocess)
print(classify("dog.png", ["dog", "guitar"], model=tiny, templates=["a photo of a {}.", "a drawing of a {}."]))
print(similarity(tiny, ["dog.png", "guitar.png"], ["a dog", "a guitar"]))
print(search_pictures(tiny, "a guitar", ".", top=2))
pictures, rejected = embed_images(model, preprocess, ["dog.png", "guitar.png"])
captions, rejected = embed_texts(model, ["a dog", "a guitar"])
print((pictures @ captions.T).argmax(dim=-1))
classifier = ZeroShotClassifier(model, ["dog", "guitar"], templates="imagenet")
print(classifier.predict(["dog.png", "guitar.png"]), classifier.probabilities("dog.png"))
result = evaluate(model, preprocess, "sample", templates="pictograms", tasks=["zero-shot", "retrieval"])
print(result["zero_shot"]["top1"], result["retrieval"]["text_to_image"]["recall@5"])
print(explore("temperature", "tiny-ViT", limit=50))
golden = trace(model, open_image("dog.png"), "a dog")
print(compare(golden, golden).passed)
rebuilt = build_model(model.state_dict())
print(CLIP.from_arguments(512, 32, (2, 2, 2, 2), 32, None, 77, 49408, 512, 8, 6).visual.input_resolution)
"""

SHAPES = """
from miniclip import classify, evaluate, load, search_pictures, train
model = train(create_synthetic=True, epochs=3, output="runs/shapes")
print(classify("shapes/val/red_square_000.png", ["a red square", "a blue circle"], model=model))
print(search_pictures(model, "a red shape", "shapes/val", top=3))
print(evaluate(*load("runs/shapes"), "shapes/val.json")["zero_shot"]["top1"])
"""

CIFAR = """
from miniclip import evaluate, load
model, preprocess = load("tiny-ViT", device="cpu")
result = evaluate(model, preprocess, "cifar10", templates="cifar", data_root="data")
print(result["zero_shot"]["top1"], result["zero_shot"]["most_confused"])
"""


SCRIPTS = ((NINE_EXPERIMENTS, 9), (README_OF_OPENAI, 6), (TOUR, 30), (SHAPES, 8), (CIFAR, 4))
IMAGES = Path(__file__).parents[1] / "examples" / "images"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """The scripts' folder: two drawings, a CIFAR-10 and an MNIST of a few pictures."""
    for name in ("dog.png", "guitar.png"):
        shutil.copy(IMAGES / name, tmp_path)
    write_cifar(tmp_path / "data" / "cifar-10-batches-py")
    write_mnist(tmp_path / "data" / "mnist")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("script", "lines"), SCRIPTS)
def test_the_names_are_of_miniclip_alone(script, lines):
    assert len(script.strip().splitlines()) <= lines
    imports = [node for node in ast.walk(ast.parse(script)) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [node.module for node in imports] == ["miniclip"]
    assert {alias.name for alias in imports[0].names} <= {"*", *miniclip.__all__}


def test_nine_experiments(place, monkeypatch, capsys):
    """On few pictures; tests/evaluation/test_explore.py draws the figures, which takes seconds."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    monkeypatch.setattr(figure, "savefig", lambda self, file, **_: Path(file).write_text(f"{len(self.axes)} panels"))
    quick = partial(run.Settings, what=("tokenizer",), peers="none", seconds=0.1)
    monkeypatch.setattr(run, "Settings", quick)
    few = {spec: read_dataset(spec, place / "data")[:20] for spec in ("sample", "cifar10", "mnist")}
    monkeypatch.setattr("miniclip.exploring.read_dataset", lambda spec, **_: few[spec])
    monkeypatch.setattr(models, "named_models", partial(dict, [("tiny-ViT", models.named_models()["tiny-ViT"])]))
    with pytest.warns(miniclip.errors.MiniclipWarning, match="several minutes"):
        exec(NINE_EXPERIMENTS, {})
    assert set(capsys.readouterr().out.split()) == {f"figures/{name}" for name in EXPERIMENTS} and len(EXPERIMENTS) == 9
    for name in EXPERIMENTS:
        assert json.loads((place / "figures" / f"{name}.json").read_text())["experiment"] == name
        assert (place / "figures" / f"{name}.png").read_text().endswith("panels")


def test_readme_of_openai(capsys):
    names = {}
    exec(README_OF_OPENAI, names)
    assert capsys.readouterr().out.startswith("Label probs: [[")
    assert names["logits_per_image"].argmax() == 1  # a dog


def test_tour(capsys):
    names = {}
    exec(TOUR, names)
    printed = capsys.readouterr().out
    for words in ("'tiny-ViT'", "dog.png: dog", "tensor([0, 1])", "['dog', 'guitar']", "accuracy", "True"):
        assert words in printed
    assert names["logits_per_image"].argmax() == names["cosines"].argmax() == 0
    assert names["rebuilt"].state_dict().keys() == names["model"].state_dict().keys()


def test_shapes(place, capsys):
    """With a small model, few pictures and one step, which is quick and learns nothing."""
    layers = openai_transformer(64, 1)
    config = CLIPConfig(32, ViTConfig(32, 16, layers), TextConfig(77, 49408, layers), PreprocessConfig(32))
    write_json(place / "small.json", to_json(config))
    exec(SHAPES.replace("epochs=3", "synthetic_pictures=2, steps=1, model_size='small.json'"), {})
    *_, labels, found, accuracy = capsys.readouterr().out.splitlines()
    assert "red_square_000.png: a" in labels and found.count("shapes/val/") == 3 and 0 <= float(accuracy) <= 1


def test_cifar(capsys):
    exec(CIFAR, {})
    assert capsys.readouterr().out.split()[0] in ("0.0", "0.5", "1.0")  # of two pictures
    with pytest.raises(miniclip.errors.MiniclipError, match="data-root"):
        exec(CIFAR.replace('"data"', '"elsewhere"'), {})


def test_a_folder_of_cifar_is_its_name_and_place():
    model, measure = miniclip.load("tiny-ViT", device="cpu"), miniclip.evaluate
    assert measure(*model, "data/cifar-10-batches-py") == measure(*model, "cifar10", data_root="data")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "zero_shot", "model": ("tiny-ViT",)}, "takes the name or path of a model, got a tuple"),
        ({"name": "dreams"}, "dreams is no experiment; expected one of models, zero-shot"),
        ({"name": "mnist", "queries": ["a dog"]}, "mnist takes no queries"),
        ({"name": "zero-shot", "template": "{}"}, "there is no option template; expected one of .*templates"),
    ],
)
def test_explore_says_what_makes_no_sense(arguments, message):
    with pytest.raises(miniclip.errors.UsageError, match=message):
        miniclip.explore(**{"model": "tiny-ViT"} | arguments)
