"""Accuracy and recall against values by hand and plain loops; data sets; the report; the command."""

from __future__ import annotations

import hashlib
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_datasets import write_mnist
from test_training_cifar import write_cifar

from miniclip import commands, load, zero_shot
from miniclip.config import CLIPConfig, PreprocessConfig, TextConfig, TransformerConfig, ViTConfig
from miniclip.data.datasets import read_classes, read_dataset
from miniclip.data.lists import Example
from miniclip.data.templates import CIFAR, IMAGENET, IMAGENET_7, PICTOGRAMS, TEMPLATES
from miniclip.embed import embed_images
from miniclip.evaluation import (
    DataError,
    evaluate,
    expand_templates,
    plot_answers,
    study,
    table,
    topk_accuracy,
    zero_shot_weights,
)
from miniclip.evaluation.measures import wilson
from miniclip.evaluation.pages import plot_confusion, plot_data_sets, plot_few_shot, plot_mistakes
from miniclip.evaluation.probe import few_shot
from miniclip.evaluation.study import embed_examples, on_background
from miniclip.evaluation.tables import comparison, difference
from miniclip.models import CLIP
from miniclip.tokenizer import tokenize

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


@pytest.fixture(scope="module")
def small_clip() -> CLIP:
    torch.manual_seed(0)
    image = ViTConfig(16, 8, TransformerConfig(width=32, layers=1, heads=2, mlp_width=64))
    text = TextConfig(12, 49408, TransformerConfig(width=32, layers=2, heads=2, mlp_width=64))
    return CLIP(CLIPConfig(16, image, text, PreprocessConfig(16))).eval()


class ColourModel:
    """Sees the mean colour of a picture, knows the colours that a text names, and has no weights."""

    context_length = 77
    logit_bias = None
    tokenize = staticmethod(tokenize)
    logit_scale = torch.tensor(0.0)
    text_projection = torch.empty(0, 3)  # as wide as the embedding

    def encode_image(self, image: torch.Tensor, normalize: bool) -> torch.Tensor:
        return F.normalize(image, dim=-1)

    def encode_text(self, tokens: torch.Tensor, normalize: bool) -> torch.Tensor:
        words = {tokenize(word)[0, 1].item(): torch.tensor(rgb, dtype=torch.float32) for word, rgb in COLOURS.items()}
        vectors = [sum(words.get(i, torch.zeros(3)) for i in row) for row in tokens.tolist()]
        return F.normalize(torch.stack(vectors) + 1e-6, dim=-1)


def mean_colour(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32)).mean((0, 1)) + 1e-6


def picture(path: Path, colour: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), COLOURS[colour]).save(path)
    return path.name


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """Three pictures named rightly, a red one named blue, one of another class, and one that is broken."""
    rows = [{"image": picture(tmp_path / f"{name}.png", name), "captions": [name]} for name in ("red", "green", "blue")]
    rows[0]["captions"].append("a red thing")
    rows.append({"image": picture(tmp_path / "wrong.png", "red"), "caption": "blue"})
    rows.append({"image": picture(tmp_path / "other.png", "white"), "caption": "white"})
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows.append({"image": "broken.png", "caption": "red"})
    (tmp_path / "colours.json").write_text(json.dumps(rows))
    (tmp_path / "classes.txt").write_text("red\ngreen\n\nblue \nred\n")
    return tmp_path / "colours.json"


# Prompts


def test_templates_are_as_published():
    assert len(set(IMAGENET)) == 80 and len(IMAGENET_7) == 7 and set(IMAGENET_7) < set(IMAGENET)
    digest = hashlib.sha256("\n".join(IMAGENET).encode()).hexdigest()  # of the list in OpenAI's notebook
    assert digest == "4f976686fb651bb5803d4689dcd849f75efe0ef19a3c801355bc9a6f03c8a5af"
    for template in IMAGENET + IMAGENET_7 + CIFAR + PICTOGRAMS:
        assert template.count("{}") == 1


def test_sets_of_templates_are_expanded():
    assert expand_templates(["cifar", "my {}"]) == [*CIFAR, "my {}"]
    with pytest.raises(DataError, match=r"'cats'.*imagenet-7"):
        expand_templates(["cats"])
    assert {"cifar-18", "mnist"} < set(TEMPLATES)


