"""A CLIP speedrun: how long do two CPU cores train, from nothing, to a model that names 40% of unseen drawings rightly?

    pip install -c constraints.txt -e ".[pictograms]"      # npm must be installed too
    python examples/speedrun.py                            # about two minutes for the data, then the run
    python examples/speedrun.py --held-out fxemoji         # to choose a recipe, on another style

The data are those of examples/pictograms.py, in fixed versions. The model is to give each of the 1,680 drawings of Noto
one of their 1,680 names; no drawing of Noto is trained on. Anything else may be changed, but recipes are to be compared
on another style, left out of the training data instead: the figure on Noto is the result, not a guide.

The clock runs from the first training picture that is read to the last step. Each run adds a line to OUT/runs.md; the
folder of a run has its curve and the model. weights/README.md shows the runs made so far.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import date
from pathlib import Path

import pictograms
import torch

import miniclip
from miniclip.bench.tasks import machine
from miniclip.config import CLIPConfig, PreprocessConfig, ResNetConfig, TextConfig, openai_transformer, to_json
from miniclip.io import write_json

TARGET = 0.4
PROMPTS = ("{}", "a picture of a {}", "an icon of a {}")
MODEL = CLIPConfig(
    embed_dim=256,
    vision=ResNetConfig(image_size=32, width=24, layers=(1, 2, 2, 1), heads=12),
    text=TextConfig(77, 49408, openai_transformer(192, layers=2)),
    preprocess=PreprocessConfig(32),
)
RECIPE = {
    "steps": 1000,
    "batch_size": 256,
    "lr": 2e-3,  # of what AdamW trains: embeddings, gains, biases
    "muon_lr": 0.02,
    "warmup": 30,
    "precision": "auto",
    "augment": "pictogram",
    "augment_strength": 0.3,
    "first_caption": 0.9,  # the others are keywords, and the names that other sets use
    "template": (PROMPTS[0], *PROMPTS),
}
COLUMNS = ("date", "processor", "torch", "seed", "held out", "minutes", "pairs", "top-1", "top-5")


def main(out: Path, held_out: str, seed: int) -> None:
    data, run = out / "pictograms", out / f"{held_out}-{seed}"
    if not (data / "train.json").exists():
        start = time.perf_counter()
        pictograms.main(data)
        print(f"The data took {(time.perf_counter() - start) / 60:.1f} minutes.")
    train, test, names = split(data, held_out)
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / "model.json", to_json(MODEL))
    options = RECIPE | {"model_size": str(run / "model.json"), "output": str(run), "device": "cpu", "threads": 2}
    start = time.perf_counter()
    miniclip.train(str(train), seed=seed, save_every=RECIPE["steps"], restart=True, **options)
    minutes = (time.perf_counter() - start) / 60

    model, preprocess = miniclip.load(run / "last.safetensors", device="cpu")
    measured = {"templates": PROMPTS, "classes": names, "background": "white", "tasks": ["zero-shot"]}
    result = miniclip.evaluate(model, preprocess, test, **measured)["zero_shot"]
    shares = [
        f"{result[k]:.1%} ({low:.1%} to {high:.1%})"
        for k in ("top1", "top5")
        for low, high in [result[f"{k}_interval"]]
    ]
    pairs = RECIPE["steps"] * RECIPE["batch_size"]
    row = (date.today(), machine()["cpu"], torch.__version__, seed, held_out, f"{minutes:.1f}", f"{pairs:,}", *shares)
    add(out / "runs.md", row)
    if held_out == pictograms.HELD_OUT:
        verdict = "reached" if result["top1"] >= TARGET else "missed"
        print(f"The target of {TARGET:.0%} was {verdict}, in {minutes:.1f} minutes.")


def split(data: Path, held_out: str) -> tuple[Path, Path, list[str]]:
    """The lists to train and to test on, and the names that both have. Noto's drawings are in no list to train on."""
    train, test = data / "train.json", data / f"{held_out}.json"
    if held_out != pictograms.HELD_OUT:
        rows = json.loads(train.read_text())
        train = data / f"without-{held_out}.json"
        write_json(test, [row for row in rows if row["image"].split("/")[1] == held_out])
        write_json(train, [row for row in rows if row["image"].split("/")[1] != held_out])
    known, wanted = ({row["captions"][0] for row in json.loads(path.read_text())} for path in (train, test))
    return train, test, sorted(known & wanted)


def add(table: Path, row: tuple) -> None:
    """Append a row to a Markdown table, and print it."""
    lines = [COLUMNS, ["---"] * len(COLUMNS)] if not table.exists() else []
    lines = "".join(f"| {' | '.join(map(str, line))} |\n" for line in (*lines, row))
    with open(table, "a", encoding="utf-8") as file:
        file.write(lines)
    print(lines, end="")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a small CLIP from nothing, and say how long it took.")
    parser.add_argument("--out", type=Path, default=Path("speedrun"), help="folder of the data and the runs (speedrun)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the order and the augmentation")
    parser.add_argument(
        "--held-out", default=pictograms.HELD_OUT, choices=pictograms.PACKAGES, help="the style to test on (noto)"
    )
    args = parser.parse_args()
    main(args.out, args.held_out, args.seed)
