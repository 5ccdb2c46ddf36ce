"""Load one model once, in a process of its own: `python -m miniclip.bench.load_once PEER DTYPE FOLDER` prints JSON."""

from __future__ import annotations

import json
import re
import sys
import time
import warnings
from pathlib import Path

import torch


def main(peer: str, dtype: str, folder: str) -> None:
    warnings.simplefilter("ignore")
    file = str(Path(folder) / "openai.pt")
    if peer == "miniclip":
        from miniclip import load as ours

        load = lambda: ours(file, device="cpu", dtype=getattr(torch, dtype))  # noqa: E731
    elif peer == "openai":
        import clip

        load = lambda: clip.load(file, device="cpu")  # noqa: E731
    else:
        from transformers import CLIPModel

        load = lambda: CLIPModel.from_pretrained(Path(folder) / "transformers", dtype=torch.float32)  # noqa: E731
    before = _memory("VmRSS")
    start = time.perf_counter()
    model = load()
    result = {"seconds": time.perf_counter() - start}
    if before is not None:
        result["peak"] = _memory("VmHWM") - before
    del model
    print(json.dumps(result))


def _memory(which: str) -> int | None:
    """Bytes that this process has in memory (VmRSS), or had at the most (VmHWM); None where the system does not say."""
    status = Path("/proc/self/status")
    found = re.search(rf"{which}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return 1024 * int(found[1]) if found else None


if __name__ == "__main__":
    main(*sys.argv[1:])
