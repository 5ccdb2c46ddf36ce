"""What the tests of SigLIP share."""

from pathlib import Path

import pytest
from siglip_small import huggingface_directory, sentencepiece_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A SigLIP's directory with its spiece.model."""
    pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("siglip")
    huggingface_directory(folder)
    sentencepiece_model(folder / "spiece.model")
    return folder
