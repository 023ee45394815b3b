"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """``ranks(W).run(function, *args)``: what the function returned on each of W gloo ranks."""
    pool = Ranks()
    yield pool
    pool.stop()
