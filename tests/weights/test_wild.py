"""Files as other programs write them: wrapped, averaged, sharded, in training checkpoints, with LoRA adapters.

Where the library that writes them can be installed it does; what it writes is also made by hand, for everyone.
"""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from conformance.openai_cases import CASES
from conformance.seeded import weights
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel

from miniclip import load
from miniclip.commands import main
from miniclip.errors import MiniclipWarning
from miniclip.loading import blank_model
from miniclip.models import CLIP
from miniclip.save import save_checkpoint
from miniclip.weights import CheckpointError
from miniclip.weights.names import from_canonical

CONFIG = CASES["vit"]
SHAPES = {name: tuple(tensor.shape) for name, tensor in blank_model(CONFIG, torch.float32).state_dict().items()}
STATE = weights(SHAPES)
OTHER = {name: tensor + 1 for name, tensor in STATE.items()}


def model() -> CLIP:
    clip = CLIP(CONFIG)
    clip.load_state_dict(STATE)
    return clip


def is_loaded(path, state=STATE) -> bool:
    got = load(path, "cpu")[0].state_dict()
    return got.keys() == state.keys() and all(torch.equal(got[name], state[name]) for name in state)


def prefixed(prefix: str, state=STATE) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


def adam() -> dict:
    clip = model()
    optimizer = torch.optim.AdamW(clip.parameters())
    sum(parameter.sum() for parameter in clip.parameters()).backward()
    optimizer.step()
    return optimizer.state_dict()


# By hand --------------------------------------------------------------------------------------------------------------

LIGHTNING = {
    "epoch": 1, "global_step": 2, "pytorch-lightning_version": "2.6.6", "state_dict": prefixed("model."),
    "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}, "_batches": [1, 2]}},
    "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5), "dirpath": "/x"}},
    "optimizer_states": [adam()], "lr_schedulers": [{"last_epoch": 1, "_last_lr": [1e-4]}],
    "hparams_name": "kwargs", "hyper_parameters": {"lr": 1e-4, "options": argparse.Namespace(names=["a"])},
}  # fmt: skip
FILES = {
    "OpenCLIP's epoch_K.pt": {"epoch": 3, "name": "run", "state_dict": STATE, "optimizer": adam(), "scaler": {}},
    "OpenCLIP's, of several processes": {"epoch": 3, "state_dict": prefixed("module.")},
    "torch.compile": prefixed("_orig_mod."),
    "DistributedDataParallel of a compiled model": prefixed("module._orig_mod."),
    "Lightning": LIGHTNING,
    "peft, merged": prefixed("base_model.model."),
    "Meta's MetaCLIP": {"epoch": 3, "best": np.float64(0.7), "steps": np.int64(9), "state_dict": prefixed("module.")},
    "AveragedModel": AveragedModel(model()).state_dict(),
    "Hugging Face's names": {name: t.contiguous() for name, t in from_canonical("huggingface", STATE).items()},
    "OpenCLIP's CustomTextCLIP": dict(from_canonical("openclip", STATE)),
}


@pytest.mark.filterwarnings("ignore:.*which is left out")
@pytest.mark.parametrize("kind", FILES)
def test_files_of_other_programs(kind, tmp_path):
    torch.save(FILES[kind], tmp_path / "x.pt")
    assert is_loaded(tmp_path / "x.pt")
    assert not is_loaded(tmp_path / "x.pt", OTHER)


@pytest.mark.parametrize("average", ["model_ema", "state_dict_ema", "ema", "params_ema"])
@pytest.mark.parametrize("weights", ["model", "state_dict", "params"])
def test_the_moving_average_is_taken_and_that_is_said(weights, average, tmp_path):
    torch.save({"epoch": 1, weights: STATE, average: OTHER, "ema_decay": 0.9}, tmp_path / "x.pt")
    message = f"the tensors under {average} are taken, not those under {weights}: save the others"
    with pytest.warns(MiniclipWarning, match=message):
        assert is_loaded(tmp_path / "x.pt", OTHER)
    torch.save({weights: STATE, average: OTHER, "second_ema": OTHER}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="several state dicts"):
        load(tmp_path / "x.pt", "cpu")


def test_another_model_beside_the_weights_is_named(tmp_path):
    """Here a copy that Lightning's WeightAveraging keeps of the weights which it averages."""
    file = {"state_dict": OTHER, "current_model_state": STATE, "scale": {"scale": torch.ones(1)}}
    torch.save(file, tmp_path / "x.pt")
    with pytest.warns(MiniclipWarning, match="under state_dict are taken, not those under current_model_state:"):
        assert is_loaded(tmp_path / "x.pt", OTHER)


