"""The nine experiments: their figures against values by hand, and the command from the data to the picture."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from miniclip import commands
from miniclip.bench import run
from miniclip.config import MODELS, CLIPConfig, PreprocessConfig, ResNetConfig, TextConfig, TransformerConfig, ViTConfig
from miniclip.data.lists import DataError, Example
from miniclip.evaluation.experiments import (
    EXPERIMENTS,
    embedding_space,
    mnist,
    models,
    prompts,
    retrieval,
    temperature,
    wordings,
    zero_shot,
)
from miniclip.evaluation.study import Study, embed_study
from miniclip.exploring import Findings
from miniclip.models import CLIP
from miniclip.preprocess import Preprocess
from miniclip.save import save_checkpoint
from miniclip.table import columns
from miniclip.zero_shot import ensemble, prompt_weights, zero_shot_weights

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)}

TINY = ("tiny-ViT", "tiny-RN")


def small(vision) -> CLIP:
    torch.manual_seed(0)
    text = TextConfig(16, 49408, TransformerConfig(width=64, layers=1, heads=1, mlp_width=256))
    return CLIP(CLIPConfig(16, vision, text, PreprocessConfig(vision.image_size))).eval()


@pytest.fixture(scope="module")
def model() -> CLIP:
    return small(ViTConfig(16, 8, TransformerConfig(width=64, layers=1, heads=1, mlp_width=256)))


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> list[Example]:
    """Three shades of each of four colours."""
    folder = tmp_path_factory.mktemp("colours")
    made = []
    for name, colour in COLOURS.items():
        for shade in range(3):
            path = folder / f"{name}{shade}.png"
            Image.new("RGB", (12, 12), tuple(max(0, value - 40 * shade) for value in colour)).save(path)
            made.append(Example(path, (name,)))
    return made


@pytest.fixture(scope="module")
def study(model: CLIP, examples: list[Example]) -> Study:
    return embed_study("small", model, Preprocess(model.config.preprocess), examples)


# Embedding a data set.


def test_study_has_the_classes_of_all_pictures_and_those_it_was_limited_to(model, examples):
    limited = embed_study("small", model, Preprocess(model.config.preprocess), examples, limit=5, seed=1)
    assert limited.classes == ["blue", "green", "red", "yellow"]
    assert len(limited.images) == len(limited.examples) == len(limited.targets) == 5
    again = embed_study("small", model, Preprocess(model.config.preprocess), examples, limit=5, seed=1)
    other = embed_study("small", model, Preprocess(model.config.preprocess), examples, limit=5, seed=2)
    assert again.examples == limited.examples != other.examples
    for example, target in zip(limited.examples, limited.targets.tolist(), strict=True):
        assert limited.classes[target] == example.captions[0]


def test_study_leaves_out_what_it_cannot_read(model, examples, tmp_path):
    broken = Example(tmp_path / "none.png", ("red",))
    study = embed_study("small", model, Preprocess(model.config.preprocess), [broken, *examples])
    assert len(study.images) == len(examples)
    assert "none.png" in study.rejected[0]
    with pytest.raises(DataError, match="none of the 1 pictures"):
        embed_study("small", model, Preprocess(model.config.preprocess), [broken])


def test_ensemble_of_prompt_weights_is_what_zero_shot_weights_gives(study):
    templates = ["{}", "a photo of a {}", "the {}"]
    weights = prompt_weights(study.model, study.classes, templates)
    assert weights.shape == (3, 16, 4)
    for one, template in zip(weights, templates, strict=True):
        assert torch.allclose(one, zero_shot_weights(study.model, study.classes, [template]), atol=1e-6)
    expected = zero_shot_weights(study.model, study.classes, templates)
    assert torch.allclose(ensemble(weights), expected, atol=1e-6)
    assert not torch.allclose(weights.mean(0), expected, atol=1e-3)  # not normalised


# models: FLOPs.


def transformer_macs(config: TransformerConfig, tokens: int) -> int:
    """Of each layer: queries, keys, values and output 4 D^2, the MLP 2 D M a token; 2 L^2 D for the attention."""
    a_token = 4 * config.width**2 + 2 * config.width * config.mlp_width
    return config.layers * (tokens * a_token + 2 * tokens**2 * config.width)


def vit_macs(config: CLIPConfig) -> int:
    vision = config.vision
    patches = (vision.image_size // vision.patch_size) ** 2
    width = vision.transformer.width
    embedding = patches * 3 * vision.patch_size**2 * width
    return embedding + transformer_macs(vision.transformer, patches + 1) + width * config.embed_dim


def resnet_macs(config: CLIPConfig) -> int:
    vision = config.vision
    width, side = vision.width, vision.image_size // 2
    macs = side**2 * 9 * (3 * width // 2 + width // 2 * width // 2 + width // 2 * width)
    side, into = side // 2, width
    for stage, blocks in enumerate(vision.layers):
        channels = width * 2**stage
        for block in range(blocks):
            before = side
            side = side // 2 if block == 0 and stage > 0 else side
            macs += before**2 * (into * channels + 9 * channels**2) + side**2 * 4 * channels**2
            macs += side**2 * into * 4 * channels if block == 0 else 0
            into = 4 * channels
    tokens = side**2 + 1  # one query; keys and values of all
    return macs + into**2 + 2 * tokens * into**2 + 2 * tokens * into + into * config.embed_dim


def text_macs(config: CLIPConfig) -> int:
    text = config.text.transformer
    return transformer_macs(text, config.text.context_length) + text.width * config.embed_dim


ODD_TEXT = TextConfig(13, 100, TransformerConfig(width=24, layers=3, heads=2, mlp_width=56))
ODD_VIT = ViTConfig(20, 4, TransformerConfig(width=40, layers=2, heads=5, mlp_width=72))
ODD_RESNET = ResNetConfig(64, 6, (2, 1, 3, 1), heads=4)


@pytest.mark.parametrize(("vision", "macs"), [(ODD_VIT, vit_macs), (ODD_RESNET, resnet_macs)])
def test_flops_match_formulas(vision, macs):
    config = CLIPConfig(18, vision, ODD_TEXT, PreprocessConfig(vision.image_size))
    found = models.describe(config)
    assert found["image_flops"] == 2 * macs(config)
    assert found["text_flops"] == 2 * text_macs(config)
    assert found["text_flops"] != 2 * text_macs(replace(config, text=replace(ODD_TEXT, context_length=12)))


def test_flops_match_published_ones():
    """OpenCLIP's docs/model_profile.csv, GFLOP. Its RN50 has 12.22: there all 50 places of the pool have a query."""
    found = models.describe(MODELS["ViT-B/32"].config)
    assert found["image_flops"] / 1e9 == pytest.approx(8.82, abs=0.005)  # 4.4 GMACs
    assert found["text_flops"] / 1e9 == pytest.approx(5.96, abs=0.005)
    assert found["parameters"] == 151_277_313
    assert found["image_parameters"] / 1e6 == pytest.approx(87.85, abs=0.005)
    assert found["image_parameters"] + found["text_parameters"] + 1 == found["parameters"]
    assert found["text_parameters"] / 1e6 == pytest.approx(63.43, abs=0.005)
    assert found["bytes_float32"] == 4 * found["parameters"]
    assert (found["image_flops"], found["text_flops"]) == (
        2 * vit_macs(MODELS["ViT-B/32"].config),
        2 * text_macs(MODELS["ViT-B/32"].config),
    )
    rn50 = models.describe(MODELS["RN50"].config)["image_flops"]
    more_queries = 2 * 49 * (2048**2 + 2048 * 1024 + 2 * 50 * 2048)
    assert (rn50 + more_queries) / 1e9 == pytest.approx(12.22, abs=0.005)


