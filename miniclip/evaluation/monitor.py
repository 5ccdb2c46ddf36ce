"""Watching a model in use: every run appends a line to a file, and is compared with the first one, the reference.

    {"time": "2026-01-31T12:00:00+00:00", "pictures": 500, "top1": 0.81, "rejected": 0.002, "scores": [...],
     "drift": 0.04, "limit": 0.09}

- rejected: the share of inputs that could not be used, as pictures that can't be read.
- scores: the quantiles 0%, 1%, ..., 100% of the probabilities of the predicted names.
- drift: the greatest difference of the two runs' distributions of scores (Kolmogorov-Smirnov), in 0..1, to about 0.01.
  limit: what chance alone exceeds in at most 5% of all runs on pictures like those of the reference.

A drift above the limit means that pictures, classes, prompts or the model have changed, not that the model is wrong; a
drift below it does not mean that accuracy is the same.
"""

from __future__ import annotations

import json
import math
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from miniclip.data.lists import DataError
from miniclip.data.text import read_jsonl
from miniclip.io import locked, write_text

QUANTILES = np.linspace(0, 1, 101)
RESOLUTION = 0.01  # of the drift, because distributions are stored as so many quantiles
KOLMOGOROV = 1.358  # 5% of the distances of two samples exceed this times sqrt(1 / n + 1 / m), for large n and m


def monitor(result: dict, file: Path) -> dict:
    """Append a run to `file`, a new one or one that `monitor` wrote. Returns what was appended.

    result: of `report.evaluate`, with zero-shot. DataError for a file that holds something else.
    """
    inputs = result["pictures"] + result.get("retrieval", {}).get("distinct_captions", 0) + len(result["rejected"])
    scores = [answer["probability"] for answer in result["zero_shot"]["predictions"]]
    run = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "pictures": len(scores),
        "top1": result["zero_shot"]["top1"],
        "rejected": len(result["rejected"]) / inputs,
        "scores": [round(float(score), 6) for score in np.quantile(scores, QUANTILES)],
    }
    with locked(file.with_name(f"{file.name}.lock"), wait=True):
        reference = next((row for _, row in read_jsonl(file)), run) if file.exists() else run
        if not isinstance(reference, dict) or not reference.keys() >= run.keys():
            raise DataError(f"{file} does not begin with a run that --monitor wrote: choose another file")
        run["drift"] = distance(reference["scores"], run["scores"])
        run["limit"] = RESOLUTION + KOLMOGOROV * math.sqrt(1 / reference["pictures"] + 1 / run["pictures"])
        before = file.read_text(encoding="utf-8") if file.exists() else ""
        write_text(file, f"{before}{json.dumps(run)}\n")
    return run


def distance(one: list[float], other: list[float]) -> float:
    """The greatest difference of two distribution functions, each given by its QUANTILES."""
    places = np.union1d(one, other)
    shares = [np.searchsorted(quantiles, places, side="right") / len(QUANTILES) for quantiles in (one, other)]
    return round(float(np.abs(shares[0] - shares[1]).max()), 6)


def describe(run: dict) -> str:
    """A run in a line."""
    verdict = "more than chance" if run["drift"] > run["limit"] else "within chance"
    drift = f"drift of the scores {run['drift']:.3f}, {verdict} (limit {run['limit']:.3f})"
    return f"monitor: {run['pictures']} pictures, {run['rejected']:.1%} of the inputs rejected; {drift}"
