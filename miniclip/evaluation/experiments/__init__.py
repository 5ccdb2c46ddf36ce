"""The experiments of `miniclip explore`, each a file of three functions, and a row of the table EXPERIMENTS under
the file's name.

    study = embed_study("tiny-ViT", *load("tiny-ViT"), read_dataset("sample"))
    result = temperature.measure(study)      # the figures, ready for JSON
    print(temperature.table(result))
    temperature.draw(result, study)          # a matplotlib figure

The docstring of each file says what its figures mean and what they don't. `models` needs no pictures: its `measure`
takes the path of a model or None, and its `draw` only the result. wordings.py is shared by cifar10.py and mnist.py.

Only `benchmark` has no file here: it is `miniclip bench`, see `miniclip.exploring`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from miniclip.errors import UsageError


class Experiment(NamedTuple):
    """data: the data set that it looks at, always or by default; None: no pictures. takes: its further options."""

    help: str
    data: str | None = "sample"
    takes: tuple[str, ...] = ()


# The options of experiments with a published data set, and of those with any.
PUBLISHED = ("data_root", "download", "limit", "seed", "device", "dtype", "activation", "image_size", "context_length")
ANY = (*PUBLISHED, "data", "background", "templates")
EXPERIMENTS = {
    "models": Experiment("parameters, resolution and FLOPs of every model's towers", None),
    "zero-shot": Experiment("how many pictures get their right name", takes=ANY),
    "cifar10": Experiment("CIFAR-10, by the wording of its classes", "cifar10", PUBLISHED),
    "mnist": Experiment("MNIST, by the wording of the digits", "mnist", PUBLISHED),
    "retrieval": Experiment("the pictures nearest to some words", takes=(*ANY, "queries")),
    "embedding-space": Experiment("which embeddings are near each other; the modality gap", takes=ANY),
    "temperature": Experiment("how the scale changes probabilities; calibration", takes=ANY),
    "prompts": Experiment("templates ranked by accuracy, and ensembles of them", takes=ANY),
    "benchmark": Experiment("latency, throughput, memory: `miniclip bench` as it comes", None),
}


def check_options(name: str, given: Iterable[str], written: Callable[[str], str] = str) -> None:
    """UsageError for an option that the experiment does not have. written: how the user writes an option's name."""
    every = dict.fromkeys(option for experiment in EXPERIMENTS.values() for option in experiment.takes)
    for option in given:
        if option not in every:
            raise UsageError(f"there is no option {option}; expected one of {', '.join(every)}")
        if option not in EXPERIMENTS[name].takes:
            raise UsageError(f"{name} takes no {written(option)}: leave it out")
