"""Load one model once, in a new process; if SIZE, the size of its pictures, is not 0, also encode. Prints JSON.

python -m miniclip.bench.load_once PEER DTYPE FOLDER SIZE
"""

from __future__ import annotations

import json
import re
import sys
import time
import warnings
from pathlib import Path

import torch

COUNT = 8  # pictures, and as many texts


@torch.no_grad()
def main(peer: str, dtype: str, folder: str, size: str) -> None:
    warnings.simplefilter("ignore")
    load = _loader(peer, dtype, Path(folder))
    pixels, ids = torch.randn(COUNT, 3, int(size), int(size)), torch.zeros(COUNT, 77, dtype=torch.int64)
    ids[:, 0], ids[:, 9] = 49406, 49407
    before = _memory("VmRSS")
    start = time.perf_counter()
    model = load()
    if pixels.numel() and peer == "transformers":
        model.get_image_features(pixel_values=pixels)
        model.get_text_features(input_ids=ids)
    elif pixels.numel():
        model.encode_image(pixels)
        model.encode_text(ids)
    result = {"seconds": time.perf_counter() - start}
    if before is not None:
        result["peak"] = _memory("VmHWM") - before
    print(json.dumps(result))


def _loader(peer: str, dtype: str, folder: Path):
    """A function that loads; its imports are done before the time is taken."""
    file = str(folder / "openai.pt")
    if peer == "miniclip":
        from miniclip.loading import load

        return lambda: load(file, device="cpu", dtype=getattr(torch, dtype))[0]
    if peer == "openai":
        import clip

        return lambda: clip.load(file, device="cpu")[0]
    if peer == "open_clip":
        from open_clip.openai import load_openai_model

        return lambda: load_openai_model(file, precision="fp32", device="cpu")
    from transformers import CLIPModel

    return lambda: CLIPModel.from_pretrained(folder / "transformers", dtype=torch.float32)


def _memory(which: str) -> int | None:
    """Bytes that this process has in memory (VmRSS), or had at the most (VmHWM); None where the system does not say."""
    status = Path("/proc/self/status")
    found = re.search(rf"{which}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return 1024 * int(found[1]) if found else None


if __name__ == "__main__":
    main(*sys.argv[1:])