def test_models_lists_every_name_by_size(monkeypatch):
    monkeypatch.setattr(models, "named_models", lambda: {name: MODELS[name] for name in ("RN50", "ViT-B/32", *TINY)})
    result = models.measure()
    assert [row["name"] for row in result["models"]] == ["tiny-ViT", "tiny-RN", "ViT-B/32", "RN50"]
    line = next(line for line in models.table(result).splitlines() if line.startswith("ViT-B/32"))
    for figure in ("ViT/32 12 x 768", "224", "77", "49,408", "151.3", "87.8", "63.4", "8.82", "5.96"):
        assert figure in line


# embedding-space.


def test_class_similarity_by_hand():
    """Of the class at 0 and 60 degrees: cos 60. Between it and the vector at 90 degrees: cos 90 and cos 30."""
    angles = torch.tensor([0.0, 60.0, 90.0]).deg2rad()
    vectors = torch.stack([angles.cos(), angles.sin()], 1)
    within, between = embedding_space.class_similarity(vectors, torch.tensor([0, 0, 1]))
    assert within == pytest.approx(0.5)
    assert between == pytest.approx((0 + math.cos(math.radians(30))) / 2)
    assert embedding_space.class_similarity(vectors, torch.tensor([0, 1, 2]))[0] is None
    assert embedding_space.class_similarity(vectors, torch.tensor([0, 0, 0]))[1] is None


