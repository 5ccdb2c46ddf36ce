"""What a benchmark measures. Reading it needs no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

MODULES = {"openai": "clip", "open_clip": "open_clip", "transformers": "transformers", "onnxruntime": "onnxruntime"}
TASKS = ("image", "text", "classifier", "load", "memory", "tokenizer", "preprocess")


@dataclass(frozen=True)
class Settings:
    """What to measure. The options of `miniclip bench` explain each field."""

    model: str = "ViT-B/32"
    peers: str = "all"
    what: tuple[str, ...] = TASKS
    batches: tuple[int, ...] = (1, 8, 32)
    dtypes: tuple[str, ...] | None = None
    compile: bool = False
    seconds: float = 10
    threads: int | None = None


QUICK = Settings(what=("image", "text", "tokenizer", "preprocess"), batches=(1, 8), seconds=3)  # within two minutes
