"""Make the next item in a thread while the current one is in use."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

__all__ = ["made_ahead"]

Item = TypeVar("Item")


def made_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yield ``items``, of which the next one is made in a thread meanwhile.

    An error in making an item is raised where the item is asked for. The thread ends with the
    iterator: at the end of the items, after an error, and when the iterator is closed.

    >>> list(made_ahead(range(3)))
    [0, 1, 2]
    """
    iterator, nothing = iter(items), list[Item]()
    with ThreadPoolExecutor(1, "next item") as thread:
        coming = thread.submit(_next, iterator)
        while (found := coming.result()) != nothing:
            coming = thread.submit(_next, iterator)
            yield found[0]


def _next(iterator: Iterator[Item]) -> list[Item]:
    """The next item in a list; empty at the end."""
    for item in iterator:
        return [item]
    return []
