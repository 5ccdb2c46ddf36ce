"""`load`: from a name or a path to a model that is ready to run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from miniclip.config import MODELS, CLIPConfig
from miniclip.config_mobileclip import MOBILECLIP, MobileCLIPConfig
from miniclip.kernels.dispatch import check_backend
from miniclip.models import CLIP, convert_weights, int8, set_backend
from miniclip.models.mobileclip import MobileCLIP
from miniclip.preprocess import Preprocess
from miniclip.rates import fastest_dtype
from miniclip.weights import huggingface, mobileclip, openclip
from miniclip.weights.download import download
from miniclip.weights.errors import CheckpointError
from miniclip.weights.files import read_file
from miniclip.weights.infer import check_names, infer_config
from miniclip.weights.names import Converted, layout_of, to_canonical

EMBEDDED = {  # comes with the package
    name: Path(__file__).with_name(f"{name}.safetensors.gz") for name in ("tiny-ViT", "tiny-RN")
}


def available_models() -> list[str]:
    """The names that `load` takes: OpenAI's nine models, Apple's MobileCLIPs, then what comes with the package."""
    return [*MODELS, *MOBILECLIP, *EMBEDDED]


def load(
    name: str | Path,
    device: str | torch.device | None = None,
    jit: bool = False,
    download_root: str | Path | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    backend: str | None = None,
    activation: str | None = None,
) -> tuple[CLIP, Preprocess]:
    """Load a model and the preprocessing that goes with it, as `clip.load` does. Nothing in the file is executed.

    name           one of `available_models()`; or the path of an OpenAI TorchScript archive, of a state dict (.pt,
                   .pth, .safetensors; also a MobileCLIP's, folded or not), or of a Hugging Face or OpenCLIP directory
    device         where the model goes; None: CUDA where there is one, else the CPU
    jit            there only for its position; True is an error
    download_root  where downloaded files are cached; None: ~/.cache/clip, as openai/CLIP
    dtype          of weights and embeddings, see `convert_weights`; None: as openai/CLIP float16 on CUDA, else float32;
                   "auto": the fastest of float32, float16 and bfloat16, as measured now, which it prints; "int8":
                   float32, but for the largest matrix products on a CPU, see `miniclip.models.int8`. Half precision
                   is float32 arithmetic on CPUs that have no other, see `miniclip.models.half`
    backend        "torch"; "triton", on CUDA in half precision; None: Triton where it was measured to be faster. See
                   `miniclip.models.set_backend`, which switches a loaded model
    activation     "quick_gelu" or "gelu", for a file that can't say; None: what a directory states, else quick_gelu

    The model is in eval mode and no longer needs the file. Raises CheckpointError if the file is missing, broken,
    hostile or not a CLIP, DownloadError if it can't be fetched, and ValueError for arguments that make no sense.
    """
    if jit:
        raise ValueError("jit=True: archives are never executed here; call torch.compile(model) on what load() returns")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if dtype is None:
        dtype = torch.float16 if device.type == "cuda" else torch.float32
    elif dtype == "auto":
        dtype = fastest_dtype(device)
    in_int8 = dtype == "int8"
    if in_int8:
        dtype = torch.float32
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f'dtype is {dtype!r}; expected a torch.dtype, "auto", "int8" or None')
    check_backend(backend, device, dtype)  # before anything is downloaded

    config, tensors = open_checkpoint(name, download_root, activation)
    with _naming(name):
        model = build_model(tensors, config, dtype=dtype, device=device)
    if in_int8:
        int8.quantize(model)
    return set_backend(model, backend), Preprocess(config.preprocess)


def build_model(
    state_dict: Mapping[str, Tensor],
    config: CLIPConfig | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> CLIP:
    """A model in eval mode with a copy of these tensors, which have OpenAI's names.

    config: None infers it from the shapes, as openai/CLIP's build_model does. Unlike there the result is float32 unless
    `dtype` says otherwise. Raises CheckpointError that lists every missing, unexpected or misshapen tensor.
    """
    if config is None:
        infer = mobileclip.infer if mobileclip.is_ours(state_dict) else infer_config
        config = infer(shapes_of(state_dict))
    model = blank_model(config, dtype)
    targets = model.state_dict()
    check_names(shapes_of(targets), shapes_of(state_dict))
    copies = {}
    for name, target in targets.items():
        if name in state_dict:
            copies[name] = torch.empty(target.shape, dtype=target.dtype, device=device).copy_(state_dict[name])
        else:  # only counters of batches may be missing
            copies[name] = torch.zeros(target.shape, dtype=target.dtype, device=device)
    model.load_state_dict(copies, assign=True)
    return model.eval()


def blank_model(config: CLIPConfig, dtype: torch.dtype) -> CLIP:
    """A model on PyTorch's meta device: shapes and dtypes, without memory or values."""
    with torch.device("meta"), _Uninitialized():
        return convert_weights((MobileCLIP if isinstance(config, MobileCLIPConfig) else CLIP)(config), dtype)


class _Uninitialized(TorchFunctionMode):
    """Inside it, torch.nn.init does nothing. On meta tensors some of it costs seconds: it imports a compiler."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in (kwargs or {}) else args[0]
        return function(*args, **(kwargs or {}))


def open_checkpoint(
    name: str | Path, download_root: str | Path | None = None, activation: str | None = None
) -> tuple[CLIPConfig, Mapping[str, Tensor]]:
    """What `load` builds its model from: the config, and the tensors under OpenAI's names, each read when asked for."""
    path = _locate(name, download_root)
    if (path / "open_clip_config.json").is_file():
        directory = openclip
    elif (path / "config.json").is_file():
        directory = huggingface
    elif path.is_dir():
        raise CheckpointError(f"{path} is a directory without config.json or open_clip_config.json: name a file in it")
    else:
        with _naming(path):
            tensors = read_file(path)
            if name in MOBILECLIP or mobileclip.recognises(tensors):
                return mobileclip.read(tensors, MOBILECLIP.get(name), activation)
            tensors = _canonical(tensors)
            return infer_config(shapes_of(tensors), activation or "quick_gelu"), tensors

    config = directory.read_config(path)
    stated = {tower.transformer.activation for tower in (config.vision, config.text) if hasattr(tower, "transformer")}
    if activation is not None and stated != {activation}:
        raise CheckpointError(f"{path} states {' and '.join(sorted(stated))}, not {activation}: leave activation= out")
    with _naming(path):
        tensors = read_file(directory.weight_file(path))
        if isinstance(config, MobileCLIPConfig):
            return mobileclip.read(tensors, config, activation)
        return config, _canonical(tensors)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, without reading values from a file."""
    if isinstance(tensors, Converted):
        return tensors.shapes()
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _locate(name: str | Path, download_root: str | Path | None) -> Path:
    if name in EMBEDDED:
        return EMBEDDED[name]
    if name in MODELS or name in MOBILECLIP:
        return download(name, download_root)
    if not Path(name).exists():
        models = ", ".join(available_models())
        raise CheckpointError(f"{name} is neither a file or directory nor one of the models: {models}")
    return Path(name)


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Let every CheckpointError say which file it is about."""
    try:
        yield
    except CheckpointError as fault:
        raise CheckpointError(fault if str(path) in str(fault) else f"{path}: {fault}") from None


def _canonical(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return to_canonical(layout_of(tensors), tensors)
