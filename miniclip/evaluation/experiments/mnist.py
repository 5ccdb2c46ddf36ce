"""Zero-shot MNIST (LeCun et al. 1998): handwritten digits, worded in several ways.

A digit can be called by its name ("three") or its sign ("3"), in a context that says what kind of picture it is;
OpenAI's own prompt is 'a photo of the number: "{}".' (openai/CLIP, data/prompts.md). CLIP does badly here, worse than
logistic regression on raw pixels, because almost nothing in its training data looks like MNIST (CLIP paper, section 6).
Accuracy depends on the wording, so state the prompt with the figure. The best wording was found on the same pictures
that it is measured on, so its figure is too high.

`published` is the model's accuracy with OpenAI's prompt in OpenCLIP's table of results.
"""

from __future__ import annotations

from miniclip.data.lists import DataError
from miniclip.evaluation.experiments import wordings
from miniclip.evaluation.experiments.wordings import table
from miniclip.evaluation.study import Study
from miniclip.zero_shot import ensemble, zero_shot_weights

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


def measure(study: Study) -> dict:
    digits = [_digit(name) for name in study.classes]
    prompts = [_worded(way, digit) for way in STRATEGIES for digit in digits]
    weights = zero_shot_weights(study.model, prompts, ["{}"]).unflatten(1, (len(STRATEGIES), -1)).transpose(0, 1)
    ways = {_worded(way, 3): one for way, one in zip(STRATEGIES, weights, strict=True)}
    ways[f"ensemble of the {len(STRATEGIES)}"] = ensemble(weights)
    return wordings.compare(study, ways, "MNIST")


def _worded(strategy: str, digit: int) -> str:
    return strategy.replace("{}", str(digit)).replace("{word}", WORDS[digit])


def _digit(name: str) -> int:
    """The digit that a class stands for. Data sets call it "3", "three" or "3 - three"."""
    for digit, word in enumerate(WORDS):
        if name.strip().lower() in (str(digit), word, f"{digit} - {word}"):
            return digit
    raise DataError(f"the class {name!r} is no digit; expected 0 to 9, or zero to nine: is the data MNIST?")


def draw(result: dict, study: Study):
    title = f"{study.name}: zero-shot MNIST, {len(study.examples):,} pictures; the prompts are those of the digit 3"
    return wordings.draw(result, title)
