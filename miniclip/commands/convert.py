"""Write a checkpoint in another format. Values and dtypes stay as they are, unless another size is asked for.

The format is chosen by the name of OUT: x.safetensors; x.pt, a state dict that openai/CLIP reads; or a name without a
suffix, a new directory as Hugging Face's transformers reads it. A MobileCLIP gets OpenCLIP's names or directory.

    miniclip convert ViT-B/32 ViT-B-32.safetensors
    miniclip convert runs/mine/best.safetensors mine-for-transformers
"""

from __future__ import annotations

import argparse

from miniclip.commands.options import add_loading, loading_arguments, model, path
from miniclip.commands.output import show, shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", type=model, metavar="IN", help="a name from `miniclip models`, or a file or directory")
    parser.add_argument("output", type=path, metavar="OUT", help="a .safetensors or .pt file, or a new directory")
    add_loading(parser)


def run(options: argparse.Namespace) -> int:
    from miniclip.loading import open_checkpoint
    from miniclip.save import save_checkpoint

    config, tensors = open_checkpoint(options.input, **loading_arguments(options))
    save_checkpoint(config, tensors, options.output)
    show(f"{options.input} -> {shown(options.output)}: {len(tensors)} tensors")
    return 0
