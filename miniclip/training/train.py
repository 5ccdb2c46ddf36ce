"""`miniclip train`: from options to a trained model. For example:

    miniclip train --create-synthetic --epochs 3 --model-size tiny
    miniclip train pictures.json --val held-out.json --model-size small --output runs/small
    miniclip train pictures.csv --from ViT-B/32 --lr 1e-5 --layer-decay 0.8 --epochs 3
    torchrun --nproc-per-node=8 -m miniclip train "shards-{0000..0999}.tar" --steps 100000 --batch-size 4096

With torchrun, all processes must see the same output folder, because all continue from the same checkpoint.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from miniclip import parallel
from miniclip.config import to_json
from miniclip.data import cifar
from miniclip.data.synthetic import KINDS
from miniclip.errors import MiniclipError, UsageError
from miniclip.io import explained, locked, write_json
from miniclip.loading import build_model, load
from miniclip.loading import new_model as untrained
from miniclip.models import CLIP
from miniclip.training import checkpoint
from miniclip.training.augment import AUGMENTATIONS
from miniclip.training.fast import bfloat16_is_faster, checkpoint_activations, convolve_channels_last, fuse_quick_gelu
from miniclip.training.loop import Trainer
from miniclip.training.loss import LOSSES
from miniclip.training.options import TrainOptions
from miniclip.training.plot import plot
from miniclip.training.report import LOG, PROBLEMS, Reporter
from miniclip.training.sizes import model_config
from miniclip.training.sources import is_cifar10, is_shards, make_data, open_data
from miniclip.weights.files import CONFIG_FILE

__all__ = ["TrainOptions", "train"]

PATHS = ("data", "image_root", "val", "output")  # options that are paths, and nothing else
BEST, LAST, PLOT = "best.safetensors", "last.safetensors", "training_results.png"
OWN_FILES = (BEST, LAST, PLOT, LOG, PROBLEMS, CONFIG_FILE, checkpoint.LAST, checkpoint.NEW, checkpoint.PREVIOUS)


def train(options: TrainOptions | str | Path = "", **named: Any) -> CLIP:
    """Train a model as the options say, from the beginning or from where a run in the same folder stopped.

    options: a TrainOptions, or its `data`. named: other fields of it: train("pictures.json", epochs=3).

    The folder gets best.safetensors (by validation accuracy) and last.safetensors, which `load` reads, miniclip.json,
    log.jsonl, training_results.png, problems.txt if pictures could not be read, and the checkpoints from which a run
    continues. One run at a time works in a folder.

    Returns the model as `load` would give it. Raises UsageError for options that make no sense, DataError for data that
    can't be used, WriteError for a folder that can't be written, LockedError if another run works in it, and
    TrainingDivergedError.
    """
    if not isinstance(options, TrainOptions):
        options = TrainOptions(**({"data": str(options)} if options else {}), **named)
    else:
        options = replace(options, **named)
    if options.threads:
        torch.set_num_threads(options.threads)
    with parallel.joined(options.device or None) as device:
        options = complete(options, device)
        with _own_folder(Path(options.output), options.restart):
            return _train(options, device)


@contextlib.contextmanager
def _own_folder(output: Path, restart: bool) -> Iterator[None]:
    """Make the folder, and keep other runs out of it; `restart` deletes what an earlier one left."""
    with contextlib.ExitStack() as stack:
        if parallel.is_main():
            with explained(output):
                output.mkdir(parents=True, exist_ok=True)
            message = f"another run is training in {output}: wait until it is done, or choose another --output"
            stack.enter_context(locked(output / ".lock", message))
            for name in (*OWN_FILES, checkpoint.LEGACY) if restart else ():
                (output / name).unlink(missing_ok=True)
        parallel.barrier()
        yield


def _train(options: TrainOptions, device: torch.device) -> CLIP:
    output = Path(options.output)
    chance = LOSSES[options.loss].chance(options.batch_size)
    report = Reporter(output, parallel.is_main(), chance, options.strict)
    if parallel.is_main():
        make_data(options)
    parallel.barrier()
    torch.manual_seed(options.seed)
    model = new_model(options).to(device)
    data = open_data(options, model.config.preprocess.image_size, report)
    steps_per_epoch = getattr(data.train, "steps_per_epoch", 0)
    total = options.steps or options.epochs * steps_per_epoch
    every = steps_per_epoch or max(1, total // 10)
    options = replace(options, val_every=options.val_every or every, save_every=options.save_every or every)
    trainer = Trainer(model, data, total, options, report)
    trainer.resume()
    if trainer.done >= total:
        report.say(
            f"there is nothing left to do: {trainer.done:,} of {total:,} steps are done; see --epochs and --steps"
        )
    else:
        if parallel.is_main():
            write_json(output / CONFIG_FILE, to_json(model.config))
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        report.say(f"{parameters:,} parameters to train for {total:,} steps of {options.batch_size} pairs, on {device}")
        trainer.run()
    if parallel.is_main() and (output / LOG).exists():
        try:
            plot(output / LOG, output / PLOT)
        except MiniclipError as error:
            report.say(f"{PLOT} was not drawn: {error}")
    return build_model(model.state_dict(), model.config, device=device)


def complete(options: TrainOptions, device: torch.device) -> TrainOptions:
    """Check the options, and fill in those that depend on others. UsageError if they make no sense."""
    options = replace(options, **{name: _expanded(getattr(options, name)) for name in PATHS})
    if options.create_synthetic:
        folder = Path(options.data or "shapes")
        options = replace(options, data=str(folder / "train.json"), val=options.val or str(folder / "val.json"))
        options = replace(options, augment=options.augment or "none", batch_size=options.batch_size or KINDS)
    options = replace(options, batch_size=options.batch_size or 64)
    if options.precision == "auto":
        votes = parallel.mean(torch.tensor(float(bfloat16_is_faster(device)), device=device))  # all ranks do the same
        options = replace(options, precision="bf16" if votes > 0.5 else "fp32")
    for complaint in _complaints(options, device, parallel.world_size()):
        raise UsageError(complaint)
    cifar10 = is_cifar10(options.data)
    return replace(
        options,
        template=options.template or (cifar.TEMPLATES if cifar10 else ("{}",)),
        augment=options.augment or ("cifar" if cifar10 else "photo"),
    )


def _complaints(options: TrainOptions, device: torch.device, world: int) -> Iterator[str]:
    """What is wrong with the options."""
    for option in fields(options):
        value = getattr(options, option.name)
        if isinstance(value, (int, float)) and value < 0:
            yield f"--{option.name.replace('_', '-')} is {value}; expected 0 or more"
    if not 0 <= options.patch_dropout < 1:
        yield f"--patch-dropout is {options.patch_dropout}; expected a fraction below 1"
    if not options.data:
        yield "no data to train on; expected a list, a folder of classes, CIFAR-10, tar shards, or --create-synthetic"
    if options.start_from and options.model_size:
        yield f"got --from {options.start_from} and --model-size {options.model_size}; expected one of them"
    if options.image_size and not options.start_from:
        yield "--image-size is of a model that is fine-tuned, named with --from; a new one's is in its config"
    if options.batch_size % world or options.batch_size < 2 * world:
        yield f"--batch-size {options.batch_size} can't be shared evenly by {world} processes, 2 or more to each"
    if is_shards(options.data) and not options.steps:
        yield "tar shards do not tell how many pictures they hold; expected --steps"
    if options.val_split and (options.val or is_shards(options.data) or is_cifar10(options.data)):
        yield "--val-split takes pictures from a list or folder, instead of --val"
    if not all("{}" in template for template in options.template):
        yield f"--template is {options.template}; expected {{}} where the caption goes"
    if options.augment and options.augment not in AUGMENTATIONS:
        yield f"--augment is {options.augment!r}; expected one of {', '.join(AUGMENTATIONS)}"
    if options.loss not in LOSSES:
        yield f"--loss is {options.loss!r}; expected one of {', '.join(LOSSES)}"
    if options.loss == "triton" and (device.type != "cuda" or world > 1 or options.chunk):
        yield "--loss triton is for one process on a GPU, without --chunk; --loss softmax computes the same anywhere"


def _expanded(path: str) -> str:
    return str(Path(path).expanduser()) if path else ""


def new_model(options: TrainOptions) -> CLIP:
    """The model to start from, float32, with the faster or leaner modules that training wants."""
    if options.start_from:
        size = options.image_size or None
        model, _ = load(options.start_from, device="cpu", dtype=torch.float32, image_size=size)
    else:
        model = untrained(model_config(options.model_size or "tiny"))
    if options.text_from:
        copy_text_tower(options.text_from, model)
    fuse_quick_gelu(model)
    convolve_channels_last(model)
    if options.activation_checkpointing:
        checkpoint_activations(model)
    return model


def copy_text_tower(name: str, model: CLIP) -> None:
    """Give `model` the text tower and the temperature of another, so that only its image tower is new."""
    other, _ = load(name, device="cpu", dtype=torch.float32)
    if other.config.text != model.config.text or other.config.embed_dim != model.config.embed_dim:
        raise UsageError(
            f"--text-from {name} has {other.config.text} and an embedding of {other.config.embed_dim}; "
            f"expected {model.config.text} and {model.config.embed_dim}"
        )
    text = {name: x for name, x in other.state_dict().items() if not name.startswith("visual.")}
    model.load_state_dict(text, strict=False)