# Zero-shot


def slow_weights(model: CLIP, classes: list[str], templates: list[str], before: bool, after: bool) -> torch.Tensor:
    columns = []
    for name in classes:
        total = torch.zeros(16)
        for template in templates:
            embedding = model.encode_text(tokenize(template.replace("{}", name), model.context_length))[0]
            total += embedding / math.sqrt((embedding**2).sum()) if before else embedding
        mean = total / len(templates)
        columns.append(mean / math.sqrt((mean**2).sum()) if after else mean)
    return torch.stack(columns, dim=1)


@torch.no_grad()
def test_weights_are_those_of_a_plain_loop(small_clip):
    arguments = small_clip, ["cat", "a dog", "blue {} car"], ["{}", "a {}", "two {} in the snow"]
    weights = zero_shot_weights(*arguments)
    assert weights.shape == (16, 3) and weights.dtype == torch.float32
    torch.testing.assert_close(weights, slow_weights(*arguments, before=True, after=True), atol=1e-6, rtol=0)
    for forgotten in ({"before": False, "after": True}, {"before": True, "after": False}):
        assert (weights - slow_weights(*arguments, **forgotten)).abs().max() > 1e-4


@torch.no_grad()
def test_a_prompt_is_encoded_once(small_clip, monkeypatch):
    encoded = []

    def spy(tokens, normalize=False):
        encoded.extend(map(tuple, tokens.tolist()))
        return CLIP.encode_text(small_clip, tokens, normalize)

    monkeypatch.setattr(small_clip, "encode_text", spy)
    classes, templates = ["a cat", "cat"], ["{}", "a {}"]
    weights = zero_shot_weights(small_clip, classes, templates)  # "a cat" comes twice
    assert len(encoded) == len(set(encoded)) == 3
    expected = slow_weights(small_clip, classes, templates, before=True, after=True)
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=0)


def test_bad_prompts_are_refused(small_clip):
    with pytest.raises(DataError, match="1 of 2 prompts are too long"):
        zero_shot_weights(small_clip, ["cat", "dog " * 20], ["{}"])
    with pytest.raises(DataError, match="0 classes"):
        zero_shot_weights(small_clip, [], ["{}"])
    with pytest.raises(DataError, match="0 templates"):
        zero_shot_weights(small_clip, ["cat"], [])


def test_topk_accuracy_by_hand():
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.1, 0.2, 0.3]])
    targets = torch.tensor([0, 1, 2, 2])
    assert topk_accuracy(scores, targets, (1, 2, 3)) == {1: 0.5, 2: 0.75, 3: 1.0}
    assert topk_accuracy(scores.flip(1), targets, (1, 2, 3)) == {1: 0.25, 2: 0.5, 3: 1.0}


def test_ties_and_nan_are_never_right():
    targets = torch.tensor([0, 1, 2])
    assert topk_accuracy(torch.zeros(3, 3), targets, (1, 2, 3)) == {1: 0.0, 2: 0.0, 3: 1.0}
    assert topk_accuracy(torch.full((3, 3), torch.nan), targets, (1, 2)) == {1: 0.0, 2: 0.0}
    two_level = torch.tensor([[0.7, 0.7, 0.1]])
    assert topk_accuracy(two_level, torch.tensor([0]), (1, 2)) == {1: 0.0, 2: 1.0}


def test_chunks_change_no_prediction(monkeypatch):
    torch.manual_seed(0)
    arguments = torch.randn(23, 8), torch.randn(8, 5), torch.randint(5, (23,))
    whole = zero_shot.classify(*arguments)
    monkeypatch.setattr(zero_shot, "CHUNK_SCORES", 20)
    for expected, chunked in zip(whole, zero_shot.classify(*arguments), strict=True):
        assert torch.equal(expected, chunked)


# Data sets


