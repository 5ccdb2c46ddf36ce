"""The parts of miniclip.training: options, sizes, optimizer, reports, faster modules, files, shapes."""

from __future__ import annotations

import argparse
import json
import math
import random
import re
from dataclasses import asdict, replace
from inspect import signature

import numpy as np
import pytest
import torch
from PIL import Image

from miniclip.commands.train import add_arguments, options_from
from miniclip.config import (
    MODELS,
    CLIPConfig,
    ConfigError,
    PreprocessConfig,
    ResNetConfig,
    TextConfig,
    ViTConfig,
    from_arguments,
    openai_transformer,
    to_json,
)
from miniclip.data.synthetic import COLORS, CORNERS, create_synthetic, draw_shape
from miniclip.io import write_atomically, write_json
from miniclip.loading import blank_model
from miniclip.models import CLIP
from miniclip.preprocess import Preprocess
from miniclip.training import fast
from miniclip.training.checkpoint import (
    LAST,
    LEGACY,
    NEW,
    PREVIOUS,
    CheckpointDamagedError,
    export_weights,
    load_state,
    save_state,
)
from miniclip.training.diverged import explain
from miniclip.training.gradient_cache import Embedder
from miniclip.training.optim import build_optimizer, freeze, learning_rate, training_mode
from miniclip.training.options import MODEL_SIZE, TrainOptions
from miniclip.training.plot import plot, read_log
from miniclip.training.report import STUCK_AFTER, Reporter
from miniclip.training.sizes import SIZES, model_config
from miniclip.training.towers import layers_above

TEXT = TextConfig(16, 49408, openai_transformer(64, 2))
VIT = CLIPConfig(32, ViTConfig(32, 16, openai_transformer(64, 2)), TEXT, PreprocessConfig(32))
RESNET = CLIPConfig(32, ResNetConfig(32, 8, (1, 1, 1, 1), 4), TEXT, PreprocessConfig(32))


def model_and_inputs(config=VIT):
    torch.manual_seed(0)
    text = torch.tensor([[49406, 320, 49407, 0], [49406, 736, 1000, 49407]])
    return CLIP(config), torch.randn(2, 3, 32, 32), text


# Options and sizes


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return options_from(parser.parse_args(arguments))


def test_arguments_become_options():
    assert parse() == TrainOptions()
    options = parse("list.json", "--from", "RN50", "--lr", "1e-5", "--freeze", "image", "--freeze-batchnorm")
    assert options == TrainOptions(
        data="list.json", start_from="RN50", lr=1e-5, freeze=("image",), freeze_batchnorm=True
    )
    assert parse("--template", "a {}", "--template", "{}", "--batch-size", "8").template == ("a {}", "{}")


@pytest.mark.parametrize("arguments", [["--precision", "fp8"], ["--freeze", "all"], ["--epochs", "1.5"], ["a", "b"]])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(SystemExit):
        parse(*arguments)


@pytest.mark.parametrize("name", [*SIZES, *MODELS])
def test_config_files_round_trip(name, tmp_path):
    write_json(tmp_path / "config.json", to_json(model_config(name)))
    assert model_config(str(tmp_path / "config.json")) == model_config(name)


def test_sizes_have_heads_of_64():
    widths = {name: model_config(name).text.transformer.width for name in ("tiny", "small", "base", "large")}
    assert widths == {"tiny": 256, "small": 384, "base": 512, "large": 768}
    for config in SIZES.values():
        towers = [config.text.transformer, getattr(config.vision, "transformer", None)]
        assert all(tower.width == 64 * tower.heads for tower in towers if tower)
        if isinstance(config.vision, ResNetConfig):
            assert 32 * config.vision.width == 64 * config.vision.heads


def test_the_help_of_the_sizes_says_what_they_are():
    for name, config in SIZES.items():
        millions = round(sum(x.numel() for x in blank_model(config, torch.float32).parameters()) / 1e6)
        assert re.search(rf"{name} \({millions} M.*?, .*?{config.vision.image_size}", MODEL_SIZE)


