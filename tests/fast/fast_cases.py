"""Seeded models and their inputs, for the tests of the fast forms."""

import torch
import torch.nn.functional as F
from conformance.openai_cases import CASES
from conformance.seeded import image, weights

from miniclip.fast.clip import FastCLIP
from miniclip.models import CLIP

TOLERANCE = 1e-6  # largest difference of unit embeddings, float32


def seeded_model(case: str) -> CLIP:
    model = FastCLIP(CASES[case]).eval()
    model.load_state_dict(weights({name: tuple(value.shape) for name, value in model.state_dict().items()}))
    return model


def pixels(model: CLIP, count: int = 3) -> torch.Tensor:
    return image(count, model.config.vision.image_size)


def ids(model: CLIP, lengths: list[int]) -> torch.Tensor:
    """Texts of these lengths, whose padding holds ids that must not matter."""
    text = torch.randint(model.vocab_size - 2, (len(lengths), model.context_length))
    for row, length in zip(text, lengths, strict=True):
        row[length - 1] = model.vocab_size - 1
    return text


@torch.no_grad()
def difference(model: CLIP, embed) -> float:
    """Largest difference of the unit embeddings that `embed(model)` gives in the fast and in the plain form."""
    found = []
    for fast in (True, False):
        model.fast = fast
        found.append(F.normalize(embed(model).float()))
    del model.fast
    assert found[0].isfinite().all()
    return (found[0] - found[1]).abs().max().item()


def spy(taken: list[str], name: str, form, *args):
    """The form's result, after noting its name."""
    taken.append(name)
    return form(*args)