def test_lists_and_folders_are_read(colours):
    examples = read_dataset(colours)
    assert examples[0].image == colours.parent / "red.png" and examples[0].captions == ("red", "a red thing")
    assert examples[3].captions == ("blue",)
    folder = colours.parent / "folder"
    for name in ("hot_dog/b.png", "hot_dog/deeper/c.png", "cat/a.png"):
        picture(folder / name, "red")
    (folder / "hot_dog" / ".hidden").touch()
    (folder / "loose.txt").touch()
    found = [(example.image.name, example.captions) for example in read_dataset(folder)]
    assert found == [("a.png", ("cat",)), ("b.png", ("hot dog",)), ("c.png", ("hot dog",))]


def test_classes_are_read_once_each(colours):
    assert read_classes(colours.parent / "classes.txt") == ["red", "green", "blue"]
    assert read_classes(colours) == ["red", "green", "blue", "white"]
    (colours.parent / "few.txt").write_text("black\nblue\nred\n")
    assert read_classes(colours, colours.parent / "few.txt") == ["red", "blue"]


def test_what_is_no_data_set_is_refused(tmp_path):
    (tmp_path / "list.json").write_text('[{"picture": "x.png"}]')
    (tmp_path / "list.xml").touch()
    (tmp_path / "empty").mkdir()
    for name, message in {
        "list.json": "row 1",
        "list.xml": "json",
        "missing.json": "missing.json",
        "empty": "CLASS NAME/PICTURE",
    }.items():
        with pytest.raises(DataError, match=message):
            read_dataset(tmp_path / name)
    with pytest.raises(DataError, match=r"missing\.txt"):
        read_classes(tmp_path / "missing.txt")


# The report


