"""Evaluation: how good a model is at naming pictures it was not trained to name, and at finding them by their captions.

    prompts.py     templates, as data
    zero_shot.py   classes as the mean of their prompts; top-k accuracy
    retrieval.py   recall@k, from pictures to captions and back
    datasets.py    pictures with names and captions, from lists and folders
    report.py      all of it for one model and data set: as a dict, a table, a page of pictures
"""

from miniclip.evaluation.datasets import read_classes, read_dataset
from miniclip.evaluation.report import TASKS, evaluate, plot_answers, table
from miniclip.evaluation.retrieval import recall
from miniclip.evaluation.zero_shot import EvaluationError, expand_templates, topk_accuracy, zero_shot_weights

__all__ = [
    "TASKS",
    "EvaluationError",
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
