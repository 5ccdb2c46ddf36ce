"""training_results.png: how a run went, on one page."""

from __future__ import annotations

import json
from pathlib import Path

from miniclip.errors import require
from miniclip.io import write_atomically


def read_log(path: Path) -> list[dict]:
    """The lines of a log.jsonl. If a step was logged twice, as after a crash, the later line counts; what is not a line
    of a log, such as one that a crash cut off, is left out."""
    lines: dict[tuple, dict] = {}
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines[(line["step"], "val_loss" in line)] = line
    return sorted(lines.values(), key=lambda line: line["step"])


def plot(log: Path, image: Path) -> None:
    """Draw loss, accuracies, learning rate and temperature over the steps. MissingExtraError without matplotlib."""
    figure_module = require("matplotlib.figure", "plot", "drawing")
    lines = read_log(log)
    validated = any("val_loss" in line for line in lines)
    figure = figure_module.Figure(figsize=(11, 7.5 if validated else 4), layout="constrained")
    loss, *accuracy, rate, scale = (figure.subplots(2, 2, sharex=True) if validated else figure.subplots(1, 3)).flat
    _curve(loss, lines, "loss", "training", "C0", smooth=True)
    _curve(loss, lines, "val_loss", "validation", "C1", marker="o")
    loss.set(title="Contrastive loss", ylabel="nats")
    for axes in accuracy:
        _curve(axes, lines, "val_image_top1", "image to text", "C1", marker="o", factor=100)
        _curve(axes, lines, "val_text_top1", "text to image", "C2", marker="s", factor=100)
        axes.set(title="Validation, top-1", ylabel="%")
    _curve(rate, lines, "lr", "learning rate", "C0")
    rate.set(title="Learning rate", xlabel="step")
    _curve(scale, lines, "logit_scale", "exp(logit_scale)", "C0")
    scale.set(title="Inverse temperature", xlabel="step")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.set_ylim(0, 1.08 * max(max(curve.get_ydata()) for curve in axes.get_lines()) or 1)
        if len(axes.get_lines()) > 1:
            axes.legend()
    write_atomically(image, lambda file: figure.savefig(file, format="png", dpi=110))


def _curve(axes, lines: list[dict], key: str, label: str, colour: str, smooth=False, marker=None, factor=1) -> None:
    """Plot the values of `key` over the steps; if smooth, faintly, and on top the running mean over a twentieth."""
    points = [(line["step"], line[key] * factor) for line in lines if isinstance(line.get(key), (int, float))]
    steps, values = [step for step, _ in points], [value for _, value in points]
    if not steps:
        return
    marker = marker or ("o" if len(steps) == 1 else None)  # a line of one point is invisible
    window = max(1, len(values) // 20)
    if smooth and window > 1:
        axes.plot(steps, values, color=colour, alpha=0.25)
        recent = (values[max(0, end - window) : end] for end in range(1, len(values) + 1))
        values = [sum(part) / len(part) for part in recent]
    axes.plot(steps, values, color=colour, label=label, marker=marker, markersize=4)
