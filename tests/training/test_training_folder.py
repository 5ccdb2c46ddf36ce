"""A run's folder and data: what continues, what is refused, what is said, and what a fault leaves."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import FORK, VIT, assert_same_weights, log, weights

from miniclip import load, tokenize
from miniclip.config import CLIPConfig, PreprocessConfig, to_json
from miniclip.data.lists import DataError
from miniclip.data.synthetic import create_synthetic
from miniclip.errors import MiniclipError, UsageError
from miniclip.io import LockedError, WriteError, locked, write_json
from miniclip.training.checkpoint import LAST, LEGACY, PREVIOUS, load_state
from miniclip.training.train import train


@torch.no_grad()
def embeddings(model, size=32):
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    return model.encode_image(images), model.encode_text(tokenize(["a red circle", "two dogs"]))


# The model that comes back


def test_a_gelu_model_comes_back_from_its_folder_as_it_was(options, tmp_path):
    """GELU, mean and std 0.5, bilinear: nothing of it can be told from the weights' shapes."""
    gelu = replace(VIT.text.transformer, activation="gelu")
    config = CLIPConfig(
        VIT.embed_dim,
        replace(VIT.vision, transformer=gelu),
        replace(VIT.text, transformer=gelu),
        PreprocessConfig(32, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear"),
    )
    write_json(tmp_path / "gelu.json", to_json(config))
    options = replace(options, model_size=str(tmp_path / "gelu.json"), val="", steps=3)
    model = train(options)
    loaded, preprocess = load(options.output, device="cpu")
    assert loaded.config == config and preprocess.config == config.preprocess
    assert all(map(torch.equal, embeddings(model), embeddings(loaded)))
    assert not model.training and type(model) is type(loaded)
    (Path(options.output) / "miniclip.json").unlink()  # the files have the config too
    assert all(map(torch.equal, embeddings(model), embeddings(load(options.output, device="cpu")[0])))
    other = replace(config, text=VIT.text)  # negative control: another activation is another function
    write_json(Path(options.output) / "miniclip.json", to_json(other))
    with pytest.raises(MiniclipError):
        load(options.output, device="cpu")


def test_the_returned_model_has_nothing_of_the_training_left(options):
    model = train(replace(options, val="", steps=2, patch_dropout=0.5, activation_checkpointing=True, freeze=("text",)))
    assert all("forward" not in module.__dict__ and not module._forward_pre_hooks for module in model.modules())
    assert all(map(torch.equal, embeddings(model), embeddings(load(options.output, device="cpu")[0])))


def test_the_sigmoid_loss_trains_and_its_bias_continues(options, tmp_path):
    options = replace(options, loss="sigmoid", steps=4, save_every=2)
    train(options)
    bias = load_state(Path(options.output))["logit_bias"]
    assert bias != -10 and "logit_bias" not in weights(options)
    first = replace(options, output=str(tmp_path / "parts"), steps=4)
    interrupt(first, at=3)
    assert load_state(tmp_path / "parts")["logit_bias"] not in (bias, -10)
    train(first)
    assert_same_weights(weights(options), weights(first))
    assert load_state(tmp_path / "parts")["logit_bias"] == bias
    losses = [line[name] for line in log(options) for name in ("loss", "val_loss") if name in line]
    assert losses[0] > 5 > losses[-1]  # at the start nearly -log sigmoid(-10) for each pair; never so with softmax


def interrupt(options, at):
    from miniclip.training.loop import Trainer

    step = Trainer.step

    def stop(trainer, batch):
        if trainer.done == at:
            raise KeyboardInterrupt
        return step(trainer, batch)

    Trainer.step = stop
    try:
        with pytest.raises(KeyboardInterrupt):
            train(options)
    finally:
        Trainer.step = step


# Continuing


def test_a_run_of_an_earlier_version_continues(options, tmp_path):
    """Its checkpoint was written by torch.save, and knew fewer options."""
    train(options)
    old = replace(options, output=str(tmp_path / "old"))
    interrupt(old, at=4)
    folder = tmp_path / "old"
    state = load_state(folder)
    for name in ("loss", "strict", "hidden", "restart", "image_root", "val_split", "synthetic_pictures"):
        del state["options"][name]
    torch.save({name: value for name, value in state.items() if name not in ("logit_bias", "data")}, folder / LEGACY)
    for name in (LAST, PREVIOUS):
        (folder / name).unlink()
    train(old)
    assert_same_weights(weights(options), weights(old))


def test_a_run_continues_from_the_checkpoint_before_a_damaged_one(options, tmp_path, capsys):
    train(options)
    other = replace(options, output=str(tmp_path / "other"))
    interrupt(other, at=5)
    file = tmp_path / "other" / LAST
    file.write_bytes(file.read_bytes()[:-100])
    train(other)
    assert_same_weights(weights(options), weights(other))
    said = capsys.readouterr().err
    assert f"{LAST} is damaged" in said and "after step 2 of 6" in said


def test_nothing_left_to_do_is_said(options, capsys):
    model = train(replace(options, steps=2))
    before = (Path(options.output) / LAST).stat().st_mtime_ns
    again = train(replace(options, steps=2))
    assert "there is nothing left to do: 2 of 2 steps are done" in capsys.readouterr().err
    assert (Path(options.output) / LAST).stat().st_mtime_ns == before
    assert all(map(torch.equal, embeddings(model), embeddings(again)))


@pytest.mark.parametrize(
    "change", [{"model_size": "resnet.json"}, {"freeze": ("image",)}, {"layer_decay": 0.5}], ids=lambda x: next(iter(x))
)
def test_another_model_in_the_same_folder_is_refused(options, shapes, change):
    train(replace(options, steps=2))
    before = weights(options)
    if "model_size" in change:
        change = {"model_size": str(shapes / change["model_size"])}
    (name,) = change
    expected = rf"another model, or other parts of it \({name} was .*another --output.*--restart"
    with pytest.raises(UsageError, match=expected):
        train(replace(options, steps=4, **change))
    assert_same_weights(before, weights(options))


def test_other_data_in_the_same_folder_is_refused(options, shapes, tmp_path):
    train(replace(options, steps=2))
    rows = json.loads((shapes / "train.json").read_text())
    rows[0]["caption"] += " indeed"
    (shapes / "other.json").write_text(json.dumps(rows))
    expected = r"trains on 72 pictures .*train\.json; now the data are 72 pictures .*other\.json"
    with pytest.raises(UsageError, match=expected):
        train(replace(options, steps=4, data=str(shapes / "other.json")))
    shutil.copytree(shapes, tmp_path / "moved")
    train(replace(options, steps=4, data=str(tmp_path / "moved" / "train.json")))  # the same data elsewhere


def test_restart_begins_again(options, tmp_path):
    train(replace(options, seed=1))
    (Path(options.output) / "mine.txt").write_text("kept")
    train(replace(options, restart=True))
    fresh = replace(options, output=str(tmp_path / "fresh"))
    train(fresh)
    assert_same_weights(weights(options), weights(fresh))
    assert [line["step"] for line in log(options)] == [line["step"] for line in log(fresh)]
    assert (Path(options.output) / "mine.txt").read_text() == "kept"


def test_two_runs_in_one_folder_are_kept_apart(options):
    Path(options.output).mkdir()
    with locked(f"{options.output}/.lock"), pytest.raises(LockedError, match=r"another run is training in .*run: wait"):
        train(options)
    assert [file.name for file in Path(options.output).iterdir()] == [".lock"]
    running = FORK.Process(target=train, args=[replace(options, steps=500)])
    running.start()
    try:
        while not (Path(options.output) / "log.jsonl").exists():
            assert running.is_alive()
            time.sleep(0.05)
        with pytest.raises(LockedError):
            train(options)
    finally:
        running.kill()
        running.join()
    train(options)  # the system released the lock


# What can't be written or read


def test_a_file_in_the_way_is_a_message(options, tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(WriteError, match=r"can't write .*run"):
        train(options)
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only_is_a_message(options, tmp_path):
    (tmp_path / "run").mkdir(mode=0o500)
    with pytest.raises(WriteError, match="Permission denied"):
        train(options)


def test_a_full_disk_is_a_message_and_the_run_continues_after_it(options, tmp_path):
    """A limit on the size of files stands for the disk: the weights alone take more."""
    train(options)
    full = replace(options, output=str(tmp_path / "full"))
    interrupt(full, at=3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(WriteError, match=r"can't write .*full"):
            train(full)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "full").glob(".*.part"))
    assert load_state(tmp_path / "full")["done"] == 2
    train(full)
    assert_same_weights(weights(options), weights(full))


def test_what_killed_runs_left_is_swept(options, tmp_path):
    from miniclip import io

    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    left = tmp_path / "run" / f".last.safetensors.{io._host()}.{process.pid}.part"
    left.parent.mkdir()
    left.write_bytes(b"half")
    train(replace(options, steps=1, val=""))
    assert not left.exists()


def test_lines_in_the_log_that_are_not_a_runs_do_no_harm(options, plots):
    train(replace(options, steps=2))
    file = Path(options.output) / "log.jsonl"
    file.write_bytes(file.read_bytes() + b'[1]\n{"a": 1}\nnull\n{"step": "x"}\n\xff\xfe\nhello\n{"step": 2, "lo')
    train(options)
    lines = file.read_bytes().decode(errors="replace").splitlines()
    assert lines[-1].startswith("{") and '{"step": 2, "lo' in lines  # a new line was begun
    assert "training_results.png" in os.listdir(options.output)


def test_a_picture_that_can_not_be_drawn_on_does_not_stop_the_run(options, monkeypatch, capsys):
    from miniclip.training import train as module

    def full(log, image):
        raise WriteError(f"can't write {image}: No space left on device")

    monkeypatch.setattr(module, "plot", full)
    train(replace(options, steps=1, val=""))
    assert "training_results.png was not drawn: can't write" in capsys.readouterr().err


def test_names_that_are_not_utf8_are_listed(options, shapes, tmp_path):
    folder = tmp_path / "pictures"
    shutil.copytree(shapes / "train", folder / "a_class")
    (folder / "a_class" / os.fsdecode(b"caf\xe9.png")).write_bytes(b"broken")
    train(replace(options, data=str(folder), val="", steps=12, template=("{}",)))
    assert r"caf\udce9.png is not an image" in (tmp_path / "run/problems.txt").read_text()


def test_strict_stops_at_what_can_not_be_read(options, shapes, tmp_path):
    rows = json.loads((shapes / "train.json").read_text())
    rows = [{**row, "image": str(shapes / row["image"])} for row in rows] + [{"image": "gone.png", "caption": "x"}]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    options = replace(options, data=str(tmp_path / "list.json"), val="", steps=1)
    with pytest.raises(DataError, match=r"gone\.png: no such file \(--strict\)"):
        train(replace(options, strict=True))
    train(options)


# Data


def test_a_folder_of_classes_is_trained_on(options, shapes, tmp_path, capsys):
    for split in ("train", "val"):
        for file in (shapes / split).iterdir():
            color, shape, number = file.stem.split("_")
            target = tmp_path / split / f"{color}_{shape}"
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target / f"{number}.png")
    (tmp_path / "train" / "red_circle" / ".hidden.png").write_bytes(b"not a picture")
    (tmp_path / "train" / "red_circle" / "notes.txt").write_text("not a picture")
    with pytest.warns(UserWarning, match="left out: 1 files that are not pictures, 1 hidden files and folders"):
        train(replace(options, data=str(tmp_path / "train"), val=str(tmp_path / "val"), steps=2, template=("a {}",)))
    assert not (tmp_path / "run/problems.txt").exists()
    assert load_state(tmp_path / "run")["data"].startswith("72 pictures")
    options = replace(options, data=str(tmp_path / "train"), val="", steps=1, hidden=True)
    options.output = str(tmp_path / "hidden")
    with pytest.warns(UserWarning, match="left out: 1 files"):
        train(options)
    assert load_state(tmp_path / "hidden")["data"].startswith("73 pictures")


