"""Whole training runs, small ones: what they write, what they survive, what stops them."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from small_runs import COMMAND, FORK, VIT, arguments, assert_same_weights, log, weights
from test_training_cifar import write_cifar

from miniclip.data import cifar
from miniclip.training.checkpoint import LAST, PREVIOUS, load_state
from miniclip.training.diverged import TrainingDivergedError
from miniclip.training.options import TrainOptions
from miniclip.training.train import complete, train


def test_a_run_writes_what_it_promises(options, plots, tmp_path, capsys):
    from miniclip.loading import load

    model = train(options)
    written = {path.name for path in (tmp_path / "run").iterdir()}
    expected = {"best.safetensors", "last.safetensors", LAST, PREVIOUS, ".lock", "miniclip.json", "log.jsonl"}
    assert written == expected | {"training_results.png"}
    lines = log(options)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "val_loss" in line] == [3, 6]
    assert {"loss", "lr", "logit_scale", "grad_norm", "pairs_per_second"} <= lines[0].keys()
    assert lines[0]["loss"] == pytest.approx(math.log(12), abs=0.5)
    assert "captions in this batch repeat others" in capsys.readouterr().err  # 18 names, drawn 12 at a time
    loaded, preprocess = load(f"{options.output}/last.safetensors", device="cpu")
    assert preprocess.config == VIT.preprocess
    assert_same_weights(model.state_dict(), loaded.state_dict())


def test_the_seed_decides_the_run(options, tmp_path):
    options = replace(options, steps=2, val="")
    train(options)
    again, other = replace(options, output=str(tmp_path / "again")), replace(options, output=str(tmp_path / "other"))
    train(again)
    train(replace(other, seed=1))
    assert_same_weights(weights(options), weights(again))
    assert not torch.equal(weights(options)["visual.conv1.weight"], weights(other)["visual.conv1.weight"])


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"model_size": "resnet.json"},
        {"precision": "bf16", "patch_dropout": 0.5, "augment": "pictogram", "muon_lr": 0.02},
    ],
)
def test_an_interrupted_run_goes_on_to_the_same_weights(options, shapes, tmp_path, monkeypatch, change):
    from miniclip.training.loop import Trainer

    options = replace(options, **change)
    options.model_size = str(shapes / options.model_size)
    train(options)
    step, interrupted = Trainer.step, replace(options, output=str(tmp_path / "interrupted"))

    def stop_at_step_5(trainer, batch):
        if trainer.done == 4:
            raise KeyboardInterrupt
        return step(trainer, batch)

    monkeypatch.setattr(Trainer, "step", stop_at_step_5)
    with pytest.raises(KeyboardInterrupt):
        train(interrupted)
    monkeypatch.setattr(Trainer, "step", step)
    assert max(line["step"] for line in log(interrupted)) == 4
    train(interrupted)
    assert_same_weights(weights(options), weights(interrupted))
    losses = [line["loss"] for line in log(options) if "loss" in line]
    assert [line["loss"] for line in log(interrupted) if "loss" in line] == losses


def test_a_run_killed_at_any_moment_goes_on_to_the_same_weights(options, tmp_path):
    """SIGKILL, for real, somewhere in a step or while a checkpoint is being written, which is most of the time here."""
    options = replace(options, steps=12, save_every=1, val_every=12)
    train(options)
    killed = replace(options, output=str(tmp_path / "killed"))
    process = FORK.Process(target=train, args=[killed])
    process.start()
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / LAST).exists():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.2)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "killed/training_results.png").exists()
    train(killed)
    assert_same_weights(weights(options), weights(killed))


@pytest.mark.parametrize("rates", [{"bfloat16": 4.0, "float32": 2.0}, {"bfloat16": 2.0, "float32": 2.0}])
def test_auto_is_bf16_where_that_is_faster(options, rates, monkeypatch):
    monkeypatch.setattr("miniclip.training.fast.matrix_rate", lambda dtype, _: rates[str(dtype).removeprefix("torch.")])
    chosen = complete(replace(options, precision="auto"), torch.device("cpu")).precision
    assert chosen == ("bf16" if rates["bfloat16"] > 2 else "fp32")


def test_changed_options_are_told(options, capsys):
    options = replace(options, steps=1, val="")
    train(options)
    train(replace(options, steps=2, lr=0.1))
    said = capsys.readouterr().err
    assert "the run began with lr = 0.0005; it continues with 0.1" in said
    assert "after step 1 of 2" in said
    assert "with steps" not in said


def test_micro_batches_chunks_and_checkpointing_change_nothing(options, tmp_path):
    options = replace(options, augment="none", steps=1, val="", clip=1e9)
    train(options)
    for name in ("micro_batch", "chunk", "activation_checkpointing"):
        other = replace(options, output=str(tmp_path / name), **{name: 5})
        train(other)
        a, b = log(options), log(other)
        assert [line["loss"] for line in a if "loss" in line] == pytest.approx(
            [line["loss"] for line in b if "loss" in line], rel=1e-5
        )
        assert a[0]["grad_norm"] == pytest.approx(b[0]["grad_norm"], rel=1e-4)
    train(replace(options, output=str(tmp_path / "other"), batch_size=6))  # negative control
    assert a[0]["grad_norm"] != pytest.approx(
        log(replace(options, output=str(tmp_path / "other")))[0]["grad_norm"], rel=1e-2
    )


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_keeps_master_weights(options, precision):
    model = train(replace(options, precision=precision, steps=3, save_every=3))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert all(math.isfinite(line["loss"]) for line in log(options) if "loss" in line)


def test_fine_tuning_a_frozen_tower(options, shapes, tmp_path):
    options = replace(options, steps=3, save_every=3)
    train(replace(options, model_size=str(shapes / "resnet.json")))
    start = weights(options)
    tuned = replace(
        options,
        model_size="",
        start_from=f"{options.output}/last.safetensors",
        output=str(tmp_path / "tuned"),
        freeze=("image",),
        layer_decay=0.5,
    )
    train(tuned)
    end = weights(tuned)
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert not {name for name in changed if name.startswith("visual.")}  # statistics of the BatchNorms neither
    assert {"logit_scale", "text_projection", "ln_final.weight"} <= changed


def test_a_new_image_tower_beside_a_trained_text_tower(options, shapes, tmp_path):
    options = replace(options, steps=2, save_every=2)
    train(options)
    donor = f"{options.output}/last.safetensors"
    resnet = replace(options, model_size=str(shapes / "resnet.json"), text_from=donor, output=str(tmp_path / "resnet"))
    train(replace(resnet, freeze=("text",)))
    old, new = weights(options), weights(resnet)
    text = {name for name in new if not name.startswith("visual.")}
    assert {name for name in text if torch.equal(old[name], new[name])} == text - {"logit_scale"}
    with pytest.raises(ValueError, match=r"--text-from .* has TextConfig.* an embedding of 32; expected TextConfig"):
        train(replace(resnet, model_size="tiny", output=str(tmp_path / "other")))


def test_divergence_stops_the_run(options):
    with pytest.raises(TrainingDivergedError, match=r"step 2: the loss is nan.* not finite: .*Try a lower --lr"):
        train(replace(options, lr=math.inf))
    assert not os.path.exists(f"{options.output}/last.safetensors")


def test_a_loss_at_chance_is_told(options, shapes, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("miniclip.training.report.STUCK_AFTER", 4)
    train(replace(options, lr=0.0, warmup=0, val="", save_every=6))
    assert "the loss stays at 2.485" in capsys.readouterr().err


def test_missing_and_broken_pictures_are_listed(options, shapes, tmp_path, capsys):
    rows = json.loads((shapes / "train.json").read_text())
    for row in rows:
        row["image"] = str(shapes / row["image"])
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    rows += [{"image": "broken.png", "caption": "a"}, {"image": "missing.png", "caption": "b"}]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    train(replace(options, data=str(tmp_path / "list.json"), val="", steps=12, save_every=12))
    listed = (tmp_path / "run/problems.txt").read_text()
    assert "missing.png: no such file\n" in listed
    assert "broken.png is not an image" in listed
    said = capsys.readouterr().err
    assert "1 such so far (of 73 pictures" not in said
    assert "1 such so far (of 74 pictures" in said
    assert "replaced by other pictures" in said


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"data": ""}, "no data to train on"),
        ({"start_from": "RN50"}, "expected one of them"),
        ({"batch_size": 1}, "can't be shared evenly by 1 processes"),
        ({"batch_size": 100}, "72 pictures do not fill a batch of 100"),
        ({"data": "x.tar", "steps": 0}, "expected --steps"),
        ({"template": ("a photo",)}, "where the caption goes"),
        ({"augment": "blur"}, "'blur'; expected one of none, photo, cifar, pictogram"),
        ({"model_size": "huge"}, "'huge' is unknown"),
    ],
)
def test_options_that_make_no_sense(options, change, complaint):
    with pytest.raises(ValueError, match=complaint):
        train(replace(options, **change))


def test_cifar10_is_trained_on_as_it_is(options, shapes, tmp_path):
    folder = write_cifar(tmp_path / cifar.FOLDER)
    resnet = str(shapes / "resnet.json")
    train(replace(options, data=str(folder), val="", model_size=resnet, steps=2, batch_size=4, val_every=2))
    checkpoint = load_state(tmp_path / "run")
    assert checkpoint["options"]["template"] == cifar.TEMPLATES
    assert checkpoint["options"]["augment"] == "cifar"
    assert log(options)[-1]["step"] == 2
    assert "val_image_top1" in log(options)[-1]


@pytest.mark.slow  # starts Python twice more
def test_two_processes_train_as_one(options, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(COMMAND)
    plain = replace(options, augment="none", steps=3)
    command = [*arguments(plain), "--augment", "none"]
    subprocess.run([sys.executable, script, *command], check=True)
    one = weights(plain)
    (tmp_path / "run").rename(tmp_path / "one")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script]
    subprocess.run([*launcher, *command], check=True)
    two = weights(plain)
    for name in one:
        if name.endswith("attn.in_proj_bias"):  # keys: no gradient but rounding, which AdamW makes steps of
            one[name].chunk(3)[1].zero_()
            two[name].chunk(3)[1].zero_()
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=2e-5)
    assert [line["step"] for line in log(plain) if "loss" in line] == [1, 2, 3]  # one process writes


@pytest.mark.slow  # minutes of training, as `miniclip train --create-synthetic --epochs 3 --model-size tiny`
def test_shapes_never_seen_are_named(tmp_path):
    shapes, run = str(tmp_path / "shapes"), str(tmp_path / "run")
    options = TrainOptions(data=shapes, output=run, create_synthetic=True, epochs=3, model_size="tiny", device="cpu")
    train(options)
    assert log(options)[-1]["val_image_top1"] > 0.9