def test_evaluate_by_hand(colours):
    result = evaluate(ColourModel(), mean_colour, read_dataset(colours), classes=["red", "green", "blue", "red"])
    assert (result["pictures"], result["left_out"]) == (4, 1)
    assert len(result["rejected"]) == 1 and "broken.png" in result["rejected"][0]
    figures = result["zero_shot"]
    assert (figures["classes"], figures["top1"], figures["top5"]) == (3, 0.75, 1.0)
    wrong = colours.parent / "wrong.png"
    assert figures["predictions"][3] == {
        "image": str(wrong),
        "name": "blue",
        "predicted": "red",
        "probability": pytest.approx(math.e / (math.e + 2), abs=1e-4),  # of cosines 1, 0, 0 and a scale of 1
        "rank": 3,
    }
    # One of two blue ones is right, and the classes count alike.
    assert figures["class_recall"]["blue"] == {"pictures": 2, "recall": 0.5}
    assert figures["mean_class_recall"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert figures["mean_class_recall_interval"] is None
    assert figures["most_confused"] == [("red", "blue", 1)]
    # "blue" belongs to two pictures. wrong.png, which is red, has "blue" at rank 3 or 4 of four, behind the two red
    # captions; "a red thing" is as near to wrong.png as to red.png.
    figures = result["retrieval"]
    assert (figures["captions"], figures["distinct_captions"]) == (5, 4)
    assert figures["image_to_text"]["recall@1"] == 0.75 and figures["image_to_text"]["recall@5"] == 1.0
    assert figures["text_to_image"]["recall@1"] == 0.5
    json.dumps(result)

    every_class = evaluate(ColourModel(), mean_colour, read_dataset(colours), tasks=["zero-shot"])
    assert every_class["left_out"] == 0 and every_class["zero_shot"]["top1"] == 0.8 and "retrieval" not in every_class


def test_a_caption_of_several_pictures_is_right_for_all_of_them(tmp_path):
    """Three pictures of each colour under one caption, whichever its case and spaces, and a model that sees colours."""
    rows = [
        {"image": picture(tmp_path / f"{name}{i}.png", name), "caption": text.format(name)}
        for name in ("red", "green", "blue")
        for i, text in enumerate(("a {}", "A  {} ", "a {}"))
    ]
    (tmp_path / "colours.json").write_text(json.dumps(rows))
    figures = evaluate(ColourModel(), mean_colour, tmp_path / "colours.json", tasks="retrieval")["retrieval"]
    perfect = {"recall@1": 1.0, "recall@5": 1.0, "recall@10": 1.0, "mean_reciprocal_rank": 1.0}
    assert figures == {
        "captions": 9,
        "distinct_captions": 3,
        "image_to_text": perfect,
        "text_to_image": perfect,
    }
    # Negative control: a model that takes green for red finds the right caption of two colours of three.
    figures = evaluate(ColourBlindModel(), mean_colour, tmp_path / "colours.json", tasks="retrieval")["retrieval"]
    assert figures["image_to_text"]["recall@1"] == pytest.approx(2 / 3)
    assert figures["text_to_image"]["mean_reciprocal_rank"] < 0.6


def test_groups_by_hand(tmp_path):
    """Of pictures taken by the old camera one of two is right, by the new one two of two; the classes stay the same."""
    rows = [
        {"image": picture(tmp_path / "0.png", "red"), "caption": "red", "camera": "old", "year": 1999},
        {"image": picture(tmp_path / "1.png", "red"), "caption": "blue", "camera": "old"},
        {"image": picture(tmp_path / "2.png", "green"), "caption": "green", "camera": "new"},
        {"image": picture(tmp_path / "3.png", "blue"), "caption": "blue", "camera": "new"},
    ]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    result = evaluate(ColourModel(), mean_colour, tmp_path / "list.json", tasks="zero-shot", group_by="camera")
    assert result["zero_shot"]["classes"] == 3 and result["groups"]["by"] == "camera"
    new, old = result["groups"]["groups"].values()
    assert (new["pictures"], new["share"], old["pictures"], old["share"]) == (2, 1.0, 2, 0.5)
    assert (old["low"], old["high"]) == wilson(1, 2)
    assert [line.split()[:3] for line in table(result).splitlines() if line.startswith(("new", "old"))] == [
        ["new", "2", "100.00%"],
        ["old", "2", "50.00%"],
    ]
    json.dumps(result)
    with pytest.raises(DataError, match=r"1\.png has no column 'year' to group by; it has camera"):
        evaluate(ColourModel(), mean_colour, tmp_path / "list.json", group_by="year")


def test_the_command_groups(capsys):
    assert commands.main(["evaluate", "sample", "--model", "tiny-ViT", "--group-by", "category", "--limit", "40"]) == 0
    out = capsys.readouterr().out
    assert "category" in out and any(line.startswith("musical instrument") for line in out.splitlines())
    assert commands.main(["evaluate", "sample", "--group-by", "x", "--task", "retrieval"]) == 2
    assert "--group-by needs the answers of zero-shot" in capsys.readouterr().err


def test_what_is_no_model_or_class_list_is_told(colours):
    with pytest.raises(DataError, match="expected a model, got 'tiny-ViT'"):
        evaluate("tiny-ViT", mean_colour, "sample")
    one = evaluate(ColourModel(), mean_colour, colours, classes="red", tasks="zero-shot")
    assert (one["pictures"], one["left_out"], one["zero_shot"]["classes"]) == (1, 4, 1)


def test_missing_pictures_of_a_list_say_where_it_looked(tmp_path):
    (tmp_path / "list.json").write_text('[{"image": "photos/gone.png", "caption": "red"}]')
    with pytest.raises(DataError, match=rf"{tmp_path}/photos/gone\.png.*relative to the folder of the list"):
        evaluate(ColourModel(), mean_colour, tmp_path / "list.json")


def test_captions_that_are_too_long_are_listed(colours):
    examples = read_dataset(colours)
    examples[0] = type(examples[0])(examples[0].image, ("red", "red " * 80))
    examples[1] = type(examples[1])(examples[1].image, ("green " * 80,))
    result = evaluate(ColourModel(), mean_colour, examples[:4], tasks=["retrieval"])
    assert len(result["rejected"]) == 2 and all("80" in line or "82" in line for line in result["rejected"])
    assert result["pictures"] == 4 and result["retrieval"]["captions"] == 3


def test_nothing_to_measure_is_an_error(colours):
    examples = read_dataset(colours)
    with pytest.raises(DataError, match="none of the 6 pictures has a name among the 1 classes"):
        evaluate(ColourModel(), mean_colour, examples, classes=["cat"])
    with pytest.raises(DataError, match=r"can be read; the first: .*broken\.png"):
        evaluate(ColourModel(), mean_colour, examples[-1:])


def test_the_background_shows_through_transparent_pictures(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "glass.png")
    (tmp_path / "list.json").write_text('[{"image": "glass.png", "caption": "white"}]')
    examples = read_dataset(tmp_path / "list.json")
    for background, right in {None: 0.0, "white": 1.0}.items():
        result = evaluate(ColourModel(), mean_colour, examples, classes=["red", "white"], background=background)
        assert result["zero_shot"]["top1"] == right
    opaque = Image.new("L", (2, 2))
    assert on_background(opaque, "white") is opaque


def test_the_table_holds_the_figures(colours):
    text = table(evaluate(ColourModel(), mean_colour, read_dataset(colours), classes=["red", "green", "blue"]))
    assert "4 pictures; 1 left out" in text and "3 classes" in text
    assert [line.split() for line in text.splitlines() if "top-" in line] == [
        ["top-1", "75.00%", "30.06%", "to", "95.44%", "33.33%"],
        ["top-5", "100.00%", "51.01%", "to", "100.00%", "100.00%"],
    ]
    assert [line.split() for line in text.splitlines() if "to text" in line or "recall@1 " in line] == [
        ["recall@1", "recall@5", "recall@10", "MRR"],
        ["image", "to", "text", "75.00%", "100.00%", "100.00%", "81.25%"],
    ]


def test_the_plot_depends_on_the_seed_alone(colours):
    pytest.importorskip("matplotlib")
    examples = read_dataset(colours)
    predictions = evaluate(ColourModel(), mean_colour, examples)["zero_shot"]["predictions"]
    predictions[0] = {**predictions[0], "name": "50 $ and $x^"}  # no formula
    pages = []
    for seed in (0, 0, 1):
        plot_answers(predictions, examples, colours.parent / "page.png", seed, rows=1, columns=2)
        pages.append(np.asarray(Image.open(colours.parent / "page.png")))
    assert np.array_equal(pages[0], pages[1]) and not np.array_equal(pages[0], pages[2])


# The command


@pytest.fixture
def command(monkeypatch, capsys):
    monkeypatch.setattr("miniclip.commands.evaluate.load_model", lambda options: (ColourModel(), mean_colour))

    def run(*arguments) -> tuple[int, str, str]:
        status = commands.main(["evaluate", *map(str, arguments)])
        return status, *capsys.readouterr()

    return run


def test_the_command_prints_a_table_and_lists_broken_pictures(command, colours):
    status, out, err = command(colours, "--classes", colours.parent / "classes.txt")
    assert status == 1 and "75.00%" in out and "text to image" in out
    assert "broken.png" in err and "1 of 9 inputs" in err


def test_the_command_prints_json(command, colours):
    (colours.parent / "broken.png").unlink()
    picture(colours.parent / "broken.png", "red")
    status, out, _ = command(colours, "--json", "--task", "zero-shot", "--template", "cifar", "--template", "{}")
    result = json.loads(out)
    assert status == 0 and result["zero_shot"]["templates"] == [*CIFAR, "{}"] and "retrieval" not in result


def test_the_command_measures_folders(command, colours):
    picture(colours.parent / "folder" / "red" / "a.png", "red")
    picture(colours.parent / "folder" / "blue" / "b.png", "blue")
    status, out, _ = command(colours.parent / "folder")
    assert status == 0 and "100.00%" in out and "retrieval" not in out


def test_the_command_says_what_is_wrong(command, colours):
    for arguments, message in (
        (["missing.json"], "missing.json"),
        ([colours, "--template", "a photo"], "a photo"),
        ([colours, "--classes", "missing.txt"], "missing.txt"),
        ([colours, "--task", "retrieval", "--plot", "page.png"], "--task"),
    ):
        status, out, err = command(*arguments)
        assert status == 2 and not out and message in err and "Traceback" not in err


def test_the_command_refuses_a_plot_before_the_work(command, colours, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("miniclip.commands.evaluate.load_model", lambda options: pytest.fail("the model was loaded"))
    for name, message in {"page.docx": ".png", "nowhere/page.png": "no folder"}.items():
        status, _, err = command(colours, "--plot", colours.parent / name)
        assert status == 2 and message in err


# Features that are kept, probes, several models, published data: through the command and without


@pytest.fixture(scope="module")
def tiny():
    return load("tiny-ViT", device="cpu")


def test_embeddings_are_kept_until_something_changes(tiny, colours, tmp_path, monkeypatch):
    model, preprocess = tiny
    examples, cache = read_dataset(colours), tmp_path / "cache"
    assert list(embed_examples(model, preprocess, examples, "white", cache)[1]) == [5]
    assert not list(cache.glob("*"))  # the unreadable one may be readable later
    examples = examples[:5]
    first, faults = embed_examples(model, preprocess, examples, "white", cache)
    assert len(first) == 5 and not faults
    calls = []

    def embed(*arguments):
        calls.append(1)
        return embed_images(*arguments)

    monkeypatch.setattr(study, "embed_images", embed)
    again, faults_again = embed_examples(model, preprocess, examples, "white", cache)
    assert torch.equal(first, again) and faults == faults_again and not calls

    def is_embedded_anew(model, examples, background) -> bool:
        calls.clear()
        embed_examples(model, preprocess, examples, background, cache)
        return bool(calls)

    assert is_embedded_anew(model, examples, None)
    assert is_embedded_anew(load("tiny-RN", device="cpu")[0], examples, "white")
    assert is_embedded_anew(model, examples[1:], "white")
    picture(colours.parent / "red.png", "green")
    assert is_embedded_anew(model, examples, "white")
    in_memory = [Example(Image.new("RGB", (8, 8), colour), (colour,)) for colour in ("red", "blue")]
    assert is_embedded_anew(model, in_memory, None) and not is_embedded_anew(model, list(in_memory), None)
    assert is_embedded_anew(model, in_memory[::-1], None)
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:99])
    with pytest.raises(DataError, match=r"damaged.*Delete it"):
        embed_examples(model, preprocess, in_memory, None, cache)


