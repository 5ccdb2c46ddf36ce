"""Times of several ways to do one thing. They run alternately, so that a slow minute of the machine slows all."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

LEAST_ROUNDS = 3  # however long they take
MOST_ROUNDS = 200
PAUSE = 0.03  # seconds, in which threads that still wait for work go to sleep, onnxruntime's for instance


@dataclass(frozen=True)
class Times:
    """The times of one way, in seconds."""

    mean: float
    median: float
    p95: float
    spread: float  # distance between the quartiles, as a share of the median
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> Times:
        median = statistics.median(seconds)
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
        p95 = statistics.quantiles(seconds, n=20, method="inclusive")[-1]
        return cls(statistics.mean(seconds), median, p95, (high - low) / median, len(seconds))

    def scaled(self, factor: float) -> Times:
        """For `factor` times the work, if the time grows with it."""
        return Times(factor * self.mean, factor * self.median, factor * self.p95, self.spread, self.rounds)


def by_turns(ways: Mapping[str, Callable[[], object]], seconds: float) -> tuple[dict[str, Times], dict[str, object]]:
    """Run each way once to warm up, then all in rounds for about `seconds`. Returns also each way's first result.

    The order is random in each round, and a pause comes before each run, so that no way always follows the same one.
    """
    results = {name: run() for name, run in ways.items()}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    order, shuffle = list(ways), random.Random(0).shuffle
    until = time.perf_counter() + seconds
    for done in range(MOST_ROUNDS):
        if done >= LEAST_ROUNDS and time.perf_counter() > until:
            break
        shuffle(order)
        for name in order:
            time.sleep(PAUSE)
            start = time.perf_counter()
            ways[name]()
            taken[name].append(time.perf_counter() - start)
    return {name: Times.of(times) for name, times in taken.items()}, results
