"""The towers, and CLIP, which has one of each. Read transformer.py, vit.py, resnet.py, text.py, then clip.py."""

from miniclip.models.clip import CLIP, convert_weights, set_backend

__all__ = ["CLIP", "convert_weights", "set_backend"]
