"""Evaluation: how good a model is at naming pictures it was not trained to name, and at finding them by their captions.

    prompts.py       templates, as data
    zero_shot.py     classes as the mean of their prompts; top-k accuracy
    classifiers.py   classifiers of pictures: flat, hierarchical, open-set
    concepts.py      whether something is in a picture; content checks, scene summaries
    retrieval.py     recall@k, from pictures to captions and back
    datasets.py      pictures with names and captions: published ones, the sample that ships, lists and folders
    features.py      their embeddings, kept if wanted
    statistics.py    confusion, recall of each class, the bootstrap
    probe.py         linear probe and few-shot
    report.py        all of it for one model and data set, as a dict
    tables.py, pages.py   the same as tables and as pictures
    select.py        which pictures are measured, and which a probe learns from
    experiments/     `miniclip explore`
"""

from miniclip.data.datasets import read_classes, read_dataset
from miniclip.data.lists import DataError
from miniclip.evaluation.pages import plot_answers
from miniclip.evaluation.report import TASKS, evaluate
from miniclip.evaluation.retrieval import recall
from miniclip.evaluation.tables import table
from miniclip.zero_shot import expand_templates, topk_accuracy, zero_shot_weights

__all__ = [
    "TASKS",
    "DataError",
    "evaluate",
    "expand_templates",
    "plot_answers",
    "read_classes",
    "read_dataset",
    "recall",
    "table",
    "topk_accuracy",
    "zero_shot_weights",
]
