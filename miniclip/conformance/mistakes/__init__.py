"""The catalogue of mistakes that ports make, by the place in the data flow where each first shows."""

from miniclip.conformance.mistakes.mistake import Mistake
from miniclip.conformance.mistakes.pictures import PICTURES
from miniclip.conformance.mistakes.resnet import RESNET
from miniclip.conformance.mistakes.text import TEXT
from miniclip.conformance.mistakes.tokens import TOKENS
from miniclip.conformance.mistakes.transformer import TRANSFORMER
from miniclip.conformance.mistakes.vit import SCORES, VIT
from miniclip.conformance.mistakes.weights import MISREAD

MISTAKES: tuple[Mistake, ...] = (*PICTURES, *VIT, *RESNET, *TRANSFORMER, *TOKENS, *TEXT, *SCORES, *MISREAD)

__all__ = ["MISTAKES", "Mistake"]
