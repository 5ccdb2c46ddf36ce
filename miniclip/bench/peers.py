"""The other implementations of CLIP, with the weights of a miniclip model. None of them is needed to run miniclip."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from miniclip.bench.settings import MODULES
from miniclip.errors import MiniclipError
from miniclip.fast import int8
from miniclip.fast.half import EMULATED
from miniclip.fast.rates import name as dtype_name
from miniclip.loading import build_model
from miniclip.models import CLIP, convert_weights
from miniclip.save import save_checkpoint
from miniclip.weights import CheckpointError
from miniclip.weights.infer import infer_config
from miniclip.weights.names import shapes_of


class MissingPeerError(MiniclipError, ValueError):
    """A peer that was asked for is not installed."""


@dataclass(frozen=True)
class Encoder:
    """One implementation in one setting, as two functions with the same inputs in all implementations."""

    name: str
    setting: str  # precision, and "compiled"
    image: Callable[[Tensor], Tensor]  # float32 pixels [N, 3, R, R] -> embeddings [N, E]
    text: Callable[[Tensor], Tensor]  # token ids [N, L] -> embeddings [N, E]
    model: CLIP | None = None  # miniclip's own, unless compiled

    @property
    def label(self) -> str:
        return f"{self.name}, {self.setting}"


def installed() -> list[str]:
    """The peers that are installed."""
    return [peer for peer, module in MODULES.items() if find_spec(module)]


def chosen(names: str) -> list[str]:
    """The peers in "all" (those installed), "none", or a list as "openai,transformers". MissingPeerError for others."""
    if names in ("all", "none"):
        return installed() if names == "all" else []
    wanted = names.split(",")
    for peer in wanted:
        if peer not in MODULES:
            raise MissingPeerError(f"there is no peer {peer!r}; expected all, none or some of {', '.join(MODULES)}")
        if peer not in installed():
            raise MissingPeerError(f"{peer} is not installed: there is no module {MODULES[peer]}")
    return wanted


def runs_in_openai(model: CLIP) -> bool:
    """Whether openai/CLIP's code reads the model's state dict as the same model."""
    try:
        return infer_config(shapes_of(model.state_dict())) == model.config
    except CheckpointError:
        return False


def encoders(model: CLIP, peer: str, dtypes: list[torch.dtype], compiled: bool) -> list[Encoder]:
    """A peer, or "miniclip", with the weights of `model`, float32, on its device, in each precision that it has.

    compiled: each also as torch.compile makes it, with its weights as constants ("freezing"), the fastest that it has.
    """
    torch._inductor.config.freezing = compiled
    made = []
    for dtype in dtypes:
        encoder = _MAKERS[peer](model, dtype)
        if encoder is None:
            continue
        made.append(encoder)
        # A compiled model would emulate half precision, and compute in float32 where it was quantized.
        if compiled and peer != "onnxruntime" and dtype not in (*EMULATED, torch.int8):
            image, text = torch.compile(encoder.image), torch.compile(encoder.text, dynamic=True)
            made.append(Encoder(encoder.name, f"{encoder.setting} compiled", image, text))
    return made


def _miniclip(model: CLIP, dtype: torch.dtype) -> Encoder:
    if dtype is torch.int8:
        model = int8.quantize(build_model(model.state_dict(), model.config))
    elif dtype is not torch.float32:
        model = convert_weights(build_model(model.state_dict(), model.config), dtype)
    return Encoder("miniclip", dtype_name(dtype), model.encode_image, model.encode_text, model)


def _openai(model: CLIP, dtype: torch.dtype) -> Encoder | None:
    device = model.logit_scale.device
    if dtype is not (torch.float32 if device.type == "cpu" else torch.float16) or not runs_in_openai(model):
        return None  # on a CPU openai/CLIP is always float32, on a GPU float16
    import clip.model

    theirs = clip.model.build_model(dict(model.state_dict())).to(device)
    theirs = theirs.float() if device.type == "cpu" else theirs
    return Encoder("openai/CLIP", dtype_name(dtype), theirs.encode_image, theirs.encode_text)


def _open_clip(model: CLIP, dtype: torch.dtype) -> Encoder | None:
    from open_clip.model import build_model_from_openai_state_dict

    if dtype is torch.int8:
        return None  # PyTorch can quantise nn.Linear, but not its attention
    if not runs_in_openai(model):
        return _open_clip_directory(model, dtype)
    # No cast_dtype, and all of it in one dtype: open_clip's precision "pure_bf16" or "pure_fp16".
    theirs = build_model_from_openai_state_dict(dict(model.state_dict()), cast_dtype=None)
    theirs = theirs.to(model.logit_scale.device, dtype)
    return Encoder("open_clip", dtype_name(dtype), lambda x: theirs.encode_image(x.to(dtype)), theirs.encode_text)


def _open_clip_directory(model: CLIP, dtype: torch.dtype) -> Encoder | None:
    """From the directory that the model's family writes for OpenCLIP, if it does; timm folds the branches."""
    import open_clip
    from timm.utils import reparameterize_model

    with tempfile.TemporaryDirectory() as folder:
        try:
            save_checkpoint(model.config, model.state_dict(), Path(folder) / "model")
        except CheckpointError:
            return None
        theirs = open_clip.create_model(f"local-dir:{Path(folder) / 'model'}").eval()
    theirs = reparameterize_model(theirs).to(model.logit_scale.device, dtype)
    return Encoder("open_clip", dtype_name(dtype), lambda x: theirs.encode_image(x.to(dtype)), theirs.encode_text)


