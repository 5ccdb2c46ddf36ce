"""`import miniclip` is quick because of what it leaves for later."""

import os
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


def test_a_checkout_uses_its_own_folders():
    """Also where another checkout is installed with `pip install -e`, whose finder knows miniclip.kernels too."""
    code = """
import sys
class Installed:
    def find_spec(name, path=None, target=None):
        assert name not in ("miniclip.kernels", "miniclip.weights"), name
sys.meta_path.insert(0, Installed)
import miniclip.kernels, miniclip.weights
"""
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(root)})
