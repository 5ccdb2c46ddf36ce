"""The family of SigLIP and SigLIP 2 (fixed resolution): its config, tokenizer, towers, names of tensors, and stages.

Read config.py, tokenizer.py, towers.py, names.py (with transformers' and OpenCLIP's configs) and stages.py.
"""

from miniclip.family import Family
from miniclip.siglip import names, stages
from miniclip.siglip.config import SigLIPConfig
from miniclip.siglip.towers import SigLIP

SIGLIPS = Family(
    config=SigLIPConfig,
    model=SigLIP,
    owns=names.owns,
    read=names.read,
    stages=stages.stages,
    add_tokenizer=names.add_tokenizer,
    write_tokenizer=names.write_tokenizer,
    read_openclip=names.read_openclip,
    read_huggingface=names.read_huggingface,
)
FAMILIES = (SIGLIPS,)