# openai/CLIP's arguments for its released models, as its build_model infers them from the files
ARGUMENTS = {
    "RN50": (1024, 224, (3, 4, 6, 3), 64, None, 77, 49408, 512, 8, 12),
    "RN50x16": (768, 384, (6, 8, 18, 8), 96, None, 77, 49408, 768, 12, 12),
    "ViT-B/32": (512, 224, 12, 768, 32, 77, 49408, 512, 8, 12),
    "ViT-L/14@336px": (768, 336, 24, 1024, 14, 77, 49408, 768, 12, 12),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_arguments_of_openai_describe_its_models(name, tmp_path):
    named = dict(zip(list(signature(from_arguments).parameters)[:10], ARGUMENTS[name], strict=True))
    assert from_arguments(**named) == MODELS[name].config == from_arguments(*ARGUMENTS[name])
    assert from_arguments(**named | {"embed_dim": 640}) != MODELS[name].config
    write_json(tmp_path / "a.json", named | {"mean": [0.5] * 3, "std": [0.5] * 3, "activation": "gelu"})
    other = model_config(str(tmp_path / "a.json"))
    assert (other.activations, other.preprocess.mean, other.preprocess.std) == ({"gelu"}, (0.5,) * 3, (0.5,) * 3)


def test_a_model_from_arguments_is_new_and_in_training_mode():
    model = CLIP.from_arguments(16, 32, 1, 64, 16, 9, 49408, 24, 3, 2, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert model.training and model.config.text.transformer.heads == 3
    assert model.visual.conv1.weight.shape == (64, 3, 16, 16)
    assert model.visual.proj.shape == (64, 16) and model.transformer.resblocks[1].mlp.c_fc.weight.shape == (96, 24)
    black_and_white = Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 2, 0)).resize((64, 64), 0)
    pixels = Preprocess(model.config.preprocess)(black_and_white)
    assert (pixels.min().item(), pixels.max().item()) == (-1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_patch_size": None}, "vision_patch_size is None; expected an integer from 1 to 32"),
        ({"vision_layers": (2, 2, 2, 2)}, "vision_patch_size is 16; expected None for a ResNet"),
        ({"vision_layers": (2, 2), "vision_patch_size": None}, "expected the blocks of four stages"),
        ({"vision_layers": "12"}, "vision_layers is '12'"),
        ({"vision_width": 48}, "expected 64 or more"),
        ({"transformer_width": "wide"}, "transformer_width is 'wide'"),
        ({"transformer_heads": 5}, "width 64 does not divide into 5 heads"),
        ({"std": (0, 1, 1)}, "three positive numbers"),
        ({"mean": 5}, "not iterable"),
        ({"wings": 5}, "unexpected keyword argument 'wings'"),
    ],
)
def test_wrong_arguments_are_named(change, message, tmp_path):
    names = list(signature(from_arguments).parameters)
    named = dict(zip(names, (16, 32, 1, 64, 16, 9, 49408, 64, 1, 2), strict=False)) | change
    write_json(tmp_path / "a.json", named)
    with pytest.raises(ConfigError, match=rf"a\.json: .*{message}"):
        model_config(str(tmp_path / "a.json"))


WINGED = to_json(VIT) | {"vision": {"kind": "vit", "patch_size": 3, "wings": 2}}


@pytest.mark.parametrize("text", ["{", "{}", json.dumps(WINGED)])
def test_a_bad_config_file_is_named(text, tmp_path):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ValueError, match=r"c\.json.*(expected JSON|embed_dim is missing|vision.wings is no field)"):
        model_config(str(tmp_path / "c.json"))


def test_an_unknown_size_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'huge' is unknown: expected one of tiny, .*ViT-B/32"):
        model_config("huge")


# Optimizer


