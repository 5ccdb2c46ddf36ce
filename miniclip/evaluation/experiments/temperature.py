"""How the scale turns cosines into probabilities: how sharp they are, and whether they can be trusted.

probability = softmax(scale * cosine). The scale, exp(logit_scale), is learnt, and limited to 100 (CLIP paper, section
2.5), which all of OpenAI's models reached; its inverse is called the temperature. It changes no ranking and so no
accuracy, only the share of the probability that the best name gets. With cosines of 0.2 to 0.3 and a scale of 1 all
names get nearly the same; with a scale of 100 a difference of 0.02 already means 88% against 12%.

- Confidence: the probability of the best name. Effective names, exp(entropy): the number of equally likely names that
  would be as uncertain, from 1 to all of them.
- Expected calibration error, ECE: the mean difference of confidence and accuracy, in 15 bins of equal width (Guo et al.
  2017, section 2). An ECE of 0 does not mean that a model is good: it may guess, with a low confidence. Few pictures in
  a bin make it look worse than it is.
- The likeliest scale has the lowest negative log-likelihood, as in temperature scaling (Guo et al. 2017, section 4.2),
  here on the same pictures that it is judged by. It depends on the number of names, the prompts and the kind of
  pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip.evaluation.draw import fold, new_figure, open_frame, plain_ticks
from miniclip.evaluation.measures import calibration
from miniclip.evaluation.study import Study, picture_of
from miniclip.table import columns
from miniclip.zero_shot import zero_shot_weights

SCALES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
EXAMPLE_SCALES, NAMES = (3.0, 10.0, 100.0), 6  # for the picture that is drawn
BELOW = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13)}  # a legend below the axes
OWN, LIKELIEST = ", the model's own", ", the likeliest"
LEAST, MOST = 0.1, 1000.0  # the range in which the likeliest scale is searched


def measure(study: Study, templates: Sequence[str] = ("{}",)) -> dict:
    cosines = study.images.double() @ zero_shot_weights(study.model, study.classes, templates).double()
    fitted = likeliest_scale(cosines, study.targets)
    scales = {**dict.fromkeys(_without(study.scale, SCALES), ""), study.scale: OWN, fitted: LIKELIEST}
    rows = [{"scale": x, "what": what, **at_scale(cosines, study.targets, x)} for x, what in sorted(scales.items())]
    confidence = (study.scale * cosines).softmax(1).amax(1)
    typical = int((confidence - confidence.median()).abs().argmin())
    return {
        "model_scale": study.scale,
        "likeliest_scale": fitted,
        "accuracy": (cosines.argmax(1) == study.targets).double().mean().item(),
        "scales": rows,
        "example": {
            "picture": typical,
            "name": study.classes[study.targets[typical]],
            "cosines": cosines[typical].tolist(),
        },
    }


def _without(scale: float, scales: Sequence[float]) -> list[float]:
    """The scales that differ from `scale` by more than rounding: exp(ln 100) is not quite 100."""
    return [other for other in scales if not math.isclose(other, scale, rel_tol=0.01)]


def at_scale(cosines: Tensor, targets: Tensor, scale: float) -> dict:
    """The figures of one scale. cosines: [N, C]; targets: int64 [N]."""
    logs = (scale * cosines).log_softmax(dim=1)
    probabilities = logs.exp()
    confidence, best = probabilities.max(dim=1)
    error, bins = calibration(confidence, best == targets)
    entropy = -(probabilities * logs).sum(1)
    return {
        "confidence": confidence.mean().item(),
        "entropy": entropy.mean().item(),  # nats
        "names": entropy.exp().mean().item(),
        "nll": F.nll_loss(logs, targets).item(),  # nats
        "ece": error,
        "reliability": bins,
    }


def likeliest_scale(cosines: Tensor, targets: Tensor) -> float:
    """The scale in LEAST..MOST with the highest likelihood of the right names; MOST if there are no mistakes.

    The negative log-likelihood is convex in the scale. Its slope, the expected cosine minus the cosine with the right
    name, is bisected for its zero.
    """
    own = cosines.gather(1, targets[:, None]).mean()
    low, high = LEAST, MOST
    for _ in range(50):
        middle = math.sqrt(low * high)
        expected = ((middle * cosines).softmax(1) * cosines).sum(1).mean()
        low, high = (middle, high) if expected <= own else (low, middle)
    return high


def table(result: dict) -> str:
    rows = [
        [f"{row['scale']:.4g}{row['what']}", f"{row['confidence']:.1%}",
         f"{row['names']:,.1f}", f"{row['entropy']:.3f}", f"{row['nll']:.3f}", f"{row['ece']:.4f}"]
        for row in result["scales"]
    ]  # fmt: skip
    headings = ["scale", "confidence", "effective names", "entropy", "loss", "ECE"]
    units = "entropy and loss (negative log-likelihood) in nats; effective names: exp(entropy)"
    return f"{columns(headings, rows)}\n\naccuracy, the same at every scale: {result['accuracy']:.2%}; {units}"


def draw(result: dict, study: Study):
    """One picture's probabilities at several scales; confidence against accuracy; and the figures over the scale."""
    figure = new_figure(15, 6.2)
    sharpness, reliability, curves = figure.subplots(1, 3, width_ratios=(1.2, 1, 1))
    _draw_example(sharpness, result, study)
    _draw_reliability(reliability, result)
    _draw_curves(curves, result)
    sizes = f"{len(study.examples):,} pictures, {len(study.classes):,} names"
    figure.suptitle(f"{study.name}: probability = softmax(scale x cosine); {sizes}")
    return figure


