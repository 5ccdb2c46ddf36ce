"""The towers and CLIP over them. Read transformer.py, vit.py, resnet.py, text.py, then clip.py.

mobileclip.py is an annex.
"""

from miniclip.models.clip import CLIP, convert_weights, set_backend

__all__ = ["CLIP", "convert_weights", "set_backend"]