def test_the_learning_rate_rises_and_falls():
    options = TrainOptions(lr=2.0, warmup=4)
    rates = [learning_rate(step, 104, options) for step in range(105)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[54] == pytest.approx(1.0)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[104] == pytest.approx(0)
    assert learning_rate(0, 20, options) == 1.0  # of 20 steps no more than 2 are warm-up


def test_matrices_decay_and_nothing_else_does():
    model = CLIP(RESNET)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(Embedder(model), TrainOptions(weight_decay=0.3))
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay.keys() == set(names.values())
    assert {decay[name] for name in decay if name.endswith(("bias", "ln_1.weight", "bn1.weight"))} == {0.0}
    assert decay["logit_scale"] == 0
    assert {decay["visual.conv1.weight"], decay["text_projection"], decay["token_embedding.weight"]} == {0.3}


def test_layer_decay_counts_from_the_end():
    vit, resnet = CLIP(VIT), CLIP(RESNET)
    expected = {
        "logit_scale": 0,
        "text_projection": 0,
        "ln_final.weight": 0,
        "visual.proj": 0,
        "visual.ln_post.bias": 0,
        "transformer.resblocks.1.attn.out_proj.weight": 1,
        "visual.transformer.resblocks.1.mlp.c_proj.weight": 1,
        "visual.transformer.resblocks.0.ln_1.weight": 2,
        "visual.conv1.weight": 3,
        "visual.ln_pre.weight": 3,
        "visual.positional_embedding": 3,
        "token_embedding.weight": 3,
        "positional_embedding": 3,
    }
    above = layers_above(vit)
    assert {name: above[name] for name in expected} == expected
    assert above.keys() == dict(vit.named_parameters()).keys()
    above = layers_above(resnet)
    assert above["visual.attnpool.c_proj.weight"] == 0
    assert above["visual.layer4.0.bn3.weight"] == 1
    assert above["visual.layer1.0.conv1.weight"] == 4
    assert above["visual.bn3.weight"] == 5
    groups = build_optimizer(Embedder(vit), TrainOptions(layer_decay=0.5)).param_groups
    assert {group["lr_scale"] for group in groups} == {1.0, 0.5, 0.25, 0.125}


@pytest.mark.parametrize(
    ("options", "still"),
    [
        (TrainOptions(freeze=("image",)), {"text_projection", "logit_scale"}),
        (TrainOptions(freeze=("text",)), {"visual.conv1.weight", "visual.bn1.weight", "logit_scale"}),
        (TrainOptions(freeze_batchnorm=True), {"visual.conv1.weight", "text_projection", "logit_scale"}),
    ],
)
def test_what_is_frozen_is_not_trained(options, still):
    model = CLIP(RESNET)
    freeze(model, options)
    watched = {"visual.conv1.weight", "visual.bn1.weight", "text_projection", "logit_scale"}
    assert {name for name, p in model.named_parameters() if name in watched and p.requires_grad} == still


@pytest.mark.parametrize(("options", "moves"), [(TrainOptions(freeze_batchnorm=True), False), (TrainOptions(), True)])
def test_frozen_batchnorms_keep_their_statistics(options, moves):
    model, images, _ = model_and_inputs(RESNET)
    training_mode(model.eval(), options)
    before = model.visual.bn1.running_mean.clone()
    model.encode_image(images)
    assert torch.equal(before, model.visual.bn1.running_mean) != moves
    assert model.training


# Faster and leaner modules


def outputs_and_gradients(model, images, text):
    model.zero_grad()
    results = [model.encode_image(images), model.encode_text(text)]
    sum(result.square().sum() for result in results).backward()
    return results + [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("change", [fast.fuse_quick_gelu, fast.convolve_channels_last, fast.checkpoint_activations])
@pytest.mark.parametrize("config", [VIT, RESNET])
def test_changed_modules_compute_the_same(change, config):
    model, images, text = model_and_inputs(config)
    model, images = model.double().eval(), images.double()
    before = outputs_and_gradients(model, images, text)
    change(model)
    after = outputs_and_gradients(model, images, text)
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_wrong_factor_would_be_seen(monkeypatch):
    model, images, _ = model_and_inputs()
    before = model.encode_image(images)
    fast.fuse_quick_gelu(model)
    torch.testing.assert_close(before, model.encode_image(images))
    monkeypatch.setattr(torch.nn.functional, "silu", lambda x: torch.nn.functional.gelu(x))
    assert not torch.allclose(before, model.encode_image(images), atol=1e-3)


def test_maps_of_a_resnet_have_their_channels_last():
    model, images, _ = model_and_inputs(RESNET)
    fast.convolve_channels_last(model)
    seen = []
    model.visual.layer1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.encode_image(images)
    assert seen[0].is_contiguous(memory_format=torch.channels_last) and not seen[0].is_contiguous()


def test_gelu_models_are_left_alone():
    config = replace(VIT, text=replace(TEXT, transformer=replace(openai_transformer(64, 2), activation="gelu")))
    model, _, text = model_and_inputs(config)
    before = model.encode_text(text)
    fast.fuse_quick_gelu(model)
    assert torch.equal(before, model.encode_text(text))


# Where NaN came from


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("visual.transformer.resblocks.1.mlp.c_fc.bias", "the weights visual.transformer.resblocks.1.mlp.c_fc.bias"),
        ("logit_scale", "the weights logit_scale"),
    ],
)
def test_weights_that_are_not_finite_are_named(name, cause):
    model, images, text = model_and_inputs()
    model.get_parameter(name).data.fill_(math.nan)
    assert explain(model, images, text).startswith(cause)


