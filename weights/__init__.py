"""Checkpoint files: bytes -> (config, tensors). Formats, tensor names, downloads; nothing here builds a model.

Read files.py, archive.py, unpickle.py, infer.py and names.py, in this order.
"""

from pathlib import Path

from miniclip.weights.errors import CheckpointError

__all__ = ["EMBEDDED", "CheckpointError"]

EMBEDDED = Path(__file__).parent  # the folder of the models that come with the package
