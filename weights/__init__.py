"""Everything about checkpoint files: where they are, how they are read, and how they become models.

Read load.py, files.py, archive.py, unpickle.py, infer.py and names.py, in this order; mobileclip.py is an annex.
"""

from miniclip.weights.errors import CheckpointError
from miniclip.weights.load import available_models, build_model, load
from miniclip.weights.mobileclip import reparameterize

__all__ = ["CheckpointError", "available_models", "build_model", "load", "reparameterize"]
