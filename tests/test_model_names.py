"""A wrong name of a model is met with the right one, before anything slow is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

import miniclip.commands
from miniclip.loading import available_models
from miniclip.names import fault, named_models

NAMES = available_models()


def test_the_names_are_those_that_load_takes():
    assert set(named_models()) == set(NAMES)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("ViT-B-32", "ViT-B/32"),
        ("vit-b/32", "ViT-B/32"),
        ("Vit B/23", "ViT-B/32"),
        ("rn50", "RN50"),
        ("RN50X64", "RN50x64"),
        ("tiny-vit", "tiny-ViT"),
        ("mobileclip_s1", "MobileCLIP-S1"),
        ("ViT-L-14-336px", "ViT-L/14@336px"),
    ],
)
def test_a_near_miss_gets_one_suggestion(name, meant):
    assert fault(name, NAMES).endswith(f"nor one of the models: did you mean {meant}?")


def test_other_names_get_the_list_and_those_of_the_hub_nothing(tmp_path, monkeypatch):
    assert fault("a cat", NAMES).endswith(", ".join(NAMES))
    assert fault("x" * 100_000, NAMES).startswith("x" * 300 + " is neither")
    for name in ("openai/clip-vit-base-patch32", "apple/MobileCLIP-S1", "hf-hub:laion/x@main", "ViT-B/32"):
        assert fault(name, NAMES) is None
    monkeypatch.chdir(tmp_path)
    Path("rn50").mkdir()
    assert fault("rn50", NAMES) is None


COMMANDS = {  # the arguments before a name of a model
    "classify": ["a.png", "--labels", "a,b", "--model"],
    "similarity": ["a.png", "--model"],
    "embed": ["a.png", "-o", "a.npy", "--model"],
    "index": ["photos", "-o", "photos.index", "--model"],
    "search": ["photos", "a dog", "--model"],
    "serve": ["--model"],
    "evaluate": ["sample", "--model"],
    "explore": ["zero-shot", "--model"],
    "train": ["list.json", "--from"],
    "trace": ["-o", "a.safetensors", "--model"],
    "compare": ["a.safetensors", "b.safetensors", "--model"],
    "bench": ["--model"],
    "convert": [],
    "export": ["-o", "onnx", "--model"],
}


def test_commands_answer_before_pytorch_is_imported():
    """All in one process, whose PyTorch any of them would leave."""
    code = """
import sys
from miniclip.commands import main
for command, arguments in COMMANDS.items():
    print(command, main([command, *arguments, NAME, *["a.pt"] * (command == "convert")]), "torch" in sys.modules)
"""
    assert COMMANDS.keys() == miniclip.commands.COMMANDS.keys() - {"models"}
    for name, words in ("ViT-B-32", "did you mean ViT-B/32?"), ("nothing.pt", "nothing.pt is neither a file"):
        text = code.replace("COMMANDS", repr(COMMANDS)).replace("NAME", repr(name))
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
        assert done.stdout == "".join(f"{command} 2 False\n" for command in COMMANDS)
        assert done.stderr.count(words) == len(COMMANDS)


def test_train_refuses_a_wrong_size_before_pytorch_is_imported():
    sizes = {"tiyn": "did you mean tiny?", "Vit B/32": "did you mean ViT-B/32?", "x": "expected one of tiny, small"}
    sizes |= {"gone.json": "gone.json can't be read as a config"}
    code = """
import sys
from miniclip.commands import main
for size in SIZES:
    print(main(["train", "list.json", "--model-size", size]), "torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code.replace("SIZES", repr([*sizes]))], capture_output=True, text=True, check=True
    )
    assert done.stdout == "2 False\n" * len(sizes)
    for line, words in zip(done.stderr.splitlines(), sizes.values(), strict=True):
        assert words in line
