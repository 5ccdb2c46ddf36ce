"""The options of a training run: one dataclass, from which the command line's arguments are made."""

from __future__ import annotations

from dataclasses import dataclass, field

MODEL_SIZE = (
    "tiny (22 M parameters, pictures of 64 pixels; the default), small (48 M, 128), base (102 M, 224), "
    "large (380 M, 224), cifar-resnet (52 M, 32), a name from `miniclip models`, or a .json file: a run's "
    "miniclip.json, or the arguments of openai/CLIP's constructor"
)
PRECISIONS = ("fp32", "bf16", "fp16", "auto")


def _option(default: object, text: str, **argument: object) -> object:
    """A field with its help, and further arguments for argparse's add_argument."""
    return field(default=default, metadata={"help": text, **argument})


@dataclass
class TrainOptions:
    """The arguments of `miniclip train`, whose --help explains each. 0, "" and () mean "not given"."""

    data: str = _option(
        "",
        "a .json, .jsonl or .csv list, a folder with one folder for each class, cifar-10-batches-py, or "
        "shards-{000..123}.tar",
        nargs="?",
    )
    image_root: str = _option("", "the folder that a list's paths start from (default: the list's, or images/ in it)")
    val: str = _option("", "a list or folder to validate on (CIFAR-10 has its own)")
    val_split: float = _option(0.0, "validate on this fraction of the pictures, and do not train on them")
    hidden: bool = _option(False, "take hidden files and folders of a folder of classes too")
    strict: bool = _option(False, "stop at the first picture or shard that can't be read")
    create_synthetic: bool = _option(False, "first draw coloured shapes in the folder DATA (default: shapes)")
    synthetic_pictures: int = _option(250, "how many of each of the 18 kinds of shapes to draw for training")
    download: bool = _option(False, "get CIFAR-10 first, if it is not there")
    output: str = _option("runs/clip", "the folder of the run; a run that is started again with it continues")
    restart: bool = _option(False, "train from the beginning, and delete what an earlier run left in the folder")

    model_size: str = _option("", MODEL_SIZE)
    start_from: str = _option("", "fine-tune this model: a name or a path as load() takes it", flag="--from")
    image_size: int = _option(0, "pixels, other than the --from model's: positional embeddings are interpolated")
    text_from: str = _option("", "start the text tower from this model's, which must be of the same shape")
    freeze: tuple[str, ...] = _option((), "keep this tower as it is", action="append", choices=("image", "text"))
    freeze_batchnorm: bool = _option(False, "keep the statistics, gains and biases of BatchNorms as they are")
    layer_decay: float = _option(1.0, "learning rate of each layer relative to that of the layer after it")
    whiten_patches: bool = _option(False, "start a ViT's patch embedding from principal components of the pictures")
    patch_dropout: float = _option(0.0, "leave out this fraction of a ViT's patches in each training step")

    epochs: int = _option(10, "passes over the data")
    steps: int = _option(0, "train for this many steps instead")
    batch_size: int = _option(0, "pairs in a step, over all processes (default: 64; for shapes 18, one of each kind)")
    micro_batch: int = _option(0, "pairs whose activations are in memory at once; the gradient stays the whole batch's")
    chunk: int = _option(0, "pairs of a process whose logits are in memory at once")
    activation_checkpointing: bool = _option(False, "keep fewer activations in memory, and compute them again")
    loss: str = _option("softmax", "softmax (CLIP's), sigmoid (SigLIP's), or triton: softmax as a kernel, on a GPU")
    lr: float = _option(5e-4, "highest learning rate")
    muon_lr: float = _option(0.0, "train the towers' matrices by Muon, with this highest learning rate: try 0.02")
    warmup: int = _option(200, "steps in which the rate rises, at most a tenth of all; then it falls as a cosine to 0")
    weight_decay: float = _option(0.1, "weight decay of matrices; gains, biases and the temperature have none")
    clip: float = _option(1.0, "largest norm of the gradient; a larger one is scaled down")
    precision: str = _option(
        "fp32", "precision of the arithmetic, the weights are float32; auto: bf16 where faster", choices=PRECISIONS
    )

    augment: str = _option(
        "", "none, photo, cifar, or pictogram (drawings on a transparent background) (default: photo; none for shapes)"
    )
    augment_strength: float = _option(1.0, "how much pictogram changes a picture, from 0")
    template: tuple[str, ...] = _option((), "a prompt with {} for the caption; may be repeated", action="append")
    first_caption: float = _option(0.0, "how often to take a picture's first caption rather than any of its captions")

    seed: int = _option(0, "the same seed gives the same run, on one machine with one number of threads")
    workers: int = _option(0, "processes that load pictures, for each rank")
    threads: int = _option(0, "CPU threads (default: PyTorch's choice)")
    device: str = _option("", "cpu or cuda (default: CUDA if there is a GPU)")
    log_every: int = _option(10, "steps between lines in log.jsonl")
    val_every: int = _option(0, "steps between validations (default: an epoch)")
    save_every: int = _option(0, "steps between checkpoints (default: an epoch)")