def test_similarities_match_plain_loops():
    torch.manual_seed(0)
    images, texts = (F.normalize(torch.randn(n, 8), dim=1) for n in (30, 5))
    classes = torch.randint(5, (30,))
    pairs = [(i, j) for i in range(30) for j in range(30) if i != j]
    same = [float(images[i] @ images[j]) for i, j in pairs if classes[i] == classes[j]]
    other = [float(images[i] @ images[j]) for i, j in pairs if classes[i] != classes[j]]
    found = embedding_space.class_similarity(images, classes)
    assert found == pytest.approx((np.mean(same), np.mean(other)), abs=1e-6)
    own = [float(images[i] @ texts[classes[i]]) for i in range(30)]
    others = [float(images[i] @ texts[j]) for i in range(30) for j in range(5) if classes[i] != j]
    assert embedding_space.pair_similarity(images, texts, classes) == pytest.approx(
        (np.mean(own), np.mean(others)), abs=1e-6
    )
    assert embedding_space.pair_similarity(images, texts, classes.roll(1)) != pytest.approx(
        (np.mean(own), np.mean(others)), abs=1e-3
    )


def test_modality_gap_by_hand():
    """Centroids (1/2, 1/2) and (-1, 0): sqrt(1.5^2 + 0.5^2). Of one cloud it is nothing."""
    images, texts = torch.eye(2), torch.tensor([[-1.0, 0.0], [-1.0, 0.0]])
    assert embedding_space.modality_gap(images, texts) == pytest.approx(math.sqrt(2.5))
    assert embedding_space.modality_gap(images, images.flip(0)) == 0


def test_projection_finds_the_plane_that_points_lie_in():
    """Four points in a tilted plane of seven dimensions keep their distances; the variances are those of its axes."""
    torch.manual_seed(0)
    axes = torch.linalg.qr(torch.randn(7, 2, dtype=torch.float64)).Q.T
    images = torch.tensor([[3.0, 0.0], [-3.0, 0.0]], dtype=torch.float64) @ axes + 5
    texts = torch.tensor([[0.0, 1.0], [0.0, -1.0]], dtype=torch.float64) @ axes + 5
    places, explained = embedding_space.projection(images, texts)
    points = torch.cat([images, texts])
    assert torch.allclose(torch.cdist(places, places), torch.cdist(points, points))
    assert explained == pytest.approx([0.9, 0.1])
    _, other = embedding_space.projection(images, 2 * texts - 5)
    assert other != pytest.approx([0.9, 0.1], abs=0.01)


def test_projection_counts_images_and_texts_alike():
    """A hundred copies of the images change nothing."""
    torch.manual_seed(0)
    images, texts = torch.randn(6, 4), torch.randn(5, 4)
    once, explained = embedding_space.projection(images, texts)
    often, as_explained = embedding_space.projection(images.repeat(100, 1), texts)
    assert as_explained == pytest.approx(explained)
    assert torch.allclose(often[-5:], once[-5:], atol=1e-6)


