"""Packaging. Some folders are installed below miniclip: ELSEWHERE."""

import re
from pathlib import Path

from setuptools import find_packages, setup

VERSION = re.search(r'__version__ = "(.+)"', Path(__file__).with_name("miniclip").joinpath("version.py").read_text())[1]

PLOT = ["matplotlib"]
PICTOGRAMS = ["resvg-py>=0.5"]
WEBDATASET = ["webdataset"]
TRITON = ["triton>=3.6; platform_system == 'Linux'"]
PROBE = ["scikit-learn"]
ONNX = ["onnx", "onnxruntime", "onnxscript"]
FAISS = ["faiss-cpu"]
HEIF = ["pillow-heif"]
HUB = ["huggingface_hub"]
ELSEWHERE = {"miniclip.kernels": "kernels", "miniclip.weights": "weights", "miniclip.port_js": "examples/port_js"}
SIGLIP = ["sentencepiece", "tokenizers"]
FOR_TESTS = [*PLOT, *PICTOGRAMS, *WEBDATASET, *ONNX, *TRITON, *PROBE, *FAISS, *HUB, *SIGLIP]

setup(
    name="miniclip",
    version=VERSION,
    description="CLIP in plain PyTorch: exact, safe to load, small enough to read in one sitting",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["miniclip", "miniclip.*"]), *ELSEWHERE],
    package_dir=ELSEWHERE,
    package_data={
        "miniclip": ["*.txt.gz", "py.typed"],
        "miniclip.search": ["gallery.html", "gallery.js"],
        "miniclip.web": ["*.html", "*.css", "*.js", "*.svg", "*.txt"],
        "miniclip.port_js": ["*.js"],
        "miniclip.data": ["*.txt.gz", "*.zip"],
        "miniclip.weights": ["*.safetensors.gz", "*.md"],
    },
    install_requires=[
        "torch>=2.11",
        "numpy",
        "regex",
        "ftfy",
        # Decodes files from strangers. 12.1.1 mended CVE-2026-25990 (PSD); 12.3 CVE-2026-54058, -59199, -59204 and
        # -59205; 13.0 CVE-2026-96639 (frames of other modes, critical) and the overflow in JPEG's decoder
        # (GHSA-5x8w-8jj5-q52h, critical), but it needs Python 3.11.
        "pillow>=13; python_version >= '3.11'",
        "pillow>=12.3; python_version < '3.11'",
        "safetensors",
        "tqdm",
    ],
    extras_require={
        "plot": PLOT,
        "pictograms": PICTOGRAMS,
        "webdataset": WEBDATASET,
        "triton": TRITON,
        "onnx": ONNX,
        "faiss": FAISS,
        "heif": HEIF,
        "hub": HUB,
        "probe": PROBE,
        "siglip": SIGLIP,
        "test": ["pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "setuptools>=77", *FOR_TESTS],
    },
    # An editable install puts the checkout on Python's path, where type checkers and editors find it: they do not run
    # the import hook that setuptools makes by default.
    options={"editable_wheel": {"mode": "compat"}},
    entry_points={"console_scripts": ["miniclip=miniclip.commands:main"]},
)
