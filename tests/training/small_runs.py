"""What the tests of whole runs share: small models, drawn shapes, and what a run wrote."""

from __future__ import annotations

import json
import multiprocessing

import pytest
import torch
from safetensors.torch import load_file

from miniclip.config import (
    CLIPConfig,
    PreprocessConfig,
    ResNetConfig,
    TextConfig,
    ViTConfig,
    openai_transformer,
    to_json,
)
from miniclip.data.synthetic import create_synthetic
from miniclip.io import write_json
from miniclip.training.options import TrainOptions

TEXT = TextConfig(77, 49408, openai_transformer(64, 1))
VIT = CLIPConfig(32, ViTConfig(32, 16, openai_transformer(64, 1)), TEXT, PreprocessConfig(32))
RESNET = CLIPConfig(32, ResNetConfig(32, 8, (1, 1, 1, 1), 4), TEXT, PreprocessConfig(32))

FORK = multiprocessing.get_context("fork")  # a process that need not import PyTorch

COMMAND = """
import argparse, torch
from miniclip.commands.train import add_arguments, options_from
from miniclip.training.train import train
torch.set_num_threads(1)
parser = argparse.ArgumentParser()
add_arguments(parser)
train(options_from(parser.parse_args()))
"""


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    create_synthetic(folder, train=4, val=2)
    write_json(folder / "vit.json", to_json(VIT))
    write_json(folder / "resnet.json", to_json(RESNET))
    return folder


@pytest.fixture
def options(shapes, tmp_path):
    return TrainOptions(
        data=str(shapes / "train.json"),
        val=str(shapes / "val.json"),
        model_size=str(shapes / "vit.json"),
        output=str(tmp_path / "run"),
        steps=6,
        batch_size=12,
        log_every=1,
        val_every=3,
        save_every=2,
        device="cpu",
    )


def arguments(options):
    """The command line that says what `options` says."""
    names = ("val", "model_size", "output", "steps", "batch_size", "log_every", "val_every", "save_every", "device")
    values = ((f"--{name.replace('_', '-')}", str(getattr(options, name))) for name in names)
    return [options.data, *(word for pair in values for word in pair)]


def weights(options, name="last"):
    return load_file(f"{options.output}/{name}.safetensors")


def log(options):
    with open(f"{options.output}/log.jsonl") as file:
        return [json.loads(line) for line in file]


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
