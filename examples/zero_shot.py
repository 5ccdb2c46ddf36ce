"""Which of these words fits the picture best?

    python examples/zero_shot.py [IMAGE] [--labels "a cat,a dog"] [--model NAME_OR_PATH]
"""

import argparse
from pathlib import Path

import torch

from miniclip import load, tokenize
from miniclip.preprocess import open_image

LABELS = "balloon,bicycle,camera,cat,dog,elephant,guitar,house,octopus,pizza,red apple,rocket,sailboat,sun,tree"

parser = argparse.ArgumentParser(description="Which of these words fits the picture best?")
parser.add_argument("image", nargs="?", default=Path(__file__).parent / "images" / "elephant.png")
parser.add_argument("--labels", default=LABELS)
parser.add_argument("--model", default="tiny-ViT", help="a name that `miniclip models` lists, or a file or directory")
args = parser.parse_args()

labels = [label.strip() for label in args.labels.split(",")]
model, preprocess = load(args.model)
device = model.logit_scale.device
image = preprocess(open_image(args.image)).unsqueeze(0).to(device)
text = tokenize(labels).to(device)

with torch.inference_mode():
    logits_per_image, logits_per_text = model(image, text)
probabilities = logits_per_image[0].float().softmax(dim=-1)

for probability, label in sorted(zip(probabilities.tolist(), labels, strict=True), reverse=True):
    print(f"{probability:8.2%}  {label}")
