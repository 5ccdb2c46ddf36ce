"""Each row of weights/README.md's table of files, run as it stands there on a small file of that kind."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_halves import half
from test_wild import CONFIG, FILES, OTHER, STATE, is_loaded, model, prefixed

import miniclip
from miniclip.save import save_checkpoint

README = Path(__file__).parents[2] / "weights" / "README.md"
TABLE = README.read_text(encoding="utf-8").split("`pytest tests/weights/test_readme.py`")[0]
CALL = re.compile(r'`(load\("([^"]+)"\))`')
ROWS = [line.split(" | ") for line in TABLE.splitlines() if line.startswith("| ") and CALL.search(line)]
CALLS = [call.groups() for row in ROWS for call in CALL.finditer(row[1])]
# Run in test_load.py, test_hub.py, tests/mobileclip and tests/siglip: names to be downloaded, and other families.
ELSEWHERE = {"ViT-B/32", "MobileCLIP-S1", "mobileclip.pt", "siglip", "hf-hub:organisation/name"}


def archive(path):
    traced = torch.jit.trace_module(model(), {"encode_text": torch.zeros(1, 13, dtype=torch.long)})
    torch.jit.save(traced, path)


def longclip(path):
    long = {"positional_embedding": torch.zeros(248, 64), "positional_embedding_res": torch.ones(248, 64)}
    torch.save(STATE | long, path)


def huggingface(path):
    save_checkpoint(CONFIG, STATE, path)
    (path / "miniclip.json").unlink()


def text_only(path):
    huggingface(path)
    (path / "preprocessor_config.json").unlink()


def text_encoder(path):
    folder, _ = half(path.parent, "text", projection=True)
    shutil.move(folder, path)


def openclip(path, **text_cfg):
    vision = {"image_size": 40, "layers": 3, "width": 128, "patch_size": 8}
    text = {"context_length": 13, "vocab_size": 301, "width": 64, "heads": 1, "layers": 2, **text_cfg}
    path.mkdir()
    config = {"model_cfg": {"embed_dim": 48, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}}
    (path / "open_clip_config.json").write_text(json.dumps(config))
    save_file(STATE, path / "open_clip_model.safetensors")


def shards(path):
    path.parent.mkdir()
    save_file(STATE, path.parent / "model-1.safetensors")
    path.write_text(json.dumps({"weight_map": dict.fromkeys(STATE, "model-1.safetensors")}))


def folder_of(name):
    def make(path):
        path.mkdir(parents=True)
        save_checkpoint(CONFIG, STATE, path / name)

    return make


def saved(content):
    return lambda path: torch.save(content, path)


MAKERS = {
    "ViT-B-32.pt": archive,
    "x.pt": saved(STATE),
    "epoch_32.pt": saved(FILES["OpenCLIP's epoch_K.pt"]),
    "ema.pt": saved({"model": OTHER, "model_ema": STATE}),
    "merged.pt": saved(prefixed("base_model.model.")),
    "longclip.pt": longclip,
    "mine.safetensors": lambda path: save_checkpoint(CONFIG, STATE, path),
    "x.safetensors": lambda path: save_file(STATE, path),
    "checkpoint_0": lambda path: (path.mkdir(), save_file(STATE, path / "model.safetensors")),
    "checkpoint_1/model.safetensors.index.json": shards,
    "runs/small": folder_of("best.safetensors"),
    "clip": huggingface,
    "text_only": text_only,
    "text_encoder": text_encoder,
    "openclip": openclip,
    "metaclip2": lambda path: openclip(path, hf_tokenizer_name="facebook/xlm-v-base", pool_type="eos", eos_id=2),
    "clip/model.safetensors": lambda path: huggingface(path.parent),
}


def test_every_row_is_run():
    assert {name for _, name in CALLS} == MAKERS.keys() | ELSEWHERE
    assert len(ROWS) == TABLE.count("\n| ") - 1  # without the head; each row has a call


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("call", "name"), [call for call in CALLS if call[1] not in ELSEWHERE])
def test_a_row(call, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    MAKERS[name](tmp_path / name)
    eval(call, {"load": miniclip.load})
    if name not in ("text_encoder", "longclip.pt"):  # of other shapes
        assert is_loaded(name)
