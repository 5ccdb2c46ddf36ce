"""Makes a trained model small enough to come with the package.

    python -m miniclip.training.embedded runs/vit/last.safetensors train.json tiny-ViT.safetensors.gz

Most of a small CLIP's file is the embedding of 49,408 tokens, of which its captions use a few thousand. The others
still have their random start; set to zero, they take almost no space when they are compressed.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import torch
from safetensors.torch import save

from miniclip.data.lists import read_examples
from miniclip.io import write_atomically
from miniclip.loading import load
from miniclip.models import CLIP
from miniclip.save import config_metadata
from miniclip.tokenizer import tokenize


@torch.no_grad()
def forget_unused_tokens(model: CLIP, texts: list[str]) -> int:
    """Set the embedding of every token that does not occur in `texts` to zero, in place; returns how many are kept. The
    model's embeddings of these texts do not change."""
    used = tokenize(texts, model.context_length, truncate=True).unique().long()
    kept = torch.zeros_like(model.token_embedding.weight)
    kept[used] = model.token_embedding.weight[used]
    model.token_embedding.weight.copy_(kept)
    return len(used)


def export_embedded(model: CLIP, path: Path) -> None:
    """Write the weights as float16 safetensors, compressed; the same weights give the same bytes."""
    half = {name: x.half().contiguous() if x.is_floating_point() else x for name, x in model.state_dict().items()}
    data = gzip.compress(save(half, config_metadata(model.config)), mtime=0)
    write_atomically(path, lambda file: file.write_bytes(data))


def main(weights: str, pictures: str, output: str, *templates: str) -> None:
    """Shrink the model in the file `weights`, trained on the list `pictures` with `templates` besides "{}"."""
    model, _ = load(weights, device="cpu", dtype=torch.float32)
    captions = {caption for example in read_examples(Path(pictures)) for caption in example.captions}
    kept = forget_unused_tokens(model, [t.replace("{}", c) for c in sorted(captions) for t in ("{}", *templates)])
    export_embedded(model, Path(output))
    print(f"{output}: {Path(output).stat().st_size:,} bytes, {kept:,} of {model.vocab_size:,} tokens")


if __name__ == "__main__":
    main(*sys.argv[1:])
