"""`import miniclip` is quick because of what it leaves for later."""

import subprocess
import sys
from pathlib import Path

import miniclip

CODE = """
import sys
before = set(sys.modules)
import miniclip, miniclip.commands
print(*sorted(set(sys.modules) - before))
miniclip.CLIP, miniclip.tokenize, miniclip.load, miniclip.trace
print("miniclip.fast.vit" in sys.modules, "miniclip.weights" in sys.modules, "PIL" in sys.modules)
"""
LATER = {"PIL", "safetensors", "regex", "ftfy", "tqdm", "triton", "matplotlib", "transformers", "torch", "numpy"}
LATER |= {"miniclip.models", "miniclip.tokenizer", "miniclip.weights", "miniclip.preprocess", "miniclip.conformance"}


def test_what_is_imported_later():
    run = [sys.executable, "-c", CODE]
    ran = subprocess.run(run, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True)
    imported, then = ran.stdout.splitlines()
    assert {"miniclip", "miniclip.commands", "miniclip.errors"} <= set(imported.split())
    assert not LATER & set(imported.split())
    assert then == "True True True"


def test_what_is_imported_later_is_listed():
    assert set(miniclip.__all__) <= set(dir(miniclip))
