"""Classifiers and concepts on texts and pictures whose embeddings are chosen by hand, and on the sample that ships."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from miniclip import load
from miniclip.data.datasets import read_dataset
from miniclip.data.lists import DataError
from miniclip.embed import embed_texts
from miniclip.evaluation.classifiers import (
    HierarchicalClassifier,
    ZeroShotClassifier,
    choose_threshold,
    embed_pictures,
)
from miniclip.evaluation.concepts import ConceptDetector, check_content, summarize_scenes
from miniclip.preprocess import ImageError
from miniclip.tokenizer import tokenize
from miniclip.zero_shot import zero_shot_weights


class Dictionary:
    """A model that embeds the texts it was given as it was told, and no others."""

    context_length = 77
    logit_bias = None
    tokenize = staticmethod(tokenize)

    def __init__(self, vectors: dict[str, list[float]], scale: float = 10):
        self.rows = {tuple(tokenize(text)[0].tolist()): torch.tensor(vector) for text, vector in vectors.items()}
        self.logit_scale = torch.tensor(math.log(scale))
        self.text_projection = torch.empty(0, len(next(iter(vectors.values()))))

    def encode_text(self, tokens: torch.Tensor, normalize: bool) -> torch.Tensor:
        return F.normalize(torch.stack([self.rows[tuple(row)] for row in tokens.tolist()]), dim=-1)


ANIMALS = {"cat": [1.0, 0, 0, 0], "dog": [0, 1.0, 0, 0], "car": [0, 0, 1.0, 0]}
PICTURES = F.normalize(torch.tensor([[3.0, 1, 0, 0], [0, 4.0, 3, 0], [0, 0, 0.1, 1]]), dim=-1)


@pytest.fixture(scope="module")
def tiny():
    model, _ = load("tiny-ViT", device="cpu")
    examples = read_dataset("sample")
    return model, examples, embed_pictures(model, [example.image for example in examples])


def test_scores_logits_and_probabilities_by_hand():
    classifier = ZeroShotClassifier(Dictionary(ANIMALS), list(ANIMALS))
    scores = classifier.scores(PICTURES)
    torch.testing.assert_close(scores[:2], torch.tensor([[3 / 10**0.5, 1 / 10**0.5, 0], [0, 0.8, 0.6]]))
    torch.testing.assert_close(classifier.logits(PICTURES), 10 * scores)
    odds = [1, math.e**8, math.e**6]
    expected = torch.tensor([value / sum(odds) for value in odds])
    torch.testing.assert_close(classifier.probabilities(PICTURES)[1], expected)
    assert classifier.predict(PICTURES) == ["cat", "dog", "car"]


def test_the_two_ensembles_disagree_where_prompts_do():
    """Of "a" the two prompts point apart, of "b" they agree: the mean of logits prefers "b", for a picture of "a"."""
    model = Dictionary({"one a": [1.0, 0, 0], "two a": [0, 1.0, 0], "one b": [1.0, 1, 1], "two b": [1.0, 1, 1]})
    picture = F.normalize(torch.tensor([[1.0, 1, 0]]), dim=-1)
    by_embeddings, by_logits = (
        ZeroShotClassifier(model, ["a", "b"], ["one {}", "two {}"], ensemble=ensemble)
        for ensemble in ("embeddings", "logits")
    )
    torch.testing.assert_close(by_embeddings.scores(picture), torch.tensor([[1.0, (2 / 3) ** 0.5]]))
    torch.testing.assert_close(by_logits.scores(picture), torch.tensor([[0.5**0.5, (2 / 3) ** 0.5]]))
    assert (by_embeddings.predict(picture), by_logits.predict(picture)) == (["a"], ["b"])
    # The second are the first, times the length of each mean.
    torch.testing.assert_close(by_logits.weights.norm(dim=0), torch.tensor([0.5**0.5, 1]))


def test_the_mean_of_logits_is_a_mean_of_logits(tiny):
    model, _, embeddings = tiny
    classes, templates = ["cat", "lighthouse", "taco"], ["{}", "a {} emoji", "a drawing of a {}"]
    expected = sum(
        torch.stack([embeddings @ embed_texts(model, [template.replace("{}", name)])[0][0] for name in classes], 1)
        for template in templates
    )
    mean = ZeroShotClassifier(model, classes, templates, ensemble="logits")
    torch.testing.assert_close(mean.scores(embeddings), expected / 3, atol=1e-5, rtol=0)
    usual = ZeroShotClassifier(model, classes, templates)
    assert (usual.scores(embeddings) - expected / 3).abs().max() > 1e-3


def test_pictures_are_files_images_or_embeddings(tiny, tmp_path):
    model, examples, embeddings = tiny
    classifier = ZeroShotClassifier(model, ["badger", "elephant", "pizza"])
    picked = [example for example in examples if example.captions[0] in classifier.classes]
    rows = embeddings[[examples.index(example) for example in picked]]
    picked[1].image.save(tmp_path / "elephant.png")
    mixed = [picked[0].image, tmp_path / "elephant.png", picked[2].image]
    assert classifier.predict(mixed) == classifier.predict(rows) == ["badger", "elephant", "pizza"]
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"broken\.png"):
        classifier.predict([tmp_path / "broken.png", Image.new("RGB", (9, 9))])


def test_prompts_are_kept_in_the_cache(tiny, tmp_path, monkeypatch):
    model, _, embeddings = tiny
    arguments = model, ["cat", "dog"], ["{}", "a {} emoji"], tmp_path
    first = [ZeroShotClassifier(*arguments, ensemble=ensemble) for ensemble in ("embeddings", "logits")]
    monkeypatch.setattr("miniclip.zero_shot.embed_texts", None)
    for before, ensemble in zip(first, ("embeddings", "logits"), strict=True):
        again = ZeroShotClassifier(*arguments, ensemble=ensemble)
        assert torch.equal(again.scores(embeddings), before.scores(embeddings))
    with pytest.raises(TypeError):
        ZeroShotClassifier(model, ["cat", "cow"], cache=tmp_path)


def test_what_makes_no_classifier_is_refused():
    with pytest.raises(DataError, match="twice"):
        ZeroShotClassifier(Dictionary(ANIMALS), ["cat", "dog", "cat"])
    with pytest.raises(DataError, match="'mean'; expected one of embeddings, logits"):
        ZeroShotClassifier(Dictionary(ANIMALS), ["cat"], ensemble="mean")


# One for several, and what is no picture or model


def test_one_string_or_picture_is_a_list_of_one(tiny, tmp_path):
    model, examples, _ = tiny
    classifier = ZeroShotClassifier(model, "dog")
    assert classifier.classes == ["dog"] and classifier.weights.shape == (256, 1)
    elephant = next(example.image for example in examples if example.captions[0] == "elephant")
    elephant.save(tmp_path / "x.png")
    classifier = ZeroShotClassifier(model, ["elephant", "pizza"], "a {} emoji")
    for picture in (elephant, tmp_path / "x.png", str(tmp_path / "x.png")):
        assert classifier.predict(picture) == ["elephant"]
        assert torch.equal(classifier.scores(picture), classifier.scores([picture]))
    assert torch.equal(zero_shot_weights(model, "dog", "a {}"), zero_shot_weights(model, ["dog"], ["a {}"]))
    detector = ConceptDetector(model, "an elephant", "a picture of {}", "something")
    assert detector.concepts == ["an elephant"] and detector.probabilities(elephant).shape == (1, 1)
    (findings,) = check_content(model, elephant, {"animals": "an elephant", "food": ["a pizza"]})
    assert [finding.concept for finding in findings] == ["an elephant", "a pizza"]
    (summary,) = summarize_scenes(model, elephant, {"kind": "animal"}, "an elephant", "{}", threshold=0.0)
    assert summary.aspects == {"kind": ("animal", 1.0)} and list(summary.things) == ["an elephant"]
    (answer,) = HierarchicalClassifier(model, {"elephant": "African elephant", "pizza": []}).predict(elephant)
    assert answer.base == "elephant" and answer.name == "African elephant"


def test_embeddings_that_are_not_of_unit_length_are_refused(tiny):
    model, _, embeddings = tiny
    classifier = ZeroShotClassifier(model, ["cat", "dog"])
    with pytest.raises(DataError, match=r"lengths from 3 to 3; expected 1.*normalize=True"):
        classifier.predict(3 * embeddings)
    for wrong in (embeddings[0], embeddings[:, :9], torch.zeros(2, 3, 64, 64)):
        with pytest.raises(DataError, match=r"expected unit embeddings \[N, 256\]"):
            classifier.scores(wrong)
    assert torch.equal(classifier.scores(embeddings.half()), classifier.scores(embeddings.half().float()))


def test_classes_are_strings(tiny):
    for ensemble in ("embeddings", "logits"):
        with pytest.raises(DataError, match="a class is 3; expected its name, a string"):
            ZeroShotClassifier(tiny[0], ["cat", 3], ensemble=ensemble)


def test_a_name_is_no_model():
    with pytest.raises(DataError, match=r"expected a model, got 'tiny-ViT': model, preprocess = load"):
        ZeroShotClassifier("tiny-ViT", ["cat"])


# Open set


def test_below_the_threshold_it_is_none_of_them():
    classifier = ZeroShotClassifier(Dictionary(ANIMALS), list(ANIMALS))
    assert classifier.probabilities(PICTURES[2:]).max() > 0.33  # of something, though nothing fits
    assert classifier.predict(PICTURES, threshold=0.5) == ["cat", "dog", None]
    assert classifier.predict(PICTURES, threshold=0.9) == ["cat", None, None]


def test_thresholds_by_hand():
    known = torch.tensor([0.9, 0.5, 0.6, 0.7, 0.8])
    assert choose_threshold(known, keep=0.8) == pytest.approx(0.6)
    assert choose_threshold(known, keep=1.0) == pytest.approx(0.5)
    assert choose_threshold(known, torch.tensor([0.1, 0.3])) == pytest.approx(0.4)
    # At 0.55 four of five are kept and all four refused; at 0.45 all are kept and three are refused.
    assert choose_threshold(known, torch.tensor([0.1, 0.2, 0.3, 0.51])) == pytest.approx(0.555)
    assert choose_threshold(torch.tensor([0.1]), torch.tensor([0.9])) > 0  # hopeless, but a number
    for nothing in ((torch.empty(0),), (known, torch.empty(0))):
        with pytest.raises(DataError, match="one picture or more of each kind"):
            choose_threshold(*nothing)


def test_a_threshold_chosen_on_some_pictures_serves_for_others(tiny):
    """Of every other name the classifier knows nothing; half of the pictures choose, the other half are refused."""
    model, examples, embeddings = tiny
    classifier = ZeroShotClassifier(model, [example.captions[0] for example in examples[::2]])
    best = classifier.scores(embeddings).amax(dim=1)
    threshold = choose_threshold(best[::4], best[1::4])
    kept, refused = (best[2::4] >= threshold).float().mean(), (best[3::4] < threshold).float().mean()
    assert (kept + refused) / 2 > 0.7


# Base class first


def test_the_base_comes_first_by_hand():
    words = ANIMALS | {"beagle": [0, 1.0, 0, 1], "pug": [0, 1.0, 0, -1], "siamese": [1.0, 0, 0, 2]}
    model = Dictionary(words)
    tree = {"dog": ["beagle", "pug"], "cat": ["siamese"], "car": []}
    pictures = F.normalize(torch.tensor([[0, 3.0, 0, -1], [0, 0, 1.0, 0.5], [1.0, 0.9, 0, 0], [1.0, 0, 0, 0]]), dim=-1)
    flat = ZeroShotClassifier(model, ["beagle", "pug", "siamese"])
    assert flat.predict(pictures)[1] == "siamese"  # a car, called a cat: what the base class is there to prevent

    pug, car, unclear, cat = HierarchicalClassifier(model, tree).predict(pictures, threshold=0.8)
    assert (pug.base, pug.name) == ("dog", "pug") and pug.probability > 0.9
    assert car.base == "car" and car.name is None and car.probability is None
    assert unclear.name is None and unclear.base_probability < 0.8
    assert (cat.base, cat.name, cat.probability) == ("cat", "siamese", 1.0)

    expected_dogs = HierarchicalClassifier(model, tree).predict(pictures, expected="dog", threshold=0.8)
    assert [answer.name for answer in expected_dogs] == ["pug", None, None, None]
    assert expected_dogs[3].base == "cat"


def test_trees_that_make_no_sense_are_refused():
    model = Dictionary(ANIMALS)
    with pytest.raises(DataError, match="1 base classes; expected two"):
        HierarchicalClassifier(model, {"cat": ["dog"]})
    with pytest.raises(DataError, match="'car' has no specific classes; expected one of cat"):
        HierarchicalClassifier(model, {"cat": ["dog"], "car": []}).predict(PICTURES, expected="car")


# Concepts


def test_presence_by_hand():
    model = Dictionary({"with a dog": [0, 1.0, 0, 0], "with a cat": [1.0, 0, 0, 0], "nothing": [0, 0, 0, 1.0]})
    detector = ConceptDetector(model, ["a dog", "a cat"], ["with {}"], ["nothing"])
    torch.testing.assert_close(detector.margins(PICTURES)[1], torch.tensor([0.8, 0]))
    torch.testing.assert_close(detector.probabilities(PICTURES)[1, 0], torch.tensor(1 / (1 + math.e**-8)))
    assert detector.probabilities(PICTURES)[2].max() < 0.01
    with pytest.raises(DataError, match="no contrasting prompt"):
        ConceptDetector(model, ["a dog"], ["with {}"], [])


def test_a_contrast_may_name_the_concept():
    model = Dictionary({"with a dog": [0, 1.0, 0], "without a dog": [0, 0.8, 0.6], "nothing": [0, 0, 1.0]})
    margin, softer = (
        ConceptDetector(model, ["a dog"], ["with {}"], contrast).margins(torch.tensor([[0, 1.0, 0]])).item()
        for contrast in (["nothing"], ["without {}"])
    )
    assert margin == pytest.approx(1) and softer == pytest.approx(0.2)


def test_neutral_contrasts_do_better_than_negation(tiny):
    """On the sample, of 240 names and 240 drawings: the weakness that the module's docstring tells of."""
    model, examples, embeddings = tiny
    names = [example.captions[0] for example in examples]
    there = torch.eye(240, dtype=torch.bool)
    found = {}
    for contrast in ("something", "a picture without {}"):
        detector = ConceptDetector(model, names, ["{}", "a picture of a {}"], [contrast])
        positive = detector.probabilities(embeddings) > 0.5
        found[contrast] = positive[there].float().mean().item(), positive[~there].float().mean().item()
    (right, wrong), (_, wrong_by_negation) = found.values()
    assert right > 0.9 and wrong < 0.1
    assert wrong_by_negation > 0.5


