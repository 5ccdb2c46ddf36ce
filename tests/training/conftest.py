"""Fixtures of the tests of whole runs."""

import pytest
from small_runs import options, shapes  # noqa: F401


@pytest.fixture
def plots():
    """A test that takes this draws the curves of its runs."""


@pytest.fixture(autouse=True)
def no_plots(request, monkeypatch):
    """Drawing its curves takes half of a short run's time."""
    if "plots" not in request.fixturenames:
        monkeypatch.setattr("miniclip.training.train.plot", lambda log, image: None)
