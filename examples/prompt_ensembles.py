"""Are several prompts better than one? Accuracy of single prompts and of their ensembles, on the sample drawings.

    python examples/prompt_ensembles.py [--model NAME_OR_PATH] [--data DATASET] [--template "a photo of a {}." ...]
"""

import argparse

import torch

from miniclip import load
from miniclip.data.datasets import read_dataset
from miniclip.data.templates import PICTOGRAMS
from miniclip.evaluation.classifiers import ZeroShotClassifier, embed_pictures
from miniclip.evaluation.measures import interval

parser = argparse.ArgumentParser(description="Accuracy of single prompts and of their ensembles.")
parser.add_argument("--model", default="tiny-RN", help="a name that `miniclip models` lists, or a file or directory")
parser.add_argument("--data", default="sample", help="as for `miniclip evaluate`: sample, cifar10, a list, a folder")
parser.add_argument("--template", nargs="+", default=PICTOGRAMS, help="prompts with {} for the name of the class")
args = parser.parse_args()

model, _ = load(args.model)
examples = read_dataset(args.data)
names = [example.captions[0] for example in examples]
classes = list(dict.fromkeys(names))
pictures = embed_pictures(model, [example.image for example in examples])  # once, for all classifiers

rows = [(template, ZeroShotClassifier(model, classes, [template])) for template in args.template]
if len(rows) > 1:
    rows.append(("all, mean of embeddings", ZeroShotClassifier(model, classes, args.template)))
    rows.append(("all, mean of logits", ZeroShotClassifier(model, classes, args.template, ensemble="logits")))

print(f"{len(examples)} pictures, {len(classes)} classes")
for title, classifier in rows:
    predicted = classifier.predict(pictures)
    right = torch.tensor([one == other for one, other in zip(predicted, names, strict=True)])
    low, high = interval(right)
    print(f"{right.float().mean():8.2%}  ({low:.1%} to {high:.1%})  {title}")
