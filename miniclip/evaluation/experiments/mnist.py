"""Zero-shot MNIST (LeCun et al. 1998): handwritten digits, and how one words a digit.

A digit has a name ("three"), a sign ("3"), and contexts that say what kind of picture it is; OpenAI's own prompt is
'a photo of the number: "{}".' (openai/CLIP, data/prompts.md). CLIP does badly here, worse than logistic regression on
raw pixels, because next to nothing in its training data looks like MNIST (CLIP paper, section 6). The wording moves it,
so that a figure without its prompt says little; which wording is best was found on these very pictures, which flatters
it.

`published` are the accuracies of OpenAI's weights in OpenCLIP's table of results, with OpenAI's prompt.
"""

from __future__ import annotations

from miniclip.data.lists import DataError
from miniclip.evaluation.experiments import strategies
from miniclip.evaluation.experiments.common import Study, each_template, ensemble
from miniclip.evaluation.experiments.strategies import table

__all__ = ["draw", "measure", "table"]

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STRATEGIES = (  # {} is the sign, "3"; {word} its name, "three"
    "{}",
    "{word}",
    "a photo of the number {}",
    'a photo of the number: "{}".',
    "a photo of the number {word}",
    "a photo of the digit {}",
    "a handwritten digit {}",
    "a handwritten {word}",
    "a black and white photo of the handwritten digit {word}",
    "a white {} on a black background",
)
PUBLISHED = {
    "RN50": 0.5755, "RN101": 0.5254, "RN50x4": 0.4903, "RN50x16": 0.6798, "RN50x64": 0.8583,
    "ViT-B/32": 0.4839, "ViT-B/16": 0.5135, "ViT-L/14": 0.7634, "ViT-L/14@336px": 0.7916,
}  # fmt: skip


def measure(study: Study) -> dict:
    digits = [_digit(name) for name in study.classes]
    prompts = [way.replace("{}", str(digit)).replace("{word}", WORDS[digit]) for way in STRATEGIES for digit in digits]
    weights = each_template(study.model, prompts, ["{}"])[0]  # [E, strategies * classes]
    weights = weights.unflatten(1, (len(STRATEGIES), len(digits))).transpose(0, 1)
    ways = {way.replace("{}", "3").replace("{word}", "three"): w for way, w in zip(STRATEGIES, weights, strict=True)}
    ways[f"ensemble of the {len(STRATEGIES)}"] = ensemble(weights)
    return strategies.compare(study, ways, PUBLISHED)


def _digit(name: str) -> int:
    """From "3", "three" or "3 - three", as different data sets call it."""
    for digit, word in enumerate(WORDS):
        if name.strip().lower() in (str(digit), word, f"{digit} - {word}"):
            return digit
    raise DataError(f"the class {name!r} is no digit; expected 0 to 9, or zero to nine: is --data MNIST?")


def draw(result: dict, study: Study):
    return strategies.draw(result, f"{study.name}: zero-shot MNIST, {len(study.examples):,} pictures")
