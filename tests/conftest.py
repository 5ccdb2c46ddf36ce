"""Options of the test run, and what every test needs."""

import functools
import gc
import gzip
import inspect
import io
import os
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

OPT_IN = {
    "slow": "takes over ten seconds; run with --slow",
    "weights": "needs OpenAI's released checkpoints; run with --weights",
}


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the slow tests")
    parser.addoption("--weights", action="store_true", help="also check published figures on OpenAI's checkpoints")


def pytest_collection_modifyitems(config, items):
    for item in items:
        for marker, reason in OPT_IN.items():
            if item.get_closest_marker(marker) and not config.getoption(f"--{marker}"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def unzip_embedded_weights_once():
    """Hundreds of tests load tiny-ViT or tiny-RN, and most of the time of that is unzipping."""
    from miniclip.weights import files

    embedded = Path(__file__).parents[1] / "weights"

    @functools.cache
    def content(path, *version):
        return gzip.decompress(path.read_bytes())

    def unzip(path):
        if path.resolve().parent != embedded:
            return gzip.open(path)
        return io.BytesIO(content(path, path.stat().st_mtime_ns, path.stat().st_size))

    files.gzip = SimpleNamespace(open=unzip)


# The tensors of the tests are small: threads would spend their time waiting for each other on a busy machine.
torch.set_num_threads(1)

# Modules and tensors are many small objects without cycles: looking for cycles so often takes 8% of the run.
gc.set_threshold(100_000, 50, 100)


def pytest_collection_finish():
    gc.freeze()  # nor among the modules that are imported by now


# Triton's kernels run in its interpreter, on the CPU. Triton reads this when it is imported, whoever does that first.
os.environ["TRITON_INTERPRET"] = "1"

# No test cuts the power, and a killed process loses nothing that it has written.
os.fsync = lambda file: None


@pytest.fixture(scope="session", autouse=True)
def list_triton_language_once():
    """Triton's interpreter lists the members of its language at each launch, which takes half of a small launch."""
    if find_spec("triton"):
        from triton.runtime import interpreter

        interpreter.inspect = SimpleNamespace(**{**vars(inspect), "getmembers": functools.cache(inspect.getmembers)})
