"""CLIP in plain PyTorch: exact, safe to load, small enough to read in one sitting.

    from miniclip import load, tokenize

    model, preprocess = load("ViT-B/32")
    image = preprocess(Image.open("cat.jpg")).unsqueeze(0)
    logits_per_image, logits_per_text = model(image, tokenize(["a diagram", "a dog", "a cat"]))
"""

from importlib import import_module
from pathlib import Path

_above = Path(__file__).parents[1]
if (_above / "setup.py").exists():  # a checkout: kernels/ and weights/ stand beside this folder, not in it
    __path__.append(str(_above))

__version__ = "0.1.0"
__all__ = ["CLIP", "available_models", "build_model", "compare", "load", "tokenize", "trace"]

# Imported at the first use: `import miniclip` has to be quick, and what computes nothing needs no PyTorch.
_MODULES = {
    "CLIP": "miniclip.models",
    "available_models": "miniclip.loading",
    "build_model": "miniclip.loading",
    "compare": "miniclip.conformance",
    "load": "miniclip.loading",
    "tokenize": "miniclip.tokenizer",
    "trace": "miniclip.conformance",
}


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
