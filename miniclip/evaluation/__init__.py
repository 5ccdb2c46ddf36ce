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

from miniclip.data.datasets import read_classes, read_dataset
from miniclip.data.lists import DataError
from miniclip.evaluation.measures import interval, recall
from miniclip.evaluation.pages import plot_answers
from miniclip.evaluation.report import TASKS, evaluate
from miniclip.evaluation.tables import table
from miniclip.zero_shot import expand_templates, topk_accuracy, zero_shot_weights

__all__ = [
    "TASKS",
    "DataError",
    "evaluate",
    "expand_templates",
    "interval",
    "plot_answers",
    "read_classes",
    "read_dataset",
    "recall",
    "table",
    "topk_accuracy",
    "zero_shot_weights",
]
