"""`load`: from a name or a path to a model that is ready to run. `FAMILIES` is the table of all families of models."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from miniclip.config import CLIPConfig, ConfigError, NamedModel
from miniclip.errors import MiniclipError
from miniclip.family import Family
from miniclip.fast import int8
from miniclip.fast.rates import fastest_model
from miniclip.kernels.dispatch import check_backend
from miniclip.models import CLIP, convert_weights, set_backend
from miniclip.names import fault
from miniclip.preprocess import Preprocess
from miniclip.weights import EMBEDDED
from miniclip.weights.download import download
from miniclip.weights.errors import CheckpointError
from miniclip.weights.files import read_file
from miniclip.weights.hub import fetch_folder
from miniclip.weights.infer import check_names
from miniclip.weights.names import shapes_of
from miniclip.weights.stated import Readers, config_of_file, open_directory


def _families(*folders: str) -> Iterator[Family]:
    """The families in these folders. A folder that can't be imported is left out, with a warning; the others work."""
    for folder in folders:
        try:
            yield from import_module(f"miniclip.{folder}").FAMILIES
        except (ImportError, AttributeError) as error:
            warnings.warn(f"the models of miniclip/{folder} can't be loaded: {error}", stacklevel=2)


FAMILIES = list(_families("mobileclip", "siglip", "openai"))  # asked in this order; the last one owns what is left
MAX_MESSAGE = 5000  # characters of an error


def named_models() -> dict[str, NamedModel]:
    """All models that `load` takes by name: OpenAI's and those that come with the package, then the other families'."""
    return {name: model for family in reversed(FAMILIES) for name, model in family.models.items()}


def available_models() -> list[str]:
    """The names that `load` takes: OpenAI's nine models, Apple's MobileCLIPs, then what comes with the package."""
    models = named_models()
    return sorted(models, key=lambda name: models[name].url is None)


def load(
    name: str | Path,
    device: str | torch.device | None = None,
    jit: bool = False,
    download_root: str | Path | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    backend: str | None = None,
    activation: str | None = None,
    image_size: int | None = None,
    context_length: int | None = None,
    tokenizer: str | Path | None = None,
) -> tuple[CLIP, Preprocess]:
    """Load a model and the preprocessing that goes with it, as `clip.load` does. Nothing in the file is executed.

    name           one of `available_models()`; or the path of an OpenAI TorchScript archive, of a state dict (.pt,
                   .pth, .safetensors; also a MobileCLIP's, folded or not), of a Hugging Face or OpenCLIP directory, or
                   of a training run's folder, whose best checkpoint is taken, or its last if none was validated; or
                   hf-hub:organisation/name[@revision] of the Hugging Face Hub, also without hf-hub: if it is no path
    device         where the model goes; None: CUDA where there is one, else the CPU
    jit            there only for its position; True is an error
    download_root  where downloaded files are cached; None: ~/.cache/clip, as openai/CLIP, or the Hub's own cache
    dtype          type of weights and embeddings, or its name, see `convert_weights`; None: as openai/CLIP float16 on
                   CUDA, else float32; "auto": float16 on CUDA, elsewhere the fastest, as measured now, whose
                   embeddings keep a cosine of 0.999 with float32's, which it prints; "int8": float32, but for the
                   largest matrix products on a CPU, see `miniclip.fast.int8`. Half precision is computed in float32 on
                   CPUs that have no arithmetic for it, see `miniclip.fast.half`
    backend        "torch"; "triton", on CUDA in half precision; None: Triton where it was measured to be faster. See
                   `miniclip.models.set_backend`, which switches a loaded model
    activation     "quick_gelu" or "gelu", for a bare file that can't state it; None: quick_gelu, as OpenAI's
    image_size     another size of the square images, in pixels; and
    context_length another length of the texts, in tokens: the positional embeddings are interpolated, see
                   `miniclip.openai.resize`; None: the model's own
    tokenizer      a SigLIP's tokenizer file, or a directory that has it; None: the one beside the weights

    The config of a named model comes from the table, that of a file or directory that states one from there; only a
    bare file of someone else is inferred from its tensors' shapes. The model is in eval mode and no longer needs the
    file. Raises CheckpointError if the file is missing, broken, hostile or not a CLIP, or states another activation,
    DownloadError if it can't be fetched, and ValueError for arguments that make no sense.
    """
    if jit:
        raise ValueError("jit=True: archives are never executed here; call torch.compile(model) on what load() returns")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if dtype is None:
        dtype = torch.float16 if device.type == "cuda" else torch.float32
    elif dtype == "auto" and device.type == "cuda":
        dtype = torch.float16
    elif dtype in ("float32", "float16", "bfloat16"):
        dtype = getattr(torch, dtype)
    if not isinstance(dtype, torch.dtype) and dtype not in ("auto", "int8"):
        raise ValueError(
            f'dtype is {dtype!r}; expected a torch.dtype, "float32", "float16", "bfloat16", "auto", "int8" or None'
        )
    check_backend(backend, device, dtype if isinstance(dtype, torch.dtype) else torch.float32)  # before downloading

    config, tensors = open_checkpoint(name, download_root, activation, image_size, context_length, tokenizer)

    def build(dtype: torch.dtype | str) -> CLIP:
        if dtype == "int8":
            return int8.quantize(build_model(tensors, config, device=device))
        return build_model(tensors, config, dtype=dtype, device=device)

    with _naming(name):
        model = fastest_model(build) if dtype == "auto" else build(dtype)
    return set_backend(model, backend), Preprocess(config.preprocess)


