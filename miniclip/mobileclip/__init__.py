"""The family of Apple's MobileCLIP: its config and named models, towers, fast form, names of tensors, and stages.

Read config.py, towers.py, names.py (with the algebra by which training's branches become one convolution), openclip.py,
fast.py and stages.py.
"""

from miniclip.family import Family
from miniclip.mobileclip import names, openclip, stages
from miniclip.mobileclip.config import MODELS, MobileCLIPConfig
from miniclip.mobileclip.fast import FastMobileCLIP
from miniclip.mobileclip.towers import MobileCLIP

CLIPS = Family(
    config=MobileCLIPConfig,
    model=MobileCLIP,
    fast=FastMobileCLIP,
    owns=names.recognises,
    read=names.read,
    stages=stages.stages,
    models=MODELS,
    write_directory=openclip.write,
    read_openclip=openclip.read_config,
)
FAMILIES = (CLIPS,)
