"""CLIP in plain PyTorch: exact, safe to load, small enough to read in one sitting.

    from miniclip import load, tokenize

    model, preprocess = load("ViT-B/32")
    image = preprocess(Image.open("cat.jpg")).unsqueeze(0)
    logits_per_image, logits_per_text = model(image, tokenize(["a diagram", "a dog", "a cat"]))
"""

from pathlib import Path

_above = Path(__file__).parents[1]
if (_above / "setup.py").exists():  # a checkout: kernels/ and weights/ stand beside this folder, not in it
    __path__.append(str(_above))

from miniclip.models import CLIP  # noqa: E402
from miniclip.tokenizer import tokenize  # noqa: E402
from miniclip.weights import available_models, build_model, load  # noqa: E402

__version__ = "0.1.0"
__all__ = ["CLIP", "available_models", "build_model", "load", "tokenize"]
