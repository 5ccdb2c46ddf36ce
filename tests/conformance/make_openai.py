"""Write openai_outputs.safetensors: what openai/CLIP's own code computes for the models of openai_cases.py.

Run once, with `clip` installed (the PyPI package clip-anytorch 2.6.0 has openai/CLIP's code; it needs setuptools<81):

    python tests/conformance/make_openai.py
"""

from pathlib import Path

import clip.model
import torch
from openai_cases import CASES, IMAGES, TEXTS
from safetensors.torch import save_file
from seeded import image, text, weights

from miniclip.models import CLIP

outputs = {}
for name, config in CASES.items():
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in CLIP(config).state_dict().items()}
    state_dict = weights(shapes)
    model = clip.model.build_model(dict(state_dict)).float()  # infers its own config, and rounds to half precision
    model.load_state_dict(state_dict)  # so the weights again, unrounded
    images = image(IMAGES, config.vision.image_size)
    texts = text(TEXTS, config.text.context_length, config.text.vocab_size)
    with torch.no_grad():
        outputs[f"{name}/image_embedding"] = model.encode_image(images)
        outputs[f"{name}/text_embedding"] = model.encode_text(texts)
        outputs[f"{name}/logits_per_image"] = model(images, texts)[0]

made_with = {"made_with": f"clip-anytorch 2.6.0, torch {torch.__version__}, float32 on the CPU"}
save_file(outputs, Path(__file__).with_name("openai_outputs.safetensors"), metadata=made_with)
