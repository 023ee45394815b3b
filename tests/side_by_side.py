"""Work of several tests in processes of their own, as many at a time as there are cores.

@pytest.fixture(scope="module")
def peaks(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[float]]]:
    with side_by_side(measured_in_a_process, asked_for(request, "name")) as started:
        yield started


@pytest.mark.parametrize("name", CASES)
def test_a_peak(name: str, peaks: dict[str, Future[float]]) -> None:
    assert peaks[name].result() < 100
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest

Key = TypeVar("Key")
Result = TypeVar("Result")


@contextmanager
def side_by_side(
    work: Callable[[Key], Result], keys: Iterable[Key]
) -> Iterator[dict[Key, Future[Result]]]:
    """What ``work`` returns or raises for each key; in the end what has not begun is left."""
    pool = ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0)))
    try:
        yield {key: pool.submit(work, key) for key in keys}
    finally:
        pool.shutdown(cancel_futures=True)


def asked_for(request: pytest.FixtureRequest, argument: str) -> list[Any]:
    """Values of an argument in those tests of the module that are run, in their order."""
    of_module = (i for i in request.session.items if getattr(i, "module", None) is request.module)
    calls = (getattr(item, "callspec", None) for item in of_module)
    return [call.params[argument] for call in calls if call and argument in call.params]
