"""Random numbers that depend on a seed and a purpose, and not on what was drawn before."""

from __future__ import annotations

import numpy as np
import torch


def generator(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """A generator that differs for each seed, purpose and list of numbers (an epoch, a step, a rank)."""
    key = [seed, int.from_bytes(purpose.encode(), "little"), len(numbers), *numbers]
    state = np.random.SeedSequence(key).generate_state(1, np.uint64).item()
    return torch.Generator().manual_seed(state >> 1)  # PyTorch takes 63 bits
