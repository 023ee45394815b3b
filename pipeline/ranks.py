"""Helpers for an optional process group (None = single process)."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

from shardrec.kernels.ranks.communicator import Communicator

__all__ = [
    "default_group",
    "in_step",
    "on_all_ranks",
    "on_first_rank",
    "on_this_rank",
]

Result = TypeVar("Result")


def default_group() -> dist.ProcessGroup | None:
    """The default process group; None if there is none or it has a single rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.group.WORLD


def on_all_ranks(work: Callable[[], Result], group: dist.ProcessGroup | None) -> list[Result]:
    """The results of ``work`` on all ranks, in rank order; raises on all ranks if one fails.

    Collectives: one all-gather of small objects.
    """
    if group is None:
        return [work()]
    answer: tuple[Result | None, Exception | None]
    try:
        answer = work(), None
    except Exception as error:
        answer = None, error
    answers = [answer] * Communicator(group).size
    dist.all_gather_object(answers, answer, group=group)
    answers[Communicator(group).rank] = answer  # an error of this rank keeps its traceback
    for rank, (_, raised) in enumerate(answers):
        if raised is not None:
            raised.add_note(f"raised on rank {rank} of {len(answers)}")
            raise raised
    return [result for result, _ in answers]  # type: ignore[misc]


def on_this_rank(work: Callable[[], Result], group: dist.ProcessGroup | None) -> Result:
    """The result of ``work`` on this rank; raises on all ranks if one fails.

    Unlike ``on_all_ranks``, only errors are sent, so results may be large.

    Collectives: one all-gather of small objects.
    """
    results: list[Result] = []
    on_all_ranks(lambda: results.append(work()), group)
    return results[0]


def on_first_rank(work: Callable[[], Result], group: dist.ProcessGroup | None) -> Result:
    """The result of ``work`` on rank 0, returned on every rank; raises on all ranks if it fails.

    Collectives: one all-gather of small objects.
    """
    first = Communicator(group).rank == 0
    return on_all_ranks(lambda: work() if first else None, group)[0]  # type: ignore[return-value]


def in_step(
    items: Iterable[Result], group: dist.ProcessGroup | None, device: torch.device
) -> Iterator[Result]:
    """Yield ``items``; if producing the next one fails on one rank, all ranks raise.

    Otherwise the other ranks would wait for the failed rank in their next collective. For each
    item: (1) every rank produces it or catches the error; (2) an all-reduce counts the errors;
    (3) without errors all ranks yield, otherwise the errors are gathered and the first is raised on
    all ranks. Every rank must have the same number of items.

    Args:
        items: this rank's items.
        group: the ranks; None for one process.
        device: device of the tensors in the group's collectives.

    Raises:
        Exception: the error of the first rank that failed, on all ranks; a note names the rank.

    Collectives: one all-reduce of a number for each item, and one at the end; if a rank failed, one
    all-gather of small objects.
    """
    iterator = iter(items)
    if group is None:
        yield from iterator
        return
    while True:
        item, error = _next(iterator)
        failed = torch.tensor(float(error is not None), device=device)
        Communicator(group).sum_(failed)
        if failed:
            on_this_rank(functools.partial(_raise, error), group)
        if not item:
            return
        yield item[0]


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


def _next(iterator: Iterator[Result]) -> tuple[list[Result], Exception | None]:
    """The next item in a list (empty at the end), and the error if there was one."""
    try:
        return [next(iterator)], None
    except StopIteration:
        return [], None
    except Exception as error:
        return [], error