def _draw_example(axis, result: dict, study: Study) -> None:
    example = result["example"]
    cosines = torch.tensor(example["cosines"], dtype=torch.float64)
    shown = cosines.topk(min(NAMES, len(cosines))).indices.tolist()
    scales = sorted([*_without(result["model_scale"], EXAMPLE_SCALES), result["model_scale"]])
    height = 0.8 / len(scales)
    for bar, scale in enumerate(scales):
        own = scale == result["model_scale"]
        values = (scale * cosines).softmax(0)[shown].tolist()
        places = [name + (bar - len(scales) / 2 + 0.5) * height for name in range(len(shown))]
        colour = "tab:blue" if own else str(0.85 - 0.2 * bar)
        label = f"scale {scale:.4g}{OWN if own else ''}"
        axis.barh(places, values, height=height, color=colour, label=label)
    names = [f"{fold(study.classes[i], 22)}  {example['cosines'][i]:.3f}" for i in shown]
    axis.set_yticks(range(len(shown)), names, fontsize=9, parse_math=False)
    axis.invert_yaxis()
    axis.set_title("one picture: cosines and probabilities", fontsize=11)
    axis.set(xlabel="probability", xlim=(0, 1))
    axis.legend(fontsize=9, ncols=2, **BELOW)
    open_frame(axis)
    picture = axis.inset_axes((0.66, 0.06, 0.32, 0.4))
    picture.imshow(picture_of(study.examples[example["picture"]].image))
    picture.set_axis_off()
    picture.set_title(fold(example["name"]), fontsize=9, parse_math=False)


def _draw_reliability(axis, result: dict) -> None:
    axis.plot([0, 1], [0, 1], "--", color="grey", label="accuracy = confidence")
    for what, colour in ((OWN, "tab:blue"), (LIKELIEST, "tab:orange")):
        (row,) = (row for row in result["scales"] if row["what"] == what)
        bins = row["reliability"]
        number = sum(one["count"] for one in bins)
        x, y = ([one[key] for one in bins] for key in ("confidence", "accuracy"))
        axis.plot(x, y, color=colour, linewidth=1, label=f"scale {row['scale']:.4g}{what}: ECE {row['ece']:.3f}")
        axis.scatter(x, y, s=[15 + 300 * one["count"] / number for one in bins], color=colour)
    axis.set_title("reliability: accuracy by confidence", fontsize=11)
    axis.set(xlabel="confidence (size of a dot: number of pictures)", ylabel="accuracy")
    axis.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    axis.legend(fontsize=9, **BELOW)
    axis.grid(alpha=0.3)


def _draw_curves(axis, result: dict) -> None:
    scales, number = [row["scale"] for row in result["scales"]], len(result["example"]["cosines"])
    for label, colour, key, unit in (
        ("confidence", "tab:green", "confidence", 1),
        (f"entropy / ln {number:,}", "tab:purple", "entropy", math.log(number)),
        ("calibration error, ECE", "tab:red", "ece", 1),
    ):
        axis.plot(scales, [row[key] / unit for row in result["scales"]], "o-", color=colour, label=label)
    axis.axhline(result["accuracy"], color="grey", linestyle="--", label="accuracy")
    axis.axvline(result["model_scale"], color="tab:blue", linestyle=":", label=OWN.strip(", "))
    axis.set_title("all pictures, by scale", fontsize=11)
    axis.set(xlabel="scale, logarithmic", xscale="log", ylim=(0, 1.02))
    plain_ticks(axis.xaxis)
    axis.legend(fontsize=9, ncols=2, **BELOW)
    axis.grid(alpha=0.3)
