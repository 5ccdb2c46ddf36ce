"""Compare zero-shot classification with a linear probe on the embeddings (needs scikit-learn).

    pip install "miniclip[probe]"
    python examples/linear_probe.py [--model NAME_OR_PATH]

The sample that comes with miniclip has twelve drawings of each of twenty kinds: birds, tools, clothing ... The probe is
trained on half of each kind. Both are measured on the other half.
"""

import argparse

import torch

from miniclip import load
from miniclip.data.datasets import read_dataset
from miniclip.evaluation.classifiers import ZeroShotClassifier, embed_pictures
from miniclip.evaluation.measures import interval
from miniclip.evaluation.probe import linear_probe, split
from miniclip.zero_shot import ranks

parser = argparse.ArgumentParser(description="Zero-shot against a linear probe, on twenty kinds of things.")
parser.add_argument("--model", default="tiny-RN", help="a name that `miniclip models` lists, or a file or directory")
args = parser.parse_args()

model, _ = load(args.model)
examples = read_dataset("sample")
kinds = list(dict.fromkeys(example.category for example in examples))
targets = torch.tensor([kinds.index(example.category) for example in examples])
pictures = embed_pictures(model, [example.image for example in examples])
test, train = split(targets, 0.5, seed=0)
print(f"{len(kinds)} kinds; {len(train)} pictures to learn from, {len(test)} to name; by chance {1 / len(kinds):.1%}")

scores = ZeroShotClassifier(model, kinds).scores(pictures[test])
right = ranks(scores, targets[test]) == 0
low, high = interval(right)
print(f"{right.float().mean():8.2%}  ({low:.1%} to {high:.1%})  zero-shot")

probe = linear_probe(pictures[train], targets[train], pictures[test], targets[test], len(kinds))
low, high = probe["interval"]
print(f"{probe['top1']:8.2%}  ({low:.1%} to {high:.1%})  linear probe, C = {probe['c']:.3g}")
