"""`miniclip train`: from options to a trained model. For example:

    miniclip train --create-synthetic --epochs 3 --model-size tiny
    miniclip train pictures.json --val held-out.json --model-size small --output runs/small
    miniclip train pictures.csv --from ViT-B/32 --lr 1e-5 --layer-decay 0.8 --epochs 3
    torchrun --nproc-per-node=8 -m miniclip train "shards-{0000..0999}.tar" --steps 100000 --batch-size 4096

Between torchrun's processes the output folder must be shared: all go on from the same checkpoint.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from miniclip import parallel
from miniclip.config import CLIPConfig, to_json
from miniclip.data import cifar
from miniclip.data.batches import Epochs, Pictures
from miniclip.data.lists import existing, read_examples
from miniclip.data.shards import Shards
from miniclip.data.synthetic import KINDS, create_synthetic
from miniclip.io import write_json
from miniclip.loading import load
from miniclip.loading import new_model as untrained
from miniclip.models import CLIP
from miniclip.training.augment import AUGMENTATIONS
from miniclip.training.fast import checkpoint_activations, convolve_channels_last, fuse_quick_gelu
from miniclip.training.loop import Trainer
from miniclip.training.loss import LOSSES
from miniclip.training.options import TrainOptions
from miniclip.training.plot import plot
from miniclip.training.report import Reporter
from miniclip.training.sizes import model_config
from miniclip.weights.files import CONFIG_FILE

# Pictures are kept a little larger than the model's, for augmentations to cut from and to enlarge.
MARGIN = 1.25


def train(options: TrainOptions) -> CLIP:
    """Train a model as the options say, from the beginning or from where a run in the same folder stopped.

    The folder gets best.safetensors (by validation accuracy) and last.safetensors, which `load` reads, config.json,
    log.jsonl, training_results.png, problems.txt if there were any, and checkpoint.pt, from which a run goes on.
    Returns the model. Raises ValueError for options and data that make no sense, and TrainingDivergedError.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    joined_before = dist.is_initialized()
    device = parallel.setup(options.device or None)
    try:
        return _train(options, device)
    finally:
        if dist.is_initialized() and not joined_before:
            dist.destroy_process_group()


def _train(options: TrainOptions, device: torch.device) -> CLIP:
    options = complete(options)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    report = Reporter(output, parallel.is_main(), LOSSES[options.loss].chance(options.batch_size))
    if parallel.is_main():
        make_data(options)
    if dist.is_initialized():
        dist.barrier()
    torch.manual_seed(options.seed)
    model = new_model(options).to(device)
    source, val = open_data(options, model.config, report)
    steps_per_epoch = getattr(source, "steps_per_epoch", 0)
    total = options.steps or options.epochs * steps_per_epoch
    every = steps_per_epoch or max(1, total // 10)
    options = replace(options, val_every=options.val_every or every, save_every=options.save_every or every)
    trainer = Trainer(model, source, val, total, options)
    trainer.resume()
    if parallel.is_main():
        write_json(output / CONFIG_FILE, to_json(model.config))
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        report.say(f"{parameters:,} parameters to train for {total:,} steps of {options.batch_size} pairs, on {device}")
    trainer.run()
    if parallel.is_main() and (output / "log.jsonl").exists():
        try:
            plot(output / "log.jsonl", output / "training_results.png")
        except ImportError as error:
            report.say(f"training_results.png was not drawn: {error}")
    return model


def complete(options: TrainOptions) -> TrainOptions:
    """Check the options, and fill in those that depend on others."""
    world = parallel.world_size()
    if options.create_synthetic:
        folder = Path(options.data or "shapes")
        options = replace(options, data=str(folder / "train.json"), val=options.val or str(folder / "val.json"))
        options = replace(options, augment=options.augment or "none", batch_size=options.batch_size or KINDS)
    options = replace(options, batch_size=options.batch_size or 64)
    if not options.data:
        raise ValueError("no data to train on; expected a list, CIFAR-10, tar shards, or --create-synthetic")
    if options.start_from and options.model_size:
        raise ValueError(f"got --from {options.start_from} and --model-size {options.model_size}; expected one of them")
    if options.batch_size % world or options.batch_size < 2 * world:
        raise ValueError(
            f"--batch-size {options.batch_size} can't be shared evenly by {world} processes, 2 or more to each"
        )
    if is_shards(options.data) and not options.steps:
        raise ValueError("tar shards do not tell how many pictures they hold; expected --steps")
    if not all("{}" in template for template in options.template):
        raise ValueError(f"--template is {options.template}; expected {{}} where the caption goes")
    if options.loss not in LOSSES:
        raise ValueError(f"--loss is {options.loss!r}; expected one of {', '.join(LOSSES)}")
    if options.augment and options.augment not in AUGMENTATIONS:
        raise ValueError(f"--augment is {options.augment!r}; expected one of {', '.join(AUGMENTATIONS)}")
    cifar10 = is_cifar10(options.data)
    return replace(
        options,
        template=options.template or (cifar.TEMPLATES if cifar10 else ("{}",)),
        augment=options.augment or ("cifar" if cifar10 else "photo"),
    )


def make_data(options: TrainOptions) -> None:
    """Draw or download what shall be trained on, if that is asked."""
    if options.create_synthetic:
        create_synthetic(Path(options.data).parent, options.seed)
    if options.download and is_cifar10(options.data):
        cifar.download_cifar10(Path(options.data))


def is_cifar10(data: str) -> bool:
    return Path(data).name == cifar.FOLDER


def is_shards(data: str) -> bool:
    return data.endswith(".tar")


def new_model(options: TrainOptions) -> CLIP:
    """The model to start from, float32, with the faster or leaner modules that training wants."""
    if options.start_from:
        model, _ = load(options.start_from, device="cpu", dtype=torch.float32)
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
        raise ValueError(
            f"--text-from {name} has {other.config.text} and an embedding of {other.config.embed_dim}; "
            f"expected {model.config.text} and {model.config.embed_dim}"
        )
    text = {name: x for name, x in other.state_dict().items() if not name.startswith("visual.")}
    model.load_state_dict(text, strict=False)


def open_data(options: TrainOptions, config: CLIPConfig, report: Reporter) -> tuple[Epochs | Shards, Pictures | None]:
    """What to train on, and the pictures to validate on, if any."""
    size = config.preprocess.image_size
    margin = round(size * MARGIN)
    ranks = (parallel.rank(), parallel.world_size())
    settings = (options.batch_size, options.seed, options.workers, *ranks)
    val = Pictures(_readable(options.val, report), size) if options.val else None
    if is_shards(options.data):
        return Shards(options.data, margin, *settings), val
    if is_cifar10(options.data):
        folder = Path(options.data)
        return Epochs(cifar.read_cifar10(folder, "train"), *settings), val or cifar.read_cifar10(folder, "test")
    return Epochs(Pictures(_readable(options.data, report), margin), *settings), val


def _readable(path: str, report: Reporter) -> list:
    """The examples of a list whose files are there. What is missing is counted and listed."""
    examples = read_examples(Path(path))
    found, missing = existing(examples)
    report.problems(missing, f"of {len(examples)} pictures in {path}; the others are used")
    if not found:
        raise ValueError(f"none of the {len(examples)} pictures in {path} is there; the first: {examples[0].image}")
    return found
