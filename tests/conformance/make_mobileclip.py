"""Writes mobileclip_outputs.safetensors: what Apple's code and OpenCLIP with timm compute, before and after folding.

    python make_mobileclip.py PATH_OF_ML_MOBILECLIP [MODEL ...]

needs github.com/apple/ml-mobileclip (the goldens: commit 4144bb1), open_clip 3.3.0 and timm 1.0.31. Keys are
MODEL/image_embedding and MODEL/text_embedding, of unit length, with /folded for what their own folding gives; the
metadata has a digest of the names and shapes that each model's file has.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER.parent), sys.argv[1]]

from conformance.mobileclip_cases import CASES, digest, inputs, weights  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

OUTPUT = FOLDER / "mobileclip_outputs.safetensors"


def build(name: str, code: str):
    if code == "apple":
        import mobileclip

        return mobileclip.create_model_and_transforms(name.lower().replace("-", "_"), reparameterize=False)[0]
    import open_clip

    return open_clip.create_model(name)


def fold(model, name: str, code: str):
    if code == "apple":
        from mobileclip.modules.common.mobileone import reparameterize_model
    else:
        from timm.utils import reparameterize_model
    return reparameterize_model(model)


@torch.no_grad()
def main() -> None:
    outputs, digests = {}, {}
    if OUTPUT.exists():
        with safe_open(OUTPUT, "pt") as file:
            outputs, digests = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    for name in sys.argv[2:] or CASES:
        model = build(name, CASES[name]).eval()
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        model.load_state_dict(weights(shapes))
        digests[name] = digest(shapes)
        pixels, ids = inputs(224 if name.endswith(("B", "14")) else 256)
        for suffix in ("", "/folded"):
            if suffix:
                model = fold(model, name, CASES[name])
            outputs[f"{name}/image_embedding{suffix}"] = F.normalize(model.encode_image(pixels)).contiguous()
            outputs[f"{name}/text_embedding{suffix}"] = F.normalize(model.encode_text(ids.long())).contiguous()
        difference = max(
            float((outputs[f"{name}/{kind}"] - outputs[f"{name}/{kind}/folded"]).abs().max())
            for kind in ("image_embedding", "text_embedding")
        )
        print(f"{name}: {len(shapes)} tensors, folded differs by {difference:.1e}", flush=True)
        save_file(outputs, OUTPUT, digests)


if __name__ == "__main__":
    main()
