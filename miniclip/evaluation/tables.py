"""What `report.evaluate` returned, in plain text: of one model, or of several side by side."""

from __future__ import annotations

import torch

from miniclip.evaluation.statistics import bootstrap

HARDEST = 5  # classes and pairs that are listed
COMPARED = {  # of several models: where each figure is in a result
    "top-1": ("zero_shot", "top1"),
    "95% interval": ("zero_shot", "top1_interval"),
    "top-5": ("zero_shot", "top5"),
    "class mean": ("zero_shot", "mean_class_recall"),
    "image to text @1": ("retrieval", "image_to_text", "recall@1"),
    "text to image @1": ("retrieval", "text_to_image", "recall@1"),
    "linear probe": ("linear_probe", "top1"),
    "1 shot": ("few_shot", 0, "top1"),
    "16 shots": ("few_shot", -1, "top1"),
}


def table(result: dict) -> str:
    """One model's figures."""
    lines = [f"{result['pictures']} pictures"]
    if result["left_out"]:
        lines[0] += f"; {result['left_out']} left out, whose names are not among the classes"
    for part, describe in (
        ("zero_shot", _zero_shot),
        ("retrieval", _retrieval),
        ("linear_probe", _linear_probe),
        ("few_shot", _few_shot),
    ):
        if part in result:
            lines += ["", *describe(result[part])]
    return "\n".join(lines)


def _zero_shot(figures: dict) -> list[str]:
    number = figures["classes"]
    templates = ", ".join(figures["templates"][:3]) + (", ..." if len(figures["templates"]) > 3 else "")
    lines = [f"zero-shot, {number} classes; prompts: {templates}"]
    lines.append(f"{'':18}{'accuracy':>9}{'95% interval':>20}{'chance':>9}")
    for name, key, k in (("top-1", "top1", 1), ("top-5", "top5", 5), ("mean over classes", "mean_class_recall", 1)):
        interval = _interval(figures[f"{key}_interval"])
        lines.append(f"  {name:18}{figures[key]:7.2%}{interval:>20}{min(1, k / number):9.2%}")
    recalls = {name: row for name, row in figures["class_recall"].items() if row["recall"] < 1}
    hardest = sorted(recalls, key=lambda name: recalls[name]["recall"])[:HARDEST]
    if hardest and max(row["pictures"] for row in recalls.values()) > 1:
        each = ", ".join(f"{name} {recalls[name]['recall']:.0%}" for name in hardest)
        lines.append(f"  hardest classes: {each}")
    if figures["most_confused"]:
        pairs = ", ".join(f"{one} / {other} ({count})" for one, other, count in figures["most_confused"][:HARDEST])
        lines.append(f"  most confused: {pairs}")
    return lines


def _retrieval(figures: dict) -> list[str]:
    count = f"{figures['captions']} captions, {figures['distinct_captions']} of them different"
    recalls = figures["image_to_text"]
    lines = [f"retrieval, {count}", f"{'':17}" + "".join(f"{name:>11}" for name in recalls)]
    for direction in ("image_to_text", "text_to_image"):
        values = "".join(f"{value:11.2%}" for value in figures[direction].values())
        lines.append(f"  {direction.replace('_', ' '):15}{values}")
    return lines


def _linear_probe(figures: dict) -> list[str]:
    learnt = f"linear probe, {figures['train']} training pictures of {figures['classes']} classes"
    return [
        f"{learnt}; C = {figures['c']:.3g}, chosen on a fifth of them",
        f"{'':18}{'accuracy':>9}{'95% interval':>20}",
        f"  {'top-1':18}{figures['top1']:7.2%}{_interval(figures['interval']):>20}",
        f"  {'mean over classes':18}{figures['mean_class_recall']:7.2%}",
    ]


def _few_shot(rows: list[dict]) -> list[str]:
    lines = ["few-shot, logistic regression", f"{'pictures a class':>18}{'accuracy':>9}{'worst and best draw':>22}"]
    for row in rows:
        if row["top1"] is None:
            lines.append(f"{row['shots']:18}        - ({row['why']})")
        else:
            lines.append(f"{row['shots']:18}{row['top1']:9.2%}{_interval((row['low'], row['high'])):>22}")
    return lines


def comparison(results: dict[str, dict]) -> str:
    """Several models on the same pictures, a row each; under it, how each differs from the first in zero-shot top-1."""
    columns = {"": list(results)}
    for heading, keys in COMPARED.items():
        values = [_figure(result, keys) for result in results.values()]
        if any(value is not None for value in values):
            columns[heading] = ["-" if value is None else value for value in values]
    widths = [max(map(len, [heading, *cells])) for heading, cells in columns.items()]
    rows = [list(columns), *zip(*columns.values(), strict=True)]
    first, *others = results
    lines = [f"{results[first]['pictures']} pictures", ""]
    for row in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([f"{row[0]:{widths[0]}}", *cells]))
    if "zero_shot" in results[first]:
        lines.append("")
        for name in others:
            mean, (low, high) = difference(results[first], results[name])
            verdict = "" if low > 0 or high < 0 else ": may be chance"
            lines.append(f"{name} against {first}, top-1: {mean:+.2%} (95%: {low:+.2%} to {high:+.2%}{verdict})")
    return "\n".join(lines)


def difference(first: dict, second: dict) -> tuple[float, tuple[float, float]]:
    """How much higher the second's zero-shot top-1 is, with the bounds of the paired bootstrap.

    Both on the same pictures; those that either could not read do not count.
    """
    one, two = (
        {answer["image"]: float(answer["rank"] == 1) for answer in result["zero_shot"]["predictions"]}
        for result in (first, second)
    )
    gains = torch.tensor([two[image] - one[image] for image in one if image in two], dtype=torch.float64)
    return gains.mean().item(), bootstrap(gains)


def _interval(bounds: tuple[float, float] | None) -> str:
    return "" if bounds is None else f"{bounds[0]:.2%} to {bounds[1]:.2%}"


def _figure(result: dict, keys: tuple) -> str | None:
    """What lies under the keys, as a share or as bounds; None for what was not measured."""
    found = result
    for key in keys:
        if isinstance(found, dict) and key not in found:
            return None
        found = found[key]
    if found is None:
        return None
    return f"{found:.2%}" if isinstance(found, float) else _interval(found)
