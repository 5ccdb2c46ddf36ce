"""The family of Apple's MobileCLIP: its config and named models, towers, fast form, names of tensors, and stages.

Read config.py, towers.py, names.py (with the algebra by which training's branches become one convolution), openclip.py,
fast.py, stages.py and family.py.
"""


def __getattr__(name: str) -> object:
    """FAMILIES is imported at first use: the names of models, in config.py, are read without PyTorch."""
    if name != "FAMILIES":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from miniclip.mobileclip.family import FAMILIES

    return FAMILIES
