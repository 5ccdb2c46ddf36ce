"""Every kernel with every tile, compiled for GPUs that are not here: see kernel_compile.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed; it is there for Linux only")
from miniclip.kernels import tiles

# Bytes of shared memory that one program may have (CUDA C Programming Guide, table of compute capabilities, less the
# 1 KiB that the system keeps; AMD: the LDS). Over it a kernel compiles all the same, and then cannot be launched.
SHARED = {"sm_80": 166_912, "sm_86": 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
TENSOR_MEMORY = 512  # columns; sm_100 only. With more a kernel compiles to nothing.
MATRIX = {"sm_80": {"mma.sync"}, "sm_86": {"mma.sync"}, "sm_90": {"mma.sync", "wgmma.mma_async"}}
MATRIX["sm_100"] = {"mma.sync", "tcgen05.mma"}
MULTIPLYING = {"attention_kernel", "statistics_kernel", "softmax_kernel", "gradient_kernel"}
TABLES = ["ATTENTION", "ATTENTION_WIDE", "SIMILARITY", "SIMILARITY_FLOAT", "CONTRASTIVE", "CONTRASTIVE_GRADIENT"]


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """All architectures in one process, which imports and hashes Triton once; not this one, where Triton interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("kernel_compile.py")
    environment["PYTHONPATH"] = str(script.parents[2])  # where miniclip is not installed
    done = subprocess.run([sys.executable, "-W", "ignore", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module", params=tiles.ARCHITECTURES)
def compiled(request, rows) -> tuple[str, list[dict]]:
    return request.param, [row for row in rows if row["architecture"] == request.param]


def test_fits_does_not_spill_and_uses_the_matrix_units(compiled):
    architecture, rows = compiled
    assert {row["kernel"] for row in rows} > MULTIPLYING
    for row in rows:
        assert row["shared"] <= SHARED[architecture], row
        assert row["tensor_memory"] <= TENSOR_MEMORY, row
        assert row["stack"] <= 16 and row["spills"] == 0, row
        multiplies = row["kernel"] in MULTIPLYING and "float32" not in row["case"]
        if architecture.startswith("gfx"):
            assert bool(row["matrix"]) == multiplies or "float32" in row["case"], row
        else:
            assert set(row["matrix"]) <= MATRIX[architecture] and bool(row["matrix"]) == multiplies, row
    if architecture in ("sm_90", "sm_100"):  # and the architecture's own, from 64 rows on
        own = (MATRIX[architecture] - {"mma.sync"}).pop()
        large = [row for row in rows if row["kernel"] in MULTIPLYING and row["tile"][0] >= 64]
        assert large and all(row["matrix"] == [own] for row in large)


def test_every_tile_was_compiled(compiled):
    architecture, rows = compiled
    tried = {tuple(row["tile"]) for row in rows}
    shipped = {tuple(tile) for name in TABLES for tile in getattr(tiles, name)[architecture].values()}
    assert shipped <= tried


def test_texts_of_any_length_up_to_16_run_the_same_program(compiled):
    _, rows = compiled
    assert len({row["hash"] for row in rows if row["case"] in ("attention 9 packed", "attention 16 packed")}) == 1
    assert len({row["hash"] for row in rows if row["case"] in ("attention 9 packed", "attention 32 packed")}) == 2


def test_no_kernel_is_given_a_matrix_of_logits(compiled):
    """Of what kernels read and write, nothing is larger than the embeddings: 50,000 queries and 21,841 classes, 768
    wide, and 4096 pairs."""
    _, rows = compiled
    largest = {case: max(row["largest"] for row in rows if row["case"] == case) for case in {r["case"] for r in rows}}
    assert largest["top 16 for 50000"] == 50_000 * 768 < 50_000 * 21_841
    assert largest["loss 512"] == 4096 * 512 < 4096 * 4096 and largest["loss 768"] == 4096 * 768
    assert largest["softmax for 1000"] == 1000 * 1000  # which is its result
