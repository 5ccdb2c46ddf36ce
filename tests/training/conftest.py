"""Fixtures of the tests of whole runs."""

from runs import options, shapes  # noqa: F401