def _transformers(model: CLIP, dtype: torch.dtype) -> Encoder | None:
    from transformers import CLIPModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        try:
            save_checkpoint(model.config, model.state_dict(), Path(folder) / "model")
        except CheckpointError:
            return None  # transformers has no such model
        if not (Path(folder) / "model" / "config.json").exists():
            return None
        stored = torch.float32 if dtype is torch.int8 else dtype
        theirs = CLIPModel.from_pretrained(Path(folder) / "model", dtype=stored).eval().to(model.logit_scale.device)
    if dtype is torch.int8:
        theirs = torch.ao.quantization.quantize_dynamic(theirs, {torch.nn.Linear})

    def image(x: Tensor) -> Tensor:
        return _tensor(theirs.get_image_features(pixel_values=x.to(stored)))

    def text(ids: Tensor) -> Tensor:
        """Padded to the longest text, its best setting: its own tokenizer does so when asked."""
        end = ids.argmax(dim=-1)
        ids = ids[:, : int(end.max()) + 1]
        mask = torch.arange(ids.shape[1], device=ids.device) <= end[:, None]
        return _tensor(theirs.get_text_features(input_ids=ids.long(), attention_mask=mask.long()))

    return Encoder("transformers", dtype_name(dtype), image, text)


def _tensor(output) -> Tensor:
    """transformers 5 returns an object where version 4 returned the features."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _onnxruntime(model: CLIP, dtype: torch.dtype) -> Encoder | None:
    """With what `miniclip export` writes; int8 is onnxruntime's dynamic quantisation. It has no other type on x86."""
    if dtype not in (torch.float32, torch.int8):
        return None
    import onnxruntime

    from miniclip.export import export_model

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_model(model, Path(folder) / "onnx", "onnx")
        files = [Path(folder) / "onnx" / f"{tower}.onnx" for tower in ("image", "text")]
        if dtype is torch.int8:
            from onnxruntime.quantization import quantize_dynamic

            narrow = not torch.cpu._is_vnni_supported()  # without VNNI, sums of products of 8 bits overflow
            for file in files:
                quantize_dynamic(file, file.with_suffix(".int8"), per_channel=True, reduce_range=narrow)
            files = [file.with_suffix(".int8") for file in files]
        image, text = (onnxruntime.InferenceSession(file, options) for file in files)
    return Encoder(
        "onnxruntime",
        dtype_name(dtype),
        lambda x: torch.from_numpy(image.run(None, {"pixels": x.numpy()})[0]),
        lambda ids: torch.from_numpy(text.run(None, {"ids": ids.numpy()})[0]),
    )


_MAKERS = {
    "miniclip": _miniclip,
    "openai": _openai,
    "open_clip": _open_clip,
    "transformers": _transformers,
    "onnxruntime": _onnxruntime,
}
