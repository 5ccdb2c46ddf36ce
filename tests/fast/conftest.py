"""Which fast forms ran."""

from functools import partial

import pytest
from fast_cases import spy

from miniclip.fast.clip import FastCLIP


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The fast forms that ran, in order."""
    taken = []
    for name in ("image", "text"):
        forms = {
            key: form._replace(run=partial(spy, taken, name, form.run))
            for key, form in getattr(FastCLIP, f"{name}_forms").items()
        }
        monkeypatch.setattr(FastCLIP, f"{name}_forms", forms)
    return taken
