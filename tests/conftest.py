"""Fixtures shared by all tests.

``make test-quick`` leaves out what is marked ``slow``: a test, or a process for several tests, that
takes more than 5 seconds of an idle core, because it

================================ ===============================================
measures peak memory             processes of their own and batches of real size
runs Triton in its interpreter   every element of a tile is a Python object
compiles                         ``torch.compile`` and Triton for three GPUs
has a table of 2**24 rows        the smallest where float32 confuses neighbours
runs commands as a user does     workers, restarts, packages, orchestrators
================================ ===============================================
"""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # the process that shares out the files needs no torch
    from tests.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """``ranks(W).run(function, *args)``: what the function returned on each of W gloo ranks."""
    from tests.ranks import Ranks

    pool = Ranks()
    yield pool
    pool.close()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the test that kills a run (``make test-slow``)."""
    parser.addoption("--kills", type=int, default=100, help="kills of the soak test")
    parser.addoption("--kills-seed", type=int, default=4, help="seed of their moments")


def pytest_configure() -> None:
    """Take interrupts: started in the background, this process and what it starts ignore them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector need not look at it again and again."""
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: where files are shared out, short ones fill the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