def test_embedding_space_sorts_by_category_where_classes_have_one_picture(study):
    means = {row["pair"]: row["mean"] for row in embedding_space.measure(study)["cosines"]}
    assert means["pictures of one class"] == pytest.approx(
        embedding_space.class_similarity(study.images, study.targets)[0]
    )
    assert means["texts of one class"] is None
    warm = {"red": "warm", "yellow": "warm", "green": "cold", "blue": "cold"}
    sorts = [replace(example, category=warm[example.captions[0]]) for example in study.examples[::3]]
    study = replace(study, targets=study.targets[::3], images=study.images[::3], examples=sorts)
    means = {row["pair"]: row["mean"] for row in embedding_space.measure(study)["cosines"]}
    kinds = torch.tensor([int(example.category == "warm") for example in sorts])
    found = means["pictures of one category"], means["pictures of different categories"]
    assert found == pytest.approx(embedding_space.class_similarity(study.images, kinds))
    texts = zero_shot_weights(study.model, ["red", "yellow"], ["{}"])
    others = zero_shot_weights(study.model, ["green", "blue"], ["{}"])
    expected = ((texts[:, 0] @ texts[:, 1] + others[:, 0] @ others[:, 1]) / 2).item()
    assert means["texts of one category"] == pytest.approx(expected, abs=1e-5)


def test_embedding_space_of_one_picture_a_class_has_no_pairs_within(study):
    one_each = replace(study, targets=study.targets[::3], images=study.images[::3], examples=study.examples[::3])
    result = embedding_space.measure(one_each)
    assert result["cosines"][0] == {
        **result["cosines"][0],
        "pair": "pictures of one class",
        "mean": None,
        "histogram": None,
    }
    assert "no such pair" in embedding_space.table(result)


def test_histograms_are_densities_of_the_pairs(study):
    result = embedding_space.measure(study)
    edges = torch.tensor(result["histogram_edges"], dtype=torch.float64)
    middles, widths = (edges[1:] + edges[:-1]) / 2, edges.diff()
    for row in result["cosines"]:
        if row["mean"] is not None:
            heights = torch.tensor(row["histogram"], dtype=torch.float64)
            assert (heights * widths).sum() == pytest.approx(1, abs=1e-3)
            assert (heights * widths * middles).sum() == pytest.approx(row["mean"], abs=widths[0].item())


# temperature.


def test_figures_of_a_scale_by_hand():
    """Scale ln 3 and cosines 1 and 0: probabilities 3/4 and 1/4; the first is right, the second picture's is not."""
    cosines = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    found = temperature.at_scale(cosines, torch.tensor([0, 1]), math.log(3))
    assert found["confidence"] == pytest.approx(0.75)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert found["entropy"] == pytest.approx(entropy)
    assert found["names"] == pytest.approx(math.exp(entropy))
    assert found["nll"] == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2)
    assert found["ece"] == pytest.approx(0.25)


def test_likeliest_scale():
    """Of four pictures with cosines 1 and 0 three are right: 3/4 = sigmoid(scale), so ln 3."""
    cosines = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(4, 2)
    assert temperature.likeliest_scale(cosines, torch.tensor([0, 0, 0, 1])) == pytest.approx(math.log(3), rel=1e-6)
    assert temperature.likeliest_scale(cosines, torch.tensor([0, 0, 0, 0])) == pytest.approx(temperature.MOST)
    assert temperature.likeliest_scale(cosines, torch.tensor([1, 1, 1, 1])) == pytest.approx(temperature.LEAST)


def test_likeliest_scale_is_the_minimum(study):
    cosines = study.images.double() @ zero_shot_weights(study.model, study.classes, ["{}"]).double()
    targets = cosines.argmax(1).where(torch.arange(len(cosines)) % 3 > 0, cosines.argmin(1))  # a third is wrong
    scale = temperature.likeliest_scale(cosines, targets)
    losses = [temperature.at_scale(cosines, targets, factor * scale)["nll"] for factor in (0.9, 1, 1.1)]
    assert losses[1] < min(losses[0], losses[2])


# prompts.