def test_activations_and_gradients_that_are_not_finite_are_named():
    model, images, text = model_and_inputs()
    assert explain(model, images * math.inf, text) == "the pixels"
    assert (
        explain(model, torch.full_like(images, 3e38), text)
        == "the output of visual.conv1, in the image tower"
    )
    model.ln_final.weight.grad = torch.full((64,), math.inf)
    assert explain(model, images, text).startswith("the gradient of ln_final.weight")
    model.ln_final.weight.grad = None
    assert explain(model, images, text).startswith("the loss")
    model.text_projection.data.zero_()
    assert explain(model, images, text).startswith("the text embeddings divided by their lengths")


# What is printed


def test_a_loss_that_stays_at_chance_is_told_once(tmp_path, capsys):
    report = Reporter(tmp_path, True, chance=math.log(64))
    for step in range(3 * STUCK_AFTER):
        report.watch_loss(math.log(64) + 0.01, warming_up=step < 20)
    said = capsys.readouterr().err
    assert said.count("the loss stays at 4.159") == 1


@pytest.mark.parametrize(
    ("loss", "steps", "speaks"), [(4.0, 300, True), (4.16, STUCK_AFTER - 1, True), (4.16, 300, False)]
)
def test_a_loss_that_moves_is_not(tmp_path, capsys, loss, steps, speaks):
    report = Reporter(tmp_path, speaks, chance=math.log(64))
    for _ in range(steps):
        report.watch_loss(loss, warming_up=False)
    assert capsys.readouterr().err == ""


def test_repeated_captions_are_told_once_and_counted(tmp_path, capsys):
    report = Reporter(tmp_path, True, chance=math.log(4))
    assert report.watch_texts(["a", "b", "c"]) == 0
    assert capsys.readouterr().err == ""
    assert [report.watch_texts(["a", "b", "a", "a"]) for _ in range(2)] == [2, 2]
    said = capsys.readouterr().err
    assert said.count("2 of 4 captions in this batch repeat others ('a': 3 times)") == 1


