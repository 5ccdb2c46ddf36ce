"""Checkpoints and configs that were changed at random: `load` reads them, or refuses them with a CheckpointError.

An audit hook sees to it that nothing in them starts a process, opens a socket or compiles code.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import pytest
import torch
from conformance.openai_cases import CASES
from conformance.seeded import weights
from test_mutations import mutated

from miniclip.loading import blank_model, load
from miniclip.save import save_checkpoint
from miniclip.weights import CheckpointError

TIMES = 400  # mutations of each kind
SECONDS = 5  # that one may take
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "pty.spawn")
watched: list[str] = []
watching = False


def _watch(event: str, _) -> None:
    if watching and event.startswith(FORBIDDEN):
        watched.append(event)


def files(folder: Path) -> dict[str, tuple[Path, Path]]:
    """For each kind what `load` is given, and the file that is mutated."""
    config = CASES["vit"]
    shapes = {name: tuple(tensor.shape) for name, tensor in blank_model(config, torch.float32).state_dict().items()}
    tensors = weights(shapes)
    paths = {"zip": folder / "a.pt", "safetensors": folder / "a.safetensors", "legacy": folder / "old.pt"}
    save_checkpoint(config, tensors, paths["zip"])
    save_checkpoint(config, tensors, paths["safetensors"])
    torch.save(tensors, paths["legacy"], _use_new_zipfile_serialization=False)
    save_checkpoint(config, tensors, folder / "hf")
    found = {kind: (path, path) for kind, path in paths.items()}
    for name in ("miniclip.json", "model.safetensors"):
        found[name] = folder / "hf", folder / "hf" / name
    save_checkpoint(config, tensors, folder / "plain")
    (folder / "plain" / "miniclip.json").unlink()
    for name in ("config.json", "preprocessor_config.json"):
        found[name] = folder / "plain", folder / "plain" / name
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    ["zip", "legacy", "safetensors", "miniclip.json", "model.safetensors", "config.json", "preprocessor_config.json"],
)
def test_mutated(kind, tmp_path):
    global watching
    sys.addaudithook(_watch)
    given, target = files(tmp_path)[kind]
    load(given, device="cpu")  # as it is, it loads
    original, rng, refused = target.read_bytes(), random.Random(kind), 0
    watching = True
    try:
        for _ in range(TIMES):
            target.write_bytes(mutated(original, rng))
            start = time.perf_counter()
            try:
                load(given, device="cpu")
            except CheckpointError as error:
                refused += 1
                assert len(str(error)) < 20_000
            assert time.perf_counter() - start < SECONDS
    finally:
        watching = False
    assert refused > TIMES // 10
    assert watched == []