def test_choosing_on_the_other_half_is_not_flattered_by_luck():
    """Of 500 ways that guess, the best is right on 60% of 200 pictures; chosen on other pictures it is on half."""
    right = torch.rand(500, 200, generator=torch.Generator().manual_seed(0)) < 0.5
    assert right.double().mean(1).max() > 0.59
    fair = torch.stack([prompts.chosen_on_other_half(right, seed).double().mean() for seed in range(10)])
    assert fair.mean() == pytest.approx(0.5, abs=0.04)


def test_prompts_ranks_templates_and_sets(study):
    result = prompts.measure(study, ["a photo of a {}", "cifar", "{}"])
    names = [row["template"] for row in result["rows"]]
    assert {"ensemble cifar", "ensemble of all 6", "{}", "a {} photo"} <= set(names)
    assert len(names) == 6 + 2
    shares = [row["top1"]["share"] for row in result["rows"]]
    assert shares == sorted(shares, reverse=True)
    assert max(row["top1"]["share"] for row in result["rows"] if row["template"] == result["best_single"]) == max(
        row["top1"]["share"] for row in result["rows"] if not row["ensemble"]
    )


# retrieval, zero-shot, wordings.


def test_retrieval_measures_recall_of_single_pictures_and_precision_of_several(study):
    single = replace(study, targets=study.targets[::3], images=study.images[::3], examples=study.examples[::3])
    exact = oracle(single)
    assert retrieval.measure(exact)["text_to_image"] == {"recall@1": 1, "recall@5": 1, "recall@10": 1}
    assert retrieval.measure(oracle(single, 1))["image_to_text"]["recall@1"] == 0
    assert retrieval.measure(oracle(study))["precision"]["precision@1"] == 1
    assert "precision" not in retrieval.measure(exact)
    assert "text_to_image" not in retrieval.measure(study)


def test_retrieval_finds_what_a_query_is_nearest_to(study):
    result = retrieval.measure(study, queries=["a red thing"])
    (query,) = result["queries"]
    cosines = [hit["cosine"] for hit in query["hits"]]
    assert cosines == sorted(cosines, reverse=True)
    assert not query["is_class"]
    assert retrieval.measure(study, seed=3)["queries"][0]["is_class"]
    with pytest.raises(DataError, match="tokens"):
        retrieval.measure(study, queries=["red " * 100])


def test_zero_shot_agrees_with_evaluate(study, model):
    from miniclip.evaluation import evaluate

    more = replace(study, classes=[*study.classes, "cat", "dog", "tree", "house", "moon"])
    found = zero_shot.measure(more, ["a {}"])
    expected = evaluate(model, Preprocess(model.config.preprocess), more.examples, ["a {}"], more.classes)["zero_shot"]
    assert (found["top1"]["share"], found["top5"]["share"]) == (expected["top1"], expected["top5"])
    assert [row["rank"] for row in found["predictions"]] == [row["rank"] for row in expected["predictions"]]
    assert found["top_k"][1] == expected["top1"] < expected["top5"] == found["top_k"][5] < found["top_k"][9] == 1
    assert found["chance"] == {"top1": 1 / 9, "top5": 5 / 9}


def test_right_category(study):
    """Everything is taken for red, which is warm, as three quarters of the pictures are."""
    kinds = {"red": "warm", "yellow": "warm", "green": "warm", "blue": "cold"}
    sorts = [replace(example, category=kinds[example.captions[0]]) for example in study.examples]
    predicted = torch.full_like(study.targets, study.classes.index("red"))
    assert zero_shot._right_category(replace(study, examples=sorts), predicted)["share"] == 0.75
    assert zero_shot._right_category(study, predicted) is None


def test_too_often_counts_wrong_answers_only(study):
    predicted = torch.full_like(study.targets, 2)
    (row,) = zero_shot._too_often(study, predicted)
    assert row == {"name": "red", "wrongly": 9}


def oracle(study: Study, shift: int = 0) -> Study:
    """Its pictures lie where the model puts the texts of their classes, or of the next class but `shift` - 1."""
    weights = zero_shot_weights(study.model, study.classes, ["{}"])
    return replace(study, images=weights.T[(study.targets + shift) % len(study.classes)])