@pytest.mark.parametrize("place", ["beside", "images", "elsewhere"])
def test_where_the_pictures_of_a_list_are(options, shapes, tmp_path, place):
    folder = {"beside": tmp_path, "images": tmp_path / "images", "elsewhere": tmp_path / "else"}[place]
    shutil.copytree(shapes / "train", folder / "train")
    shutil.copy(shapes / "train.json", tmp_path / "list.json")
    root = str(folder) if place == "elsewhere" else ""
    options = replace(options, data=str(tmp_path / "list.json"), val="", steps=1)
    train(replace(options, image_root=root))
    assert not (tmp_path / "run/problems.txt").exists()
    if place == "elsewhere":
        expected = rf"looked for the first at {tmp_path}/train/.* and {tmp_path}/images/train/.*: --image-root"
        with pytest.raises(DataError, match=expected):
            train(replace(options, output=str(tmp_path / "other")))


def test_a_part_of_the_pictures_is_held_out(options, tmp_path):
    options = replace(options, val="", val_split=0.25, steps=3)
    train(options)
    assert any("val_image_top1" in line for line in log(options))
    assert load_state(Path(options.output))["data"].startswith("54 pictures")
    from miniclip.data.lists import read_examples
    from miniclip.training.sources import _split

    examples = read_examples(options.data)
    (train_part, held_out), again = _split(examples, options), _split(examples, options)
    assert (train_part, held_out) == again and not set(train_part) & set(held_out)
    assert len(train_part) + len(held_out) == len(examples)
    assert held_out != _split(examples, replace(options, seed=1))[1]
    for change in ({"val_split": 0.001}, {"val_split": 1.0}, {"val": options.data}):
        with pytest.raises(MiniclipError, match="--val-split"):
            train(replace(options, output=str(tmp_path / "other"), **change))


