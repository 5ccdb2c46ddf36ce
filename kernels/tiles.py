"""The tile sizes of every kernel on every architecture, chosen before launch: nothing is tuned at run time.

Autotuning would break CUDA graphs and Triton's interpreter, and would make first calls slow. The tests compile each
tile for its architecture, without a GPU: it fits shared and tensor memory, does not spill, and uses the matrix units.
No GPU has timed them yet.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """How much one program computes at a time, and with how many warps."""

    rows: int
    columns: int
    warps: int
    stages: int = 1  # steps of a loop that are loaded or computed at once

    def options(self) -> dict[str, int]:
        """Triton's launch options."""
        return {"num_warps": self.warps, "num_stages": self.stages}


ARCHITECTURES = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")

# Architectures without tiles of their own use those of one with as much shared memory, or less.
TAKES = {"sm_87": "sm_80", "sm_89": "sm_86", "sm_120": "sm_86", "sm_103": "sm_100"}
TAKES |= {"gfx90a": "gfx942", "gfx950": "gfx942"}

Table = dict[str, dict[float, Tile]]  # architecture -> {largest size: tile}, sizes ascending


def tile_for(table: Table, device: torch.device, size: int) -> Tile:
    """The tile for a problem of this size on this device; the table says what its sizes count."""
    return next(tile for largest, tile in table[supported(device)].items() if size <= largest)


def supported(device: torch.device) -> str:
    """`architecture(device)`, or ValueError if it has no tiles."""
    name = architecture(device)
    if name not in ARCHITECTURES:
        known = ", ".join((*ARCHITECTURES, *TAKES))
        raise ValueError(f'the kernels have no tiles for {name}, only for {known}: use backend="torch"')
    return name


@functools.cache  # every operation asks, and PyTorch takes microseconds to answer
def architecture(device: torch.device) -> str:
    """The device's name in the tables. On a CPU, where Triton interprets, it is that of one with all kinds of tiles."""
    if device.type == "cpu":
        return "sm_80"
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    else:
        name = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return TAKES.get(name, name)


# By sequence length. A program holds `rows` queries of one head: at 16 tokens 64 rows would be four times the work.
# At 257 tokens five tiles of 64 rows have less padding than three of 128.
SHORT = {16: Tile(16, 16, 1), 32: Tile(32, 32, 2)}
ATTENTION: Table = {  # head dimensions up to 64
    "sm_80": {**SHORT, math.inf: Tile(64, 64, 4, 2)},
    "sm_86": {**SHORT, math.inf: Tile(64, 64, 4, 2)},
    "sm_90": {**SHORT, 320: Tile(64, 64, 4, 2), math.inf: Tile(128, 64, 8, 2)},
    "sm_100": {**SHORT, 128: Tile(64, 64, 4, 2), math.inf: Tile(128, 64, 8, 2)},
    "gfx942": {**SHORT, math.inf: Tile(64, 64, 4, 2)},
}
ATTENTION_WIDE: Table = {  # head dimensions up to 128
    "sm_80": {math.inf: Tile(64, 32, 4, 2)},
    "sm_86": {math.inf: Tile(64, 32, 4, 2)},
    "sm_90": {math.inf: Tile(128, 64, 8, 2)},
    "sm_100": {math.inf: Tile(64, 32, 4, 2)},
    "gfx942": {math.inf: Tile(64, 32, 4, 2)},
}

# By number of queries. Few queries would leave most of the GPU idle, so the classes are split among this many programs.
PROGRAMS = 256
SIMILARITY: Table = {
    "sm_80": {32: Tile(16, 64, 4, 3), math.inf: Tile(64, 64, 4, 2)},
    "sm_86": {32: Tile(16, 64, 4, 3), math.inf: Tile(64, 64, 4, 2)},
    "sm_90": {32: Tile(16, 64, 4, 4), 256: Tile(64, 64, 4, 4), math.inf: Tile(128, 64, 8, 4)},
    "sm_100": {32: Tile(16, 64, 4, 3), 256: Tile(64, 64, 4, 2), math.inf: Tile(128, 64, 8, 2)},
    "gfx942": {32: Tile(16, 64, 4, 2), 256: Tile(64, 64, 4, 2), math.inf: Tile(128, 64, 8, 2)},
}
SIMILARITY_FLOAT: Table = {name: {math.inf: Tile(32, 32, 8)} for name in ARCHITECTURES}  # without matrix units

CONTRASTIVE: Table = {
    "sm_80": {math.inf: Tile(128, 128, 8, 2)},
    "sm_86": {math.inf: Tile(128, 128, 8, 2)},
    "sm_90": {math.inf: Tile(128, 128, 8, 2)},
    "sm_100": {math.inf: Tile(128, 64, 8, 2)},  # at 128 x 128 Triton 3.6 spills
    "gfx942": {math.inf: Tile(128, 128, 8, 2)},
}
# By embedding width: a program holds `rows` whole embeddings and their gradients, and `columns` of the other side.
CONTRASTIVE_GRADIENT: Table = {
    "sm_80": {512: Tile(32, 64, 8, 2), 1024: Tile(32, 16, 8, 2)},
    "sm_86": {512: Tile(32, 32, 8, 2), 1024: Tile(16, 16, 8, 2)},
    "sm_90": {512: Tile(64, 32, 8), 1024: Tile(32, 16, 8, 2)},
    "sm_100": {512: Tile(64, 32, 8), 1024: Tile(32, 16, 8, 2)},
    "gfx942": {512: Tile(32, 32, 4), 1024: Tile(16, 16, 4)},
}
