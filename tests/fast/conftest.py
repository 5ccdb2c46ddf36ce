"""Which fast forms ran."""

from functools import partial

import pytest
from fast_cases import spy

from miniclip.fast import text as text_tower
from miniclip.fast.clip import FastCLIP


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The fast forms that ran, in order."""
    taken = []
    forms = {key: partial(spy, taken, "image_embedding", form) for key, form in FastCLIP.image_forms.items()}
    monkeypatch.setattr(FastCLIP, "image_forms", forms)
    monkeypatch.setattr(text_tower, "text_embedding", partial(spy, taken, "text_embedding", text_tower.text_embedding))
    return taken