def test_problems_are_listed(tmp_path, capsys):
    report = Reporter(tmp_path, True, chance=math.log(4))
    report.problems([], "left out")
    report.problems(["a.png: no such file", "b.png: broken"], "left out")
    report.problems(["c.png: broken", "b.png: broken"], "left out")
    other_process = Reporter(tmp_path, False, chance=math.log(4))
    other_process.problems(["d.png: broken"], "left out")
    report.finish()
    listed = (tmp_path / "problems.txt").read_text().splitlines()
    assert listed == ["a.png: no such file", "b.png: broken", "c.png: broken", "d.png: broken"]
    said = capsys.readouterr().err
    assert "a.png: no such file; 2 such so far (left out" in said
    assert "4 pictures or shards could not be used" in said
    assert "c.png" not in said


# Files


def test_a_file_is_whole_or_as_before(tmp_path):
    path = tmp_path / "x"
    write_atomically(path, lambda file: file.write_text("old"))

    def fail(file):
        file.write_text("half of the n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert [file.name for file in tmp_path.iterdir()] == ["x"]
    assert path.read_text() == "old"


def a_state(done=3):
    """One as a run has it."""
    torch.manual_seed(done)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW([{"params": [model.weight], "lr_scale": 0.5}, {"params": [model.bias]}], lr=1e-3 / 3)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": {}, "logit_bias": None}
    return state | {"done": done, "best": -1.0, "options": asdict(TrainOptions(template=("{}", "a {}"), lr=0.1))}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_a_state_comes_back_as_it_was(tmp_path):
    assert load_state(tmp_path) is None
    save_state(a_state(), tmp_path)
    assert same(load_state(tmp_path), a_state())
    assert not same(load_state(tmp_path), a_state(done=4))
    assert sorted(file.name for file in tmp_path.iterdir()) == [LAST]
    save_state(a_state(done=4), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [PREVIOUS, LAST]


def test_the_checkpoint_of_an_earlier_version_is_read_without_running_it(tmp_path, capsys):
    torch.save(a_state(), tmp_path / LEGACY)
    assert same(load_state(tmp_path), a_state())
    torch.save({**a_state(), "options": Printing()}, tmp_path / LEGACY)
    with pytest.raises(CheckpointDamagedError, match=r"checkpoint\.pt is damaged.*refused __builtin__\.print"):
        load_state(tmp_path)
    assert capsys.readouterr().out == ""


class Printing:
    def __reduce__(self):
        return print, ("run!",)


DAMAGE = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:-5],
    "cut in the header": lambda data: data[:100],
    "foreign": lambda data: b"PK\3\4" + data,
    "text": lambda data: b"<html>404</html>",
    "not a state": lambda data: save_file_bytes({"a": torch.zeros(1)}),
}


def save_file_bytes(tensors):
    from safetensors.torch import save

    return save(tensors)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [LAST, LEGACY])
def test_a_damaged_checkpoint_is_said_and_the_one_before_taken(tmp_path, damage, name):
    save_state(a_state(done=3), tmp_path)
    save_state(a_state(done=4), tmp_path)
    if name == LEGACY:
        torch.save(a_state(done=2), tmp_path / LEGACY)
    (tmp_path / name).write_bytes(DAMAGE[damage]((tmp_path / name).read_bytes()))
    said = []
    assert load_state(tmp_path, said.append)["done"] == (3 if name == LAST else 4)
    assert len(said) == (name == LAST) and all(name in line and "looking for an earlier one" in line for line in said)
    (tmp_path / PREVIOUS).unlink()
    (tmp_path / LAST).unlink()
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointDamagedError, match=r"is damaged.*--restart trains from the beginning"):
        load_state(tmp_path)