def test_wordings_count_confusions(study):
    weights = zero_shot_weights(study.model, study.classes, ["{}"])
    result = wordings.compare(oracle(study, 1), {"wrong": weights, "right": weights.roll(-1, 1)}, "MNIST")
    right, wrong = result["strategies"]
    assert (right["strategy"], right["top1"]["share"], wrong["top1"]["share"]) == ("right", 1, 0)
    assert right["confusion"] == torch.eye(4, dtype=torch.int64).mul(3).tolist()
    assert wrong["confusion"][0] == [0, 3, 0, 0]
    assert result["published"] is None and "100.0%" in wordings.table(result)
    result = wordings.compare(replace(study, name="ViT-B/32"), {"any": weights}, "MNIST")
    assert result["published"] == pytest.approx(MODELS["ViT-B/32"].published["MNIST"] / 100)
    assert "48.39%" in wordings.table(result)


def test_mnist_takes_digits_by_any_name_and_nothing_else(study):
    assert [mnist._digit(name) for name in ("3", "three", "7 - seven")] == [3, 3, 7]
    digits = replace(study, classes=["1", "two", "3 - three", "4"])
    result = mnist.measure(digits)
    assert result["strategies"][0]["top1"]["share"] >= result["strategies"][-1]["top1"]["share"]
    assert len(result["strategies"]) == len(mnist.STRATEGIES) + 1
    with pytest.raises(DataError, match="blue"):
        mnist.measure(study)


def test_mnist_words_are_those_of_the_strategy(study):
    digits = replace(study, classes=["0", "1", "2", "3"])
    weights = zero_shot_weights(study.model, ["zero", "one", "two", "three"], ["a photo of the number {}"])
    at_texts = replace(digits, images=weights.T[digits.targets])
    accuracy = {row["strategy"]: row["top1"]["share"] for row in mnist.measure(at_texts)["strategies"]}
    assert accuracy["a photo of the number three"] == 1


# The command.


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    save_checkpoint(model.config, model.state_dict(), path)
    return path


