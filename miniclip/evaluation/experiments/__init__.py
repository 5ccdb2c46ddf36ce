"""The experiments of `miniclip explore`, each a file of three functions, and a row of the table EXPERIMENTS.

    study = embed_study("tiny-ViT", *load("tiny-ViT"), read_dataset("sample"))
    result = temperature.measure(study)      # the figures, ready for JSON
    print(temperature.table(result))
    temperature.draw(result, study)          # a matplotlib figure

The docstring of each file says what its figures mean and what they don't. `models` needs no pictures: its `measure`
takes the path of a model or None, and its `draw` only the result. wordings.py is shared by cifar10.py and mnist.py.

The speed of a model is measured by `miniclip bench`, which `miniclip explore benchmark` runs.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from miniclip.evaluation.experiments import (
    cifar10,
    embedding_space,
    mnist,
    models,
    prompts,
    retrieval,
    temperature,
    zero_shot,
)


class Experiment(NamedTuple):
    """module: has `measure`, `table` and `draw`. data: the data set that it looks at, always or by default; None: no
    pictures. takes: the further options that it has."""

    help: str
    module: ModuleType
    data: str | None = "sample"
    takes: tuple[str, ...] = ()


PUBLISHED = ("data_root", "download", "limit", "seed", "device", "dtype", "activation")  # of published data sets
ANY = (*PUBLISHED, "data", "background", "template")
EXPERIMENTS = {
    "models": Experiment("parameters, resolution and FLOPs of every model's towers", models, None),
    "zero-shot": Experiment("how many pictures get their right name", zero_shot, takes=ANY),
    "cifar10": Experiment("CIFAR-10, by the wording of its classes", cifar10, "cifar10", PUBLISHED),
    "mnist": Experiment("MNIST, by the wording of the digits", mnist, "mnist", PUBLISHED),
    "retrieval": Experiment("the pictures nearest to some words", retrieval, takes=(*ANY, "query")),
    "embedding-space": Experiment("which embeddings are near each other; the modality gap", embedding_space, takes=ANY),
    "temperature": Experiment("how the scale changes probabilities; calibration", temperature, takes=ANY),
    "prompts": Experiment("templates ranked by accuracy, and ensembles of them", prompts, takes=ANY),
}
