"""A wrong name of a model is met with the right one, before anything slow is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from miniclip.loading import available_models
from miniclip.names import fault, model_names

NAMES = available_models()


def test_the_names_are_those_that_load_takes():
    assert set(model_names()) == set(NAMES)


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


def test_commands_answer_before_pytorch_is_imported():
    code = """
import sys
from miniclip.commands import main
status = main(["classify", "a.png", "--labels", "a,b", "--model", sys.argv[1]])
print(status, "torch" in sys.modules)
"""
    for name, words in ("ViT-B-32", "did you mean ViT-B/32?"), ("nothing.pt", "nothing.pt is neither a file"):
        done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, check=True)
        assert done.stdout == "2 False\n" and words in done.stderr