class ColourBlindModel(ColourModel):
    """Takes red and green for the same."""

    def encode_image(self, image: torch.Tensor, normalize: bool) -> torch.Tensor:
        return F.normalize(image @ torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 0, 1]]), dim=-1)


def test_several_models_are_compared_on_the_same_pictures(colours):
    examples = read_dataset(colours)
    results = {name: evaluate(model, mean_colour, examples) for name, model in
               (("sees", ColourModel()), ("blind", ColourBlindModel()))}  # fmt: skip
    # Of five readable pictures the first names four, the second red, blue, and none of green, wrong and white.
    assert results["blind"]["zero_shot"]["top1"] == pytest.approx(0.4)
    found = difference(results["sees"], results["blind"])
    assert (found["gained"], found["lost"]) == (0, 2)
    assert [found[key] for key in ("difference", "low", "high")] == pytest.approx([-0.4, -0.8, 0])
    text = comparison(results)
    assert [line.split()[:2] for line in text.splitlines()[3:5]] == [["sees", "80.00%"], ["blind", "40.00%"]]
    assert "blind against sees, top-1: -40.00% (95%: -80.00% to +0.00%: may be chance)" in text
    assert "linear probe" not in text and "text to image @1" in text


def test_a_page_of_mistakes_has_the_surest_first(colours):
    pytest.importorskip("matplotlib")
    examples = read_dataset(colours)[:5]
    predictions = evaluate(ColourBlindModel(), mean_colour, examples)["zero_shot"]["predictions"]
    assert [answer["rank"] > 1 for answer in predictions] == [False, True, False, True, True]
    plot_mistakes(predictions, examples, colours.parent / "mistakes.png", most=2)
    least = min((answer for answer in predictions if answer["rank"] > 1), key=lambda answer: answer["probability"])
    without = [answer for answer in predictions if answer is not least]
    assert pixels_of(colours.parent / "mistakes.png").shape[1] > 500
    before = pixels_of(colours.parent / "mistakes.png")
    plot_mistakes(without, examples, colours.parent / "mistakes.png", most=2)
    assert np.array_equal(before[80:], pixels_of(colours.parent / "mistakes.png")[80:])  # the title counts them
    plot_mistakes([predictions[0]], examples, colours.parent / "mistakes.png")  # no mistake: an empty page


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_the_ticks_of_few_shot_curves_are_exact(tmp_path, monkeypatch):
    """Accuracies of 41% and 44% have ticks like 42.5%, which rounded to 42% stood in the wrong place."""
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    rows = [{"shots": k, "top1": top1, "low": top1, "high": top1} for k, top1 in ((1, 0.41), (2, 0.42), (4, 0.44))]
    plot_few_shot({"tiny": {"few_shot": rows}}, tmp_path / "few_shot.png")
    (axis,) = drawn[0].axes
    drawn[0].canvas.draw()
    ticks = {tick: label.get_text() for tick, label in zip(axis.get_yticks(), axis.get_yticklabels(), strict=True)}
    assert any(100 * tick % 1 > 0.1 for tick in ticks)
    assert all(float(label.rstrip("%")) == pytest.approx(100 * tick) for tick, label in ticks.items())


