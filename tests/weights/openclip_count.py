"""How many of OpenCLIP's configs and pretrained tags miniclip loads, and why it refuses each of the others.

    pip install open_clip_torch==3.3.0
    python tests/weights/openclip_count.py --list

A tag counts if its config loads; no weights are downloaded.
"""

import json
import sys
from collections import Counter, defaultdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from miniclip.loading import config_readers
from miniclip.weights.errors import CheckpointError
from miniclip.weights.fields import Fields
from miniclip.weights.openclip import MEANING


def outcome(config: Path) -> tuple[str, str]:
    """The family that reads a config and "", or "" and the reason of the error."""
    fields = Fields(config, json.loads(config.read_text()))
    try:
        return next(filter(None, (read(fields) for read in config_readers().openclip))).family, ""
    except CheckpointError as error:
        message = str(error).removeprefix(f"{config}: ")
        return "", next((meaning for meaning in MEANING.values() if message.endswith(meaning)), message)


def outcomes() -> dict[str, tuple[str, str]]:
    """Of each config of the installed OpenCLIP, by its name."""
    folder = Path(find_spec("open_clip").origin).with_name("model_configs")
    return {path.stem: outcome(path) for path in sorted(folder.glob("*.json"))}


def main() -> None:
    from open_clip.pretrained import _PRETRAINED

    found = outcomes()
    tags = {name: len(_PRETRAINED.get(name, ())) for name in found}
    families, reasons = Counter(), defaultdict(list)
    for name, (family, reason) in found.items():
        families[family] += 1
        if reason:
            reasons[reason].append(name)
    loaded = [name for name, (family, _) in found.items() if family]
    shares = ", ".join(f"{count} {family}" for family, count in families.items() if family)
    print(f"OpenCLIP {version('open_clip_torch')}: {len(loaded)} of {len(found)} configs ({shares}),")
    print(f"{sum(tags[name] for name in loaded)} of {sum(tags.values())} pretrained tags load. The others:")
    for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
        print(f"{len(names):4} configs, {sum(tags[name] for name in names):3} tags: {reason}")
        if "--list" in sys.argv:
            print("        " + ", ".join(names))


if __name__ == "__main__":
    main()
