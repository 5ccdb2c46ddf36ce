"""Nine experiments with a CLIP: `miniclip explore NAME --model M [--out DIR]`, or in Python

    study = embed_study("tiny-ViT", *load("tiny-ViT"), read_dataset("sample"))
    result = temperature.measure(study)      # the figures, ready for JSON
    print(temperature.table(result))
    temperature.draw(result, study)          # a matplotlib figure

    models.py           what each model is made of; needs no study
    zero_shot.py        how many pictures get their right name
    cifar10.py          the same on CIFAR-10, by how the classes are worded
    mnist.py            the same on MNIST
    retrieval.py        the pictures nearest to some words
    embedding_space.py  what is near what; the modality gap
    temperature.py      what the scale makes of cosines; calibration
    prompts.py          templates ranked, and ensembles

Each says at its top what its figures mean and what they don't. common.py is what they share, strategies.py what cifar10
and mnist share. The ninth, `miniclip explore benchmark`, is `miniclip bench`.
"""

from __future__ import annotations

from typing import NamedTuple


class Experiment(NamedTuple):
    """data: the data set that it studies, by default or always; takes: the further options that it has."""

    help: str
    data: str | None
    takes: tuple[str, ...]


PUBLISHED = ("data_root", "download", "limit", "seed", "device", "dtype", "activation")  # of published data sets
ANY = (*PUBLISHED, "data", "background", "template")
EXPERIMENTS = {
    "models": Experiment("parameters, resolution and FLOPs of every model's towers", None, ()),
    "zero-shot": Experiment("how many pictures get their right name", "sample", ANY),
    "cifar10": Experiment("CIFAR-10, by the wording of its classes", "cifar10", PUBLISHED),
    "mnist": Experiment("MNIST, by the wording of the digits", "mnist", PUBLISHED),
    "retrieval": Experiment("the pictures nearest to some words", "sample", (*ANY, "query")),
    "embedding-space": Experiment("what is near what, and the modality gap", "sample", ANY),
    "temperature": Experiment("what the scale does to probabilities; calibration", "sample", ANY),
    "prompts": Experiment("templates ranked by accuracy, and ensembles of them", "sample", ANY),
}

