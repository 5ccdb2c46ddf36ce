"""Evaluation of a model on pictures: measure, table, figure. `miniclip evaluate` and `miniclip explore` use it.

    study.py         Study: pictures, their classes, and a model's embeddings of them
    measures.py      accuracy, recall, confusion, calibration ..., and their intervals
    report.py        `evaluate`: all figures of one model and data set as a dict; tables.py and pages.py show them
    monitor.py       runs of a model in use, compared with the first one
    select.py        which pictures are measured, and which a probe learns from
    experiments/     the experiments of `explore`, and their table
    draw.py          what the figures share
    probe.py         linear probe and few-shot classification
    classifiers.py   classifiers of pictures: flat, hierarchical, open-set
    concepts.py      whether something is in a picture; content checks, scene summaries
"""

from importlib import import_module
from typing import Any

TASKS = ("zero-shot", "retrieval")
PROBES = ("linear-probe", "few-shot")  # these also need training pictures

_MODULES = {  # imported at first use, so that commands can read the names above without PyTorch
    "DataError": "data.text",
    "evaluate": "evaluation.report",
    "expand_templates": "zero_shot",
    "interval": "evaluation.measures",
    "plot_answers": "evaluation.pages",
    "read_classes": "data.datasets",
    "read_dataset": "data.datasets",
    "recall": "evaluation.measures",
    "table": "evaluation.tables",
    "topk_accuracy": "zero_shot",
    "zero_shot_weights": "zero_shot",
}
__all__ = ["PROBES", "TASKS", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"miniclip.{_MODULES[name]}"), name)