def test_whatever_fails_there_is_a_checkpoint(tmp_path, monkeypatch):
    """Wherever writing one stops, the one before it or the new one can be read."""
    save_state(a_state(done=1), tmp_path)
    save_state(a_state(done=2), tmp_path)
    replace_file = type(tmp_path).replace
    for stop in range(3):
        left = [stop]

        def stopping(path, target, left=left):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            return replace_file(path, target)

        monkeypatch.setattr(type(tmp_path), "replace", stopping)
        with pytest.raises(KeyboardInterrupt):
            save_state(a_state(done=3 + stop), tmp_path)
        monkeypatch.undo()
        assert load_state(tmp_path)["done"] in (2, 2 + stop, 3 + stop)
        assert stop < 2 or (not (tmp_path / LAST).exists() and (tmp_path / NEW).exists())
        save_state(a_state(done=2), tmp_path)


@pytest.mark.parametrize("config", [VIT, RESNET])
def test_exported_weights_load(tmp_path, config):
    from miniclip.loading import load

    model, images, _ = model_and_inputs(replace(config, text=replace(TEXT, context_length=77)))
    export_weights(model, tmp_path / "m.safetensors")
    loaded, _ = load(tmp_path / "m.safetensors", device="cpu")
    assert torch.equal(model.eval().encode_image(images), loaded.encode_image(images))


def log_lines(tmp_path):
    lines = [{"step": s, "loss": 4 - s / 50, "lr": 1e-3, "logit_scale": 14.3 + s / 100} for s in range(1, 101)]
    lines += [
        {"step": s, "val_loss": 3.0, "val_image_top1": s / 200, "val_image_top5": 0.9, "val_text_top1": s / 300}
        for s in (50, 100)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "log.jsonl").write_text(text + json.dumps({"step": 100, "loss": 9.0}) + '\n{"step": 101, "lo')
    return tmp_path / "log.jsonl"


def test_a_log_is_read_as_the_run_went(tmp_path):
    lines = read_log(log_lines(tmp_path))
    assert [line["step"] for line in lines if "val_loss" in line] == [50, 100]
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, 101))
    assert training[-1]["loss"] == 9.0  # logged again after a crash


def test_the_plot_shows_every_curve(tmp_path, monkeypatch):
    figure_module = pytest.importorskip("matplotlib.figure")
    drawn = []
    savefig = figure_module.Figure.savefig
    monkeypatch.setattr(
        figure_module.Figure, "savefig", lambda self, *a, **k: (drawn.append(self), savefig(self, *a, **k))
    )
    plot(log_lines(tmp_path), tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    labels = [[line.get_label() for line in axes.get_lines()] for axes in drawn[0].axes]
    assert [len(label) for label in labels] == [3, 2, 1, 1]
    assert drawn[0].axes[1].get_lines()[0].get_ydata() == pytest.approx([25, 50])  # per cent
    log = tmp_path / "log.jsonl"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if "val_loss" not in line))
    plot(log, tmp_path / "p.png")
    assert [len(axes.get_lines()) for axes in drawn[1].axes] == [2, 1, 1]  # and no empty panel
    log.write_text(log.read_text().splitlines(True)[0])
    plot(log, tmp_path / "p.png")
    markers = [axes.get_lines()[0].get_marker() for figure in drawn[1:] for axes in figure.axes]
    assert markers == ["None"] * 3 + ["o"] * 3  # a line of one step would be invisible


# Shapes


def test_shapes_are_what_their_captions_say(tmp_path):
    lists = create_synthetic(tmp_path, train=2, val=1)
    rows = [json.loads(path.read_text()) for path in lists]
    assert [len(part) for part in rows] == [36, 18]
    assert len({row["caption"] for row in rows[1]}) == 18
    assert rows[0][0]["caption"] == "a red circle"
    assert (tmp_path / rows[0][0]["image"]).is_file()


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("shape", CORNERS)
def test_a_shape_has_its_colour_and_area(color, shape):
    pixels = np.asarray(draw_shape(color, shape, random.Random(1)), dtype=int)
    near = np.abs(pixels - np.array(COLORS[color])).max(-1) <= 20
    assert near.mean() > 0.02
    assert (pixels.min(-1) > 150).mean() > 0.3  # the ground
