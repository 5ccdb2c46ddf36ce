"""`explore`: one of nine experiments with a model. `miniclip explore` is its command."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

from miniclip.bench import run as bench
from miniclip.data.datasets import read_dataset
from miniclip.errors import MiniclipWarning, UsageError
from miniclip.evaluation.experiments import EXPERIMENTS, check_options
from miniclip.evaluation.study import Study, embed_study
from miniclip.io import write_atomically, write_json
from miniclip.loading import available_models, load

LOADING = ("device", "dtype", "activation", "image_size", "context_length")  # options that `load` takes
EMBEDDING = ("limit", "background", "seed")
MEASURING = ("templates", "queries", "seed")


@dataclass(frozen=True, repr=False)
class Findings:
    """What an experiment found: the figures, ready for JSON, their table, and what draws a figure to a file (PNG)."""

    result: dict
    table: str
    draw: Callable[[Path], object]

    def __repr__(self) -> str:
        return self.table

    def save(self, folder: str | Path) -> Path:
        """Write NAME.json and draw NAME.png (extra `plot`) in the folder, which is made. Returns folder/NAME."""
        path = Path(folder).expanduser() / self.result["experiment"]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path.with_name(path.name + ".json"), self.result)
        write_atomically(path.with_name(path.name + ".png"), self.draw)
        return path


def explore(name: str, model: str | Path = "ViT-B/32", data: str | None = None, **options: Any) -> Findings:
    """Run one of nine experiments. What it returns prints as a table; its `.save(folder)` writes JSON and a figure.

    name: "models", "zero-shot", "cifar10", "mnist", "retrieval", "embedding-space", "temperature", "prompts" or
    "benchmark", which takes minutes; `miniclip explore --help` says what each is about.
    model: a name or path as `load` takes it. data: "sample" (the default of most), "cifar10", "cifar100", "mnist", a
    list or a folder.
    options: data_root, download, limit, background, templates, queries and seed, for the experiments that have them,
    and device, dtype, activation, image_size and context_length of `load`. None means "not given".

    UsageError for a wrong name, and for an option that the experiment does not have.
    """
    name = name.replace("_", "-")
    if name not in EXPERIMENTS:
        raise UsageError(f"{name} is no experiment; expected one of {', '.join(EXPERIMENTS)}")
    if not isinstance(model, str | Path):
        raise UsageError(f"explore takes the name or path of a model, got a {type(model).__name__}")
    given = {option: value for option, value in {"data": data, **options}.items() if value not in (None, False)}
    check_options(name, given)
    if name == "benchmark":
        return _benchmark(str(model))
    module = import_module(f"miniclip.evaluation.experiments.{name.replace('-', '_')}")
    if name == "models":
        drawn = (module.measure(None if model in available_models() else str(model)),)
        result, heading = {"experiment": name, **drawn[0]}, ""
    else:
        study = _study(name, model, given)
        known = signature(module.measure).parameters
        about = {"experiment": name, "model": study.name, "data": data or EXPERIMENTS[name].data}
        about |= {"pictures": len(study.examples), "classes": len(study.classes)}
        measured = module.measure(study, **{key: given[key] for key in MEASURING if key in known and key in given})
        result = {**about, **measured, "rejected": study.rejected}
        heading = "{experiment}: {model} on {data}, {pictures:,} pictures, {classes:,} names\n\n".format(**about)
        drawn = (result, study)
    return Findings(
        result,
        heading + module.table(result),
        lambda file: module.draw(*drawn).savefig(file, format="png", dpi=110),
    )


def _study(name: str, model: str | Path, given: dict[str, Any]) -> Study:
    """The pictures of the data set, embedded."""
    data = given.get("data") or EXPERIMENTS[name].data
    examples = read_dataset(data, root=given.get("data_root"), download=given.get("download", False))
    loaded = load(model, **{key: given[key] for key in LOADING if key in given})
    return embed_study(str(model), *loaded, examples, **{key: given[key] for key in EMBEDDING if key in given})


def _benchmark(model: str) -> Findings:
    """`miniclip bench` with its defaults."""
    text = "this times every part of the model and takes several minutes; `miniclip bench --quick` takes two"
    warnings.warn(text, MiniclipWarning, stacklevel=3)
    printed: list[str] = []
    report = bench.run(bench.Settings(model=model), printed.append)
    return Findings({"experiment": "benchmark", **report.as_dict()}, "\n".join(printed), report.draw)
