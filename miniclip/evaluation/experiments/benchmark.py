"""How fast a model is, and how much memory it takes: `miniclip bench` with its defaults.

Latency is a median, and p95 beside it; throughput is pictures or texts a second; every figure is a ratio to miniclip's
in the same run, as seconds of one machine say nothing about another. `miniclip bench --help` has the settings.
"""

from __future__ import annotations

import argparse
from io import BytesIO

from miniclip.bench.arguments import add_arguments
from miniclip.bench.run import run

SETTINGS = ()  # as on the command line of `miniclip bench`; none: its defaults


def measure(model: str, picture: BytesIO | None = None) -> dict:
    """Run it, printing as it goes; draws into `picture`."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = parser.parse_args(["--model", model, *SETTINGS])
    options.plot = picture
    return run(options)