def test_data_sets_are_drawn_beside_each_other(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    figures = {"classes": 7, "top1": 0.5, "top1_interval": (0.25, 0.75)}
    results = {data: {name: {"zero_shot": figures} for name in ("one", "other")} for data in ("a $x$", "b")}
    plot_data_sets(results | {"c": {"one": {"retrieval": {}}}}, tmp_path / "data_sets.png")
    (axis,) = drawn[0].axes
    drawn[0].canvas.draw()
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a $x$, 7 classes", "b, 7 classes"]
    dots = [line for line in axis.get_lines() if line.get_marker() == "o"]
    assert [(line.get_label(), list(line.get_xdata())) for line in dots] == [("one", [0.5, 0.5]), ("other", [0.5, 0.5])]
    lines = [segment[:, 0].tolist() for collection in axis.collections for segment in collection.get_segments()]
    assert lines == [[0.25, 0.75]] * 4
    assert {label.get_text()[-1] for label in axis.get_xticklabels()} == {"%"}


@pytest.mark.parametrize("number", [2, 25, 120])
def test_a_confusion_matrix_of_any_size_is_drawn(tmp_path, number):
    pytest.importorskip("matplotlib")
    predictions = [
        {"name": f"class {i}", "predicted": f"class {j}", "rank": 1 + (i != j)}
        for i in range(number)
        for j in (i, i, (i + 1) % number)
    ]
    plot_confusion(predictions, tmp_path / "confusion.png")
    pixels = pixels_of(tmp_path / "confusion.png").astype(int)
    blue = (pixels[..., 2] - pixels[..., 0] > 60).mean()  # cells of a third and of two thirds
    assert blue > 0.01
    assert max(pixels.shape) < 2200


# The command


def test_the_command_measures_the_sample(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    arguments = ["evaluate", "sample", "--limit", "30", "--task", "zero-shot", "--cache", str(tmp_path / "cache")]
    arguments += ["--classes", "sample", "--out", str(tmp_path / "out")]
    assert commands.main([*arguments, "--model", "tiny-ViT", "--model", "tiny-RN"]) == 0
    out = capsys.readouterr().out
    assert "tiny-RN against tiny-ViT" in out and "30 pictures" in out
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"report.json", "tiny-ViT", "tiny-RN"}
    assert {file.name for file in (tmp_path / "out/tiny-RN").iterdir()} == {
        *("answers.png", "mistakes.png", "confusion.png"),
    }
    figures = json.loads((tmp_path / "out/report.json").read_text())["models"]["tiny-RN"]
    assert figures["zero_shot"]["classes"] == 240 and figures["zero_shot"]["top1"] > 0.6
    assert figures["zero_shot"]["predictions"][0]["image"].startswith("sample ")


def test_the_command_takes_numbers_for_imagenets_labels_if_its_classes_are_asked_for(tmp_path, capsys):
    for label in ("207", "340"):
        picture(tmp_path / label / "a.png", "red")
    assert commands.main(["evaluate", str(tmp_path), "--model", "tiny-ViT", "--classes", "imagenet", "--json"]) == 0
    out, err = capsys.readouterr()
    figures = json.loads(out)["zero_shot"]
    assert figures["classes"] == 998
    assert [answer["name"] for answer in figures["predictions"]] == ["Golden Retriever", "zebra"]
    assert "note: " in err and "2 folders are ImageNet's classes, in OpenAI's wording: 207 is 'Golden Retriever'" in err
    assert commands.main(["evaluate", str(tmp_path), "--model", "tiny-ViT"]) == 0
    assert "look like ids (207, 340, ...)" in capsys.readouterr().err


def test_the_command_compares_data_sets(command, colours, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    picture(tmp_path / "folder" / "red" / "a.png", "red")
    picture(tmp_path / "folder" / "blue" / "b.png", "red")
    (colours.parent / "broken.png").unlink()
    picture(colours.parent / "broken.png", "red")
    status, out, _ = command(colours, tmp_path / "folder", "--out", tmp_path / "out", "--model", "tiny-RN")
    rows = [line.split()[1:5] for line in out.splitlines()[1:]]
    assert status == 0 and rows == [["tiny-RN", "6", "4", "83.33%"], ["tiny-RN", "2", "2", "50.00%"]]
    report = json.loads((tmp_path / "out" / "report.json").read_text())["data"]
    assert report[str(tmp_path / "folder")]["zero_shot"]["top1"] == 0.5
    assert len(list((tmp_path / "out").glob("*/confusion.png"))) == 2
    assert pixels_of(tmp_path / "out" / "data_sets.png").std() > 5
    status, _, err = command(colours, tmp_path / "folder", "--plot", tmp_path / "a.png")
    assert status == 2 and "on one data set" in err


def test_the_command_probes_by_category(capsys, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("miniclip.evaluation.report.few_shot", partial(few_shot, shots=(1, 16), repeats=1))
    arguments = ["evaluate", "sample", "--model", "tiny-RN", "--by", "category", "--out", str(tmp_path)]
    assert commands.main([*arguments, "--task", "linear-probe", "--task", "few-shot"]) == 0
    out = capsys.readouterr().out
    assert "120 pictures" in out and "linear probe, 120 training pictures of 20 classes" in out
    assert (tmp_path / "few_shot.png").exists()
    figures = json.loads((tmp_path / "report.json").read_text())
    assert figures["linear_probe"]["top1"] > 0.3
    assert figures["few_shot"][-1]["why"] == "20 pictures of each class are needed; one has 6"


def test_the_command_measures_published_sets(capsys, tmp_path):
    write_mnist(tmp_path / "mnist")
    write_cifar(tmp_path / "cifar-10-batches-py")
    for name, count in {"mnist": 3, "cifar10": 2}.items():
        arguments = ["evaluate", name, "--model", "tiny-ViT", "--data-root", str(tmp_path), "--json"]
        assert commands.main([*arguments, "--template", "cifar-18"]) == 0
        figures = json.loads(capsys.readouterr().out)
        assert figures["pictures"] == count and "retrieval" not in figures
        assert figures["zero_shot"]["predictions"][1]["image"] == f"{name} test 1"
    arguments = ["evaluate", "cifar10", "--model", "tiny-ViT", "--data-root", str(tmp_path), "--json"]
    pytest.importorskip("sklearn")
    assert commands.main([*arguments, "--task", "linear-probe"]) == 2
    assert "training pictures of two or more classes" in capsys.readouterr().err  # of the two here one is in both


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "0"], "--limit: '0'"),
        (["--train", "sample"], "--train is for --task linear-probe and few-shot"),
        (["--plot", "a.png", "--model", "tiny-RN"], "--out DIR draws those of several"),
        (["--task", "few-shot"], "name others with --train"),
        (["--out", "setup.py/x"], "--out: setup.py/x"),
        (["--data-root", "/nowhere", "--classes", "mnist"], "is missing; --download"),
    ],
)
def test_the_command_refuses_what_makes_no_sense(capsys, arguments, message):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    assert commands.main(["evaluate", "sample", "--model", "tiny-ViT", *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out and message in err and "Traceback" not in err


def test_categories_are_asked_for(capsys, colours):
    assert commands.main(["evaluate", str(colours), "--model", "tiny-ViT", "--by", "category"]) == 2
    assert "red.png has no category" in capsys.readouterr().err