@pytest.fixture
def data(examples, monkeypatch) -> None:
    """The colours in place of every data set; as pictures that have no file for cifar10, and as digits for mnist."""

    def read(spec: str, root=None, download=False, split="test") -> list[Example]:
        if spec == "mnist":
            return [Example(example.image, (str(i % 4),)) for i, example in enumerate(examples)]
        if spec == "cifar10":
            return [Example(Image.open(example.image), example.captions, None, "memory") for example in examples]
        return examples

    monkeypatch.setattr("miniclip.exploring.read_dataset", read)


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if EXPERIMENTS[name].data])
def test_explore_prints_writes_and_draws(name, checkpoint, data, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert commands.main(["explore", name, "--model", str(checkpoint), "--out", str(tmp_path / "new")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{name}: {checkpoint} on ")
    assert max(map(len, printed.splitlines())) < 200
    result = json.loads((tmp_path / "new" / f"{name}.json").read_text())
    assert (result["experiment"], result["pictures"], result["classes"]) == (name, 12, 4)
    with Image.open(tmp_path / "new" / f"{name}.png") as image:
        assert image.width > 500
        assert len(np.unique(image.convert("L"))) > 10  # not blank
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [f"{name}.json", f"{name}.png"]
    assert commands.main(["explore", name, "--model", str(checkpoint), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == result


def test_explore_models_needs_no_weights(checkpoint, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(models, "named_models", lambda: {name: MODELS[name] for name in ("RN50", *TINY)})
    assert commands.main(["explore", "models", "--model", str(checkpoint), "--out", str(tmp_path)]) == 0
    assert str(checkpoint) in capsys.readouterr().out
    assert json.loads((tmp_path / "models.json").read_text())["models"][0]["family"] == "file"
    assert (tmp_path / "models.png").stat().st_size > 10_000


def test_explore_benchmark_is_the_bench(checkpoint, monkeypatch, tmp_path, capsys):
    quick = partial(run.Settings, what=("tokenizer",), peers="none", seconds=0.1)
    monkeypatch.setattr(run, "Settings", quick)
    assert commands.main(["explore", "benchmark", "--model", str(checkpoint), "--out", str(tmp_path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "benchmark.json").read_text())
    assert result["rows"][0]["what"].startswith("tokenize")
    with Image.open(tmp_path / "benchmark.png") as image:
        assert image.format == "PNG"


def test_pictures_without_a_file_are_studied_drawn_and_written(model, examples):
    loose = [
        Example(Image.open(example.image), example.captions, None, f"memory {i}") for i, example in enumerate(examples)
    ]
    study = embed_study("small", model, Preprocess(model.config.preprocess), loose)
    for experiment in (zero_shot, retrieval):
        result = experiment.measure(study)
        json.dumps(result)
        experiment.draw(result, study)
    assert result["queries"][0]["hits"][0]["image"].startswith("memory ")


def test_explore_help_lists_the_nine(capsys):
    with pytest.raises(SystemExit):
        commands.main(["explore", "--help"])
    printed = capsys.readouterr().out
    assert len(EXPERIMENTS) == 9
    assert all(f"\n  {name:17}" in printed for name in EXPERIMENTS)


def test_explore_limits_and_seeds(checkpoint, data, capsys):
    runs = []
    for seed in ("1", "1", "2"):
        arguments = ["--model", str(checkpoint), "--limit", "5", "--seed", seed, "--json", "--template", "a {}"]
        assert commands.main(["explore", "zero-shot", *arguments]) == 0
        runs.append(json.loads(capsys.readouterr().out))
    assert runs[0] == runs[1]
    first, _, second = ([row["image"] for row in one["predictions"]] for one in runs)
    assert set(first) != set(second)
    assert runs[0]["pictures"] == 5
    assert runs[0]["templates"] == ["a {}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mnist", "--query", "a dog"], "mnist takes no --query"),
        (["benchmark", "--limit", "3"], "benchmark takes no --limit"),
        (["models", "--dtype", "float16"], "models takes no --dtype"),
        (["models", "--image-size", "64"], "models takes no --image-size"),
        (["cifar10", "--data-root", "x", "--template", "a {}"], "cifar10 takes no --template"),
        (["cifar10", "--data", "sample"], "cifar10 takes no --data"),
        (["zero-shot", "--out", __file__], "expected a folder"),
        (["zero-shot", "--limit", "0"], "--limit: '0'"),
        (["zero-shot", "--template", "no place"], "'no place'"),
    ],
)
def test_explore_says_what_makes_no_sense(arguments, message, checkpoint, data, capsys):
    assert commands.main(["explore", *arguments, "--model", str(checkpoint)]) == 2
    assert message in capsys.readouterr().err


def test_explore_names_the_extra_before_any_work(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("miniclip.exploring.load", None)
    assert commands.main(["explore", "zero-shot", "--out", str(tmp_path)]) == 2
    assert "miniclip[plot]" in capsys.readouterr().err


def test_explore_reports_bad_pictures_after_the_good(checkpoint, examples, monkeypatch, tmp_path, capsys):
    broken = [Example(tmp_path / "gone.png", ("red",)), *examples]
    monkeypatch.setattr("miniclip.exploring.read_dataset", lambda *_, **__: broken)
    assert commands.main(["explore", "zero-shot", "--model", str(checkpoint)]) == 1
    printed = capsys.readouterr()
    assert "top-1" in printed.out
    assert "1 of 13 inputs could not be used" in printed.err


def test_an_interrupted_drawing_leaves_the_old_files(tmp_path):
    """What is under the name stays whole; the picture's temporary file goes away."""
    (tmp_path / "models.png").write_bytes(b"old")

    def fail(file: Path) -> None:
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Findings({"experiment": "models"}, "", fail).save(tmp_path)
    assert (tmp_path / "models.png").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models.json", "models.png"]


def test_columns_are_aligned():
    assert columns(["a", "number"], [["long name", 1], ["b", 22]]).splitlines() == [
        "a          number", "long name       1", "b              22",
    ]  # fmt: skip