WORDED = {"present": ["with {}"], "contrast": ["nothing"]}
THINGS = {"with a dog": [0, 1.0, 0, 0], "with a cat": [1.0, 0, 0, 0], "with a car": [0, 0, 1.0, 0]}
SCENE = Dictionary(ANIMALS | THINGS | {"nothing": [0, 0, 0, 1.0]})


def test_a_content_check_by_hand():
    lists = {"animals": ["a dog", "a cat"], "vehicles": ["a car"]}
    (animals, vehicles), second, third = check_content(SCENE, PICTURES, lists, 0.9, **WORDED)
    assert (animals.category, animals.concept, animals.flagged) == ("animals", "a cat", True)
    assert (vehicles.concept, vehicles.flagged) == ("a car", False) and vehicles.probability == pytest.approx(0.5)
    assert [finding.flagged for finding in second] == [True, True]
    assert [finding.flagged for finding in third] == [False, False]
    strict = check_content(SCENE, PICTURES, lists, {"animals": 0.9, "vehicles": 0.4}, **WORDED)
    assert strict[0][1].flagged
    with pytest.raises(DataError, match="expected animals, vehicles"):
        check_content(SCENE, PICTURES, lists, {"animals": 0.9}, **WORDED)
    with pytest.raises(DataError, match="no concepts"):
        check_content(SCENE, PICTURES, {"nothing": []})


def test_a_summary_by_hand():
    first, second, third = summarize_scenes(
        SCENE, PICTURES, {"subject": ["cat", "car"]}, ["a car", "a dog"], templates=["{}"], threshold=0.9, **WORDED
    )
    assert first.aspects["subject"][0] == "cat" and list(first.things) == ["a dog"]
    assert list(second.things) == ["a dog", "a car"]  # the likelier first
    assert str(third).startswith("subject: car (") and str(third).endswith("with none of the things asked for")
    assert str(second).endswith("; with a dog (100%), a car (100%)")
    assert summarize_scenes(SCENE, PICTURES, {})[0].aspects == {}
