"""CLIP in plain PyTorch: exact, safe to load, small enough to read in one sitting.

    from miniclip import load, open_image, tokenize

    model, preprocess = load("ViT-B/32")
    image = preprocess(open_image("cat.jpg")).unsqueeze(0)
    logits_per_image, logits_per_text = model(image, tokenize(["a diagram", "a dog", "a cat"]))
    probabilities = logits_per_image.softmax(dim=-1)

In one call, with any model of `available_models()`; "tiny-ViT" needs no download:

    classify(["cat.jpg", "dog.jpg"], ["a cat", "a dog"], model="tiny-ViT")
    similarity("tiny-ViT", "cat.jpg", ["a cat", "a dog"])
    search_pictures("tiny-ViT", "a cat", "photos")

Embed, measure, and look closer (data: "sample", "cifar10", "cifar100", "mnist", a list or a folder of classes):

    embeddings, rejected = embed_images(model, preprocess, ["cat.jpg", "dog.jpg"])
    embeddings, rejected = embed_texts(model, ["a cat", "a dog"])
    evaluate(model, preprocess, "cifar10", templates="cifar", download=True)["zero_shot"]["top1"]
    print(explore("temperature", model="tiny-ViT"))    # one of nine experiments

Train, and use the result:

    model = train(create_synthetic=True, epochs=3)    # draws coloured shapes in shapes/; see TrainOptions
    classify("shapes/val", ["a red square", "a blue circle"], model=model)
    search_pictures(model, "a red shape", "shapes/val")

Port it to another language:

    golden = trace(model, open_image("cat.jpg"), "a cat")
    print(compare(golden, mine).passed)    # mine: the stages of the port
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miniclip.version import __version__ as __version__

if TYPE_CHECKING:
    from miniclip.answers import classify, search_pictures, similarity
    from miniclip.conformance.compare import compare
    from miniclip.conformance.trace import trace
    from miniclip.embed import embed_images, embed_texts
    from miniclip.evaluation.classifiers import ZeroShotClassifier
    from miniclip.evaluation.report import evaluate
    from miniclip.exploring import explore
    from miniclip.loading import available_models, build_model, load
    from miniclip.models import CLIP
    from miniclip.preprocess import open_image
    from miniclip.search.index import Index
    from miniclip.tokenizer import tokenize
    from miniclip.training.options import TrainOptions
    from miniclip.training.train import train

__all__ = [
    "CLIP",
    "Index",
    "TrainOptions",
    "ZeroShotClassifier",
    "available_models",
    "build_model",
    "classify",
    "compare",
    "embed_images",
    "embed_texts",
    "evaluate",
    "explore",
    "load",
    "open_image",
    "search_pictures",
    "similarity",
    "tokenize",
    "trace",
    "train",
]

# The names are imported at first use: `import miniclip` is quick, and commands that compute nothing need no PyTorch.
_MODULES = {
    "CLIP": "models",
    "Index": "search.index",
    "TrainOptions": "training.options",
    "ZeroShotClassifier": "evaluation.classifiers",
    "available_models": "loading",
    "build_model": "loading",
    "classify": "answers",
    "compare": "conformance",
    "embed_images": "embed",
    "embed_texts": "embed",
    "evaluate": "evaluation.report",
    "explore": "exploring",
    "load": "loading",
    "open_image": "preprocess",
    "search_pictures": "answers",
    "similarity": "answers",
    "tokenize": "tokenizer",
    "trace": "conformance",
    "train": "training.train",
}


_OPENAI = {"clip": "miniclip.loading", "model": "miniclip.models", "simple_tokenizer": "miniclip.tokenizer"}


def __getattr__(name: str) -> Any:
    if name in _OPENAI:
        raise AttributeError(f"what openai/CLIP has in clip.{name} is in {_OPENAI[name]}: see EQUIVALENTS.md")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


class _Checkout:
    """Finds miniclip.kernels and miniclip.weights in a checkout, where they stand beside this folder."""

    folder = Path(__file__).parents[1]

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        package = name.removeprefix("miniclip.")
        if package not in ("kernels", "weights"):
            return None
        own = cls.folder / package
        return spec_from_file_location(name, own / "__init__.py", submodule_search_locations=[str(own)])


if (_Checkout.folder / "setup.py").exists():
    sys.meta_path.insert(0, _Checkout)  # type: ignore[arg-type]  # before the finder of another checkout, installed with -e
