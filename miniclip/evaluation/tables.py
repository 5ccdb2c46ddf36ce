"""The figures of `report.evaluate` in plain text: for one model, or for several side by side."""

from __future__ import annotations

import torch

from miniclip.evaluation import measures
from miniclip.table import columns

HARDEST = 5  # classes and pairs that are listed
COMPARED = {  # heading: where the figure is in a result
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


def bounds(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.2%} to {interval[1]:.2%}"


def percent(figure: dict[str, float]) -> tuple[str, str]:
    """A share and its interval (see `measures.share`), as two cells."""
    return f"{figure['share']:.2%}", bounds((figure["low"], figure["high"]))


def table(result: dict) -> str:
    """One model's figures."""
    first = f"{result['pictures']} pictures"
    if result["left_out"]:
        first += f"; {result['left_out']} left out, because their names are not among the classes"
    parts = (
        ("zero_shot", _zero_shot),
        ("groups", _groups),
        ("retrieval", _retrieval),
        ("linear_probe", _linear_probe),
        ("few_shot", _few_shot),
    )
    return "\n\n".join([first, *(describe(result[part]) for part, describe in parts if part in result)])


def _zero_shot(figures: dict) -> str:
    number = figures["classes"]
    templates = ", ".join(figures["templates"][:3]) + (", ..." if len(figures["templates"]) > 3 else "")
    rows = [
        (name, f"{figures[key]:.2%}", bounds(figures[f"{key}_interval"]), f"{min(1, k / number):.2%}")
        for name, key, k in (("top-1", "top1", 1), ("top-5", "top5", 5), ("mean over classes", "mean_class_recall", 1))
    ]
    lines = [f"zero-shot, {number} classes; prompts: {templates}"]
    lines += [columns(["", "accuracy", "95% interval", "chance"], rows)]
    recalls = {name: row for name, row in figures["class_recall"].items() if row["recall"] < 1}
    hardest = sorted(recalls, key=lambda name: recalls[name]["recall"])[:HARDEST]
    if hardest and max(row["pictures"] for row in recalls.values()) > 1:
        each = ", ".join(f"{name} {recalls[name]['recall']:.0%}" for name in hardest)
        lines.append(f"hardest classes: {each}")
    if figures["most_confused"]:
        pairs = ", ".join(f"{one} / {other} ({count})" for one, other, count in figures["most_confused"][:HARDEST])
        lines.append(f"most confused: {pairs}")
    return "\n".join(lines)


def _groups(figures: dict) -> str:
    rows = [(name, row["pictures"], *percent(row)) for name, row in figures["groups"].items()]
    return columns([figures["by"], "pictures", "accuracy", "95% interval"], rows)


def _retrieval(figures: dict) -> str:
    rows = [
        (direction.replace("_", " "), *(f"{value:.2%}" for value in figures[direction].values()))
        for direction in ("image_to_text", "text_to_image")
    ]
    title = f"retrieval, {figures['captions']} captions, {figures['distinct_captions']} of them different"
    headings = [key.replace("mean_reciprocal_rank", "MRR") for key in figures["image_to_text"]]
    return f"{title}\n{columns(['', *headings], rows)}"


def _linear_probe(figures: dict) -> str:
    title = f"linear probe, {figures['train']} training pictures of {figures['classes']} classes"
    rows = [
        ("top-1", f"{figures['top1']:.2%}", bounds(figures["interval"])),
        ("mean over classes", f"{figures['mean_class_recall']:.2%}", ""),
    ]
    return f"{title}; C = {figures['c']:.3g}, chosen on a fifth of them\n" + columns(
        ["", "accuracy", "95% interval"], rows
    )


def _few_shot(rows: list[dict]) -> str:
    cells = [
        (row["shots"], "-", row["why"])
        if row["top1"] is None
        else (row["shots"], f"{row['top1']:.2%}", bounds((row["low"], row["high"])))
        for row in rows
    ]
    headings = ["pictures of each class", "accuracy", "worst and best draw"]
    return f"few-shot, logistic regression\n{columns(headings, cells)}"


def overview(results: dict[str, dict[str, dict]]) -> str:
    """All figures of one model on one data set, several models side by side, or the accuracies on several data sets.

    results: of `report.evaluate`, by data set and then by model.
    """
    if len(results) == 1:
        (found,) = results.values()
        return table(*found.values()) if len(found) == 1 else comparison(found)
    rows = [
        (data, model, result["pictures"], result["zero_shot"]["classes"], f"{result['zero_shot']['top1']:.2%}",
         bounds(result["zero_shot"]["top1_interval"]), f"{result['zero_shot']['top5']:.2%}")
        for data, found in results.items() for model, result in found.items() if "zero_shot" in result
    ]  # fmt: skip
    return columns(["data", "model", "pictures", "classes", "top-1", "95% interval", "top-5"], rows, left=2)


def comparison(results: dict[str, dict]) -> str:
    """Several models on the same pictures, a row for each; below, the others' zero-shot top-1 minus the first's."""
    cells = {"": list(results)}
    for heading, keys in COMPARED.items():
        values = [_figure(result, keys) for result in results.values()]
        if any(value is not None for value in values):
            cells[heading] = ["-" if value is None else value for value in values]
    first, *others = results
    rows = list(zip(*cells.values(), strict=True))
    lines = [f"{results[first]['pictures']} pictures", "", columns(list(cells), rows)]
    if "groups" in results[first]:
        by, groups = results[first]["groups"].values()
        shares = [[f"{result['groups']['groups'][x]['share']:.2%}" for x in groups] for result in results.values()]
        cells = zip(groups, (row["pictures"] for row in groups.values()), *shares, strict=True)
        lines += ["", columns([by, "pictures", *results], list(cells))]
    if "zero_shot" in results[first]:
        lines.append("")
        for name in others:
            found = difference(results[first], results[name])
            low, high = found["low"], found["high"]
            verdict = ": may be chance" if low <= 0 <= high else ""
            lines.append(
                f"{name} against {first}, top-1: {found['difference']:+.2%} (95%: {low:+.2%} to {high:+.2%}{verdict})"
            )
    return "\n".join(lines)


def difference(first: dict, second: dict) -> dict[str, float]:
    """How much higher the second result's zero-shot top-1 is; see `measures.difference`.

    Pictures that either model could not read do not count.
    """
    one, two = (
        {answer["image"]: answer["rank"] == 1 for answer in result["zero_shot"]["predictions"]}
        for result in (first, second)
    )
    both = [image for image in one if image in two]
    return measures.difference(torch.tensor([two[x] for x in both]), torch.tensor([one[x] for x in both]))


def _figure(result: dict, keys: tuple) -> str | None:
    """The share or interval that is found under the keys; None if it was not measured."""
    found = result
    for key in keys:
        if isinstance(found, dict) and key not in found:
            return None
        found = found[key]
    if found is None:
        return None
    return f"{found:.2%}" if isinstance(found, float) else bounds(found)
