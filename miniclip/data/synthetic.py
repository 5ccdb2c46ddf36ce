"""Coloured shapes to try training on: six colours and three shapes, "a red circle" and so on."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw

from miniclip.io import explained, write_text

COLORS = {  # RGB
    "red": (220, 30, 30),
    "blue": (35, 70, 225),
    "green": (25, 150, 50),
    "yellow": (250, 215, 20),
    "purple": (125, 40, 160),
    "orange": (250, 130, 15),
}
CORNERS = {"circle": 64, "square": 4, "triangle": 3}
UPRIGHT = {"square": math.pi / 4, "triangle": -math.pi / 2}  # radians: on an edge, and with a corner above
KINDS = len(COLORS) * len(CORNERS)  # different captions: a larger batch repeats some
SIDE = 64  # pixels


def create_synthetic(folder: Path, seed: int = 0, train: int = 250, val: int = 20) -> tuple[Path, Path]:
    """Draw `train` and `val` pictures of each of the KINDS kinds into `folder`, and the lists train.json and val.json.

    Returns the two lists' paths. The same seed gives the same pictures. WriteError if they can't be written.
    """
    rng = random.Random(seed)
    paths = folder / "train.json", folder / "val.json"
    for path, count in zip(paths, (train, val), strict=True):
        rows = []
        with explained(folder):
            (folder / path.stem).mkdir(parents=True, exist_ok=True)
            for number, color, shape in itertools.product(range(count), COLORS, CORNERS):
                name = f"{path.stem}/{color}_{shape}_{number:03}.png"
                draw_shape(color, shape, rng).save(folder / name)
                rows.append({"image": name, "caption": f"a {color} {shape}"})
        write_text(path, "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    return paths


def draw_shape(color: str, shape: str, rng: random.Random) -> Image.Image:
    """A shape somewhere on a light background, from a third of the picture to most of it wide, turned a little."""
    radius = rng.uniform(0.18, 0.42) * SIDE
    x, y = rng.uniform(radius, SIDE - radius), rng.uniform(radius, SIDE - radius)
    corners = CORNERS[shape]
    turn = UPRIGHT.get(shape, 0) + rng.uniform(-0.2, 0.2)
    angles = (turn + 2 * math.pi * i / corners for i in range(corners))
    ground = tuple(rng.randint(200, 255) for _ in range(3))
    shade = tuple(max(0, min(255, value + rng.randint(-20, 20))) for value in COLORS[color])
    scale = 4  # drawn larger and then reduced, for smooth edges
    image = Image.new("RGB", (SIDE * scale, SIDE * scale), ground)
    points = [((x + radius * math.cos(a)) * scale, (y + radius * math.sin(a)) * scale) for a in angles]
    ImageDraw.Draw(image).polygon(points, fill=shade)
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)
