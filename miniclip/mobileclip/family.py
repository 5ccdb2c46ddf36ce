"""MobileCLIP as a family: what loading, saving, conformance and the bench ask of it."""

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