def build_model(
    state_dict: Mapping[str, Tensor],
    config: CLIPConfig | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> CLIP:
    """A model in eval mode, in its fast form, with a copy of these tensors, which have the model's own names.

    config: None infers it from the shapes, as openai/CLIP's build_model does. Unlike there the result is float32 unless
    `dtype` says otherwise. Raises CheckpointError that lists every missing, unexpected or misshapen tensor.
    """
    if config is None:
        config, _ = owner_of(state_dict).read(state_dict, None, None)
    model = matching_model(config, dtype, state_dict)
    targets = model.state_dict()
    copies = {}
    with torch.inference_mode(False):  # tensors made in that mode could never be trained
        for name, target in targets.items():
            if name in state_dict:
                copies[name] = torch.empty(target.shape, dtype=target.dtype, device=device).copy_(state_dict[name])
            else:  # only counters of batches may be missing
                copies[name] = torch.zeros(target.shape, dtype=target.dtype, device=device)
        model.load_state_dict(copies, assign=True)
    return model.eval()


def matching_model(config: CLIPConfig, dtype: torch.dtype, tensors: Mapping[str, Tensor]) -> CLIP:
    """A model on the meta device whose tensors have these names and shapes. CheckpointError that lists all others."""
    if config.tensors > len(tensors):  # a small file may state a config of many layers, which takes long to build
        raise CheckpointError(
            f"got {len(tensors)} tensors; expected the {config.tensors} or more of the config's layers"
        )
    try:
        model = blank_model(config, dtype, fast=True)
    except Exception as error:  # PyTorch's, of many types, for sizes that no tensor can have
        raise CheckpointError(f"no model has the config's sizes: {error!s:.300}") from error
    check_names(shapes_of(model.state_dict()), shapes_of(tensors))
    return model


def blank_model(config: CLIPConfig, dtype: torch.dtype, fast: bool = False) -> CLIP:
    """A model on PyTorch's meta device: shapes and dtypes, without memory or values."""
    family = family_of(config)
    with torch.inference_mode(False):
        with torch.device("meta"), _Uninitialized():
            model = ((fast and family.fast) or family.model)(config)
        return convert_weights(model, dtype)


def new_model(config: CLIPConfig) -> CLIP:
    """A model of this config with random weights, in its plain form, to be trained."""
    return family_of(config).model(config)


class _Uninitialized(TorchFunctionMode):
    """Inside it, torch.nn.init does nothing. On meta tensors some of it costs seconds: it imports a compiler."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in (kwargs or {}) else args[0]
        return function(*args, **(kwargs or {}))


def family_of(config: CLIPConfig) -> Family:
    """The family of a config."""
    for family in FAMILIES:
        if family.config is type(config):
            return family
    raise CheckpointError(f"no family of models here has a {type(config).__name__}: is a part of miniclip missing?")


def owner_of(tensors: Mapping[str, Tensor]) -> Family:
    """The family that recognises the tensor names of a file."""
    for family in FAMILIES:
        if family.owns(tensors.keys()):
            return family
    raise CheckpointError(
        "no family of models here recognises the names of the tensors: is a part of miniclip missing?"
    )


def config_readers() -> Readers:
    """The families' readers of directories' configs, in the order of `FAMILIES`."""
    return Readers([family.read_openclip for family in FAMILIES], [family.read_huggingface for family in FAMILIES])


def open_checkpoint(
    name: str | Path,
    download_root: str | Path | None = None,
    activation: str | None = None,
    image_size: int | None = None,
    context_length: int | None = None,
    tokenizer: str | Path | None = None,
) -> tuple[CLIPConfig, Mapping[str, Tensor]]:
    """What `load` builds its model from: the config, and the tensors under the model's names, each read when used."""
    named = named_models().get(str(name))
    path = find_file(named, download_root) if named else Path(name)
    with _naming(path):
        path = path.expanduser()
        if not path.exists():
            if why := fault(str(name), available_models()):
                raise CheckpointError(why)
            path = fetch_folder(str(name), download_root)
        config, path = open_directory(path, config_readers()) if path.is_dir() else (None, path)
        tensors = read_file(path)
        config = named.config if named else config_of_file(path, tensors, config, config_readers())
        if config and activation is not None and config.activations != {activation}:
            stated = " and ".join(sorted(config.activations))
            remedy = "leave activation= (--activation) out"
            raise CheckpointError(f"the model's config states {stated}, not {activation}: {remedy}")
        family = family_of(config) if config else owner_of(tensors)
        config, tensors = family.read(tensors, config, activation)
        if family.add_tokenizer is not None:
            config, tensors = family.add_tokenizer(config, tensors, Path(tokenizer or path.parent).expanduser())
        elif tokenizer is not None:
            raise CheckpointError("the model's tokenizer is CLIP's own: leave tokenizer= out")
        if image_size is None and context_length is None:
            return config, tensors
        if family.resize is None:
            sizes = "image_size= (--image-size) and context_length= (--context-length)"
            raise CheckpointError(f"the sizes of a {type(config).__name__} are fixed: leave {sizes} out")
        return family.resize(config, tensors, image_size, context_length)


def find_file(model: NamedModel, download_root: str | Path | None = None) -> Path:
    """The file of a named model, downloaded unless it is there."""
    return EMBEDDED / model.file if model.url is None else download(model, download_root)


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Let every fault of a checkpoint be a CheckpointError that says which file it is about, in MAX_MESSAGE letters."""
    name = f"{path!s:.300}"
    try:
        yield
    except (CheckpointError, ConfigError) as fault:
        message = str(fault)
    except MiniclipError:  # of a download
        raise
    except OSError as error:
        message = f"it can't be read: {error.strerror or error}"
    except Exception as error:  # what hostile bytes make our own code raise is of many types
        message = f"it is damaged, or not a checkpoint: {type(error).__name__}: {error!s:.300}"
    else:
        return
    raise CheckpointError((message if name in message else f"{name}: {message}")[:MAX_MESSAGE])