def test_little_shared_memory_does_not_stop_a_run(options, monkeypatch, capsys):
    from miniclip.data.batches import Pictures
    from miniclip.data.lists import read_examples
    from miniclip.training import sources

    examples = read_examples(options.data)
    assert not Pictures(examples, 8, workers=0)._pixels.is_shared()  # without workers nothing is shared
    assert Pictures(examples, 8, workers=1)._pixels.is_shared()
    for module in (sources, sys.modules[Pictures.__module__]):
        monkeypatch.setattr(module, "shared_memory", lambda: 1000)
    assert Pictures(examples, 8, workers=1)._pixels is None
    train(replace(options, steps=2, val="", workers=2))
    assert "shared memory, and 0.0 are free" in capsys.readouterr().err


def test_the_number_of_drawn_shapes_can_be_chosen(tmp_path, options):
    options = replace(options, create_synthetic=True, data=str(tmp_path / "few"), val="", synthetic_pictures=2, steps=1)
    train(options)
    assert len(list((tmp_path / "few/train").iterdir())) == 36
    assert create_synthetic(tmp_path / "more", train=1, val=1)[0].name == "train.json"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"loss": "hinge"}, "'hinge'; expected one of softmax, sigmoid, triton"),
        ({"steps": -1}, "--steps is -1; expected 0 or more"),
        ({"patch_dropout": 1.0}, "expected a fraction below 1"),
        ({"loss": "triton"}, "for one process on a GPU"),
        ({"data": "/nowhere/list.json"}, r"can't read /nowhere/list\.json: No such file"),
        ({"data": "/nowhere/folder"}, "folder is not a list of pictures"),
        ({"data": "/"}, "has no pictures|None"),
        ({"data": "pipe:cat x.tar"}, "begins with pipe:"),
    ],
)
def test_data_and_options_that_can_not_be_used(options, change, complaint):
    if change.get("data") == "/":
        change = {"data": str(Path(options.output).parent)}
    with pytest.raises(MiniclipError, match=complaint):
        train(replace(options, **change))