def test_classes_in_a_training_checkpoint_are_refused_by_name(tmp_path):
    """Lightning writes hyperparameters as they are. `INERT` in unpickle.py lists the classes that are ignored."""
    torch.save(LIGHTNING | {"hyper_parameters": {"root": Path("x")}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"refused pathlib\S*Path.*nothing was run.* save model.state_dict"):
        load(tmp_path / "x.pt", "cpu")


@pytest.mark.parametrize(
    "names",
    [
        ("base_model.model.visual.proj.lora_A.default.weight", "base_model.model.visual.proj.lora_B.default.weight"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",),
        ("transformer.resblocks.0.mlp.c_fc.lora_magnitude_vector.default.weight",),
    ],
)
@pytest.mark.parametrize("alone", [False, True])
def test_adapters_must_be_merged(names, alone, tmp_path):
    adapters = {name: torch.ones(2, 2) for name in names}
    state = adapters if alone else adapters | prefixed("base_model.model.")
    save_file(state, tmp_path / "x.safetensors")
    message = rf"x\.safetensors: {len(names)} of {len(state)} tensors are of LoRA adapters.*merge_and_unload"
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "x.safetensors", "cpu")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_bfloat16(suffix, tmp_path):
    state = {name: tensor.bfloat16() for name, tensor in STATE.items()}
    save = torch.save if suffix == "pt" else save_file
    save(state, tmp_path / f"x.{suffix}")
    assert is_loaded(tmp_path / f"x.{suffix}", {name: tensor.float() for name, tensor in state.items()})


def test_shards_without_a_config(tmp_path):
    """As Accelerate's save_model writes them: the index is named."""
    halves = [dict(list(STATE.items())[part::2]) for part in (0, 1)]
    index = {}
    for number, half in enumerate(halves):
        save_file(half, tmp_path / f"model-{number}.safetensors")
        index |= dict.fromkeys(half, f"model-{number}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(repr({"weight_map": index}).replace("'", '"'))
    assert is_loaded(tmp_path / "model.safetensors.index.json")


# By the libraries -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["huggingface", "openai"])
def test_peft(layout, tmp_path):
    peft = pytest.importorskip("peft")
    clip, targets = model(), ["c_fc", "c_proj"]
    if layout == "huggingface":
        transformers = pytest.importorskip("transformers")
        save_checkpoint(CONFIG, STATE, tmp_path / "x")
        clip, targets = transformers.CLIPModel.from_pretrained(tmp_path / "x"), ["q_proj", "v_proj"]
    settings = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(clip, settings)
    torch.save(adapted.state_dict(), tmp_path / "adapted.pt")
    adapted.save_pretrained(tmp_path / "adapter")
    for path in (tmp_path / "adapted.pt", tmp_path / "adapter" / "adapter_model.safetensors"):
        with pytest.raises(CheckpointError, match="of LoRA adapters, which are not merged"):
            load(path, "cpu")
    merged = adapted.merge_and_unload().state_dict()
    torch.save(merged, tmp_path / "merged.pt")
    name = "visual.transformer.resblocks.0." + ("attn.in_proj_weight" if layout == "huggingface" else "mlp.c_fc.weight")
    got = load(tmp_path / "merged.pt", "cpu")[0].state_dict()
    assert not torch.equal(got[name], STATE[name]) and got.keys() == STATE.keys()


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self, lr: float = 0.0, names: tuple = ("a",)):
            super().__init__()
            self.save_hyperparameters()
            self.model = model()

        def training_step(self, batch, _):
            return sum(parameter.sum() for parameter in self.parameters())

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr)
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer)}

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    keep = lightning.callbacks.ModelCheckpoint(tmp_path, filename="x")
    trainer = lightning.Trainer(max_epochs=1, callbacks=[keep], default_root_dir=tmp_path, **quiet)
    trainer.fit(Module(), torch.utils.data.DataLoader([1, 2], batch_size=1))
    with pytest.warns(MiniclipWarning, match=r"all names begin with model\., which is left out"):
        assert is_loaded(tmp_path / "x.ckpt")


def test_accelerate(tmp_path):
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    prepared, _ = accelerator.prepare(model(), torch.optim.AdamW(model().parameters()))
    accelerator.save_state(tmp_path / "state")
    accelerator.save_state(tmp_path / "bin", safe_serialization=False)
    accelerator.save_model(prepared, tmp_path / "model")
    accelerator.save_model(prepared, tmp_path / "shards", max_shard_size="200KB")
    for name in ("state", "bin/pytorch_model.bin", "model", "shards/model.safetensors.index.json"):
        assert is_loaded(tmp_path / name), name


def test_timm_s_moving_average(tmp_path):
    utils = pytest.importorskip("timm.utils")
    average = utils.ModelEmaV3(model())
    torch.save({"state_dict": OTHER, "state_dict_ema": utils.get_state_dict(average)}, tmp_path / "x.pth.tar")
    with pytest.warns(MiniclipWarning, match="under state_dict_ema are taken"):
        assert is_loaded(tmp_path / "x.pth.tar")


# On the command line --------------------------------------------------------------------------------------------------


def test_convert_says_what_it_takes(tmp_path, capsys):
    torch.save({"model": prefixed("module."), "model_ema": prefixed("module.", OTHER)}, tmp_path / "x.pt")
    assert main(["convert", str(tmp_path / "x.pt"), str(tmp_path / "y.safetensors")]) == 0
    said = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in said] == ["note", "note"]
    assert "model_ema" in said[0] and "module." in said[1]
    assert is_loaded(tmp_path / "y.safetensors", OTHER)
