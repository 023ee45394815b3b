"""Counts what collectives send, by process group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Traffic", "counted_traffic"]

Traffic = Counter[tuple[tuple[int, ...], str]]
"""Bytes that this rank put into collectives, by the ranks of the group and the collective."""


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Traffic = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            group = next(found for one in args if (found := _group(one)) is not None)
            name = func.name().removeprefix("c10d::").rstrip("_")
            ranks = tuple(dist.get_process_group_ranks(group))
            # The first tensors are those received, where there are two.
            tensors = [one for one in args if isinstance(one, Tensor | list)]
            sent = tensors[1] if "allreduce" not in name and _second(tensors) else tensors[0]
            parts = [sent] if isinstance(sent, Tensor) else sent
            self.found[ranks, name] += sum(one.numel() * one.element_size() for one in parts)
        return func(*args, **(kwargs or {}))


def _second(tensors: list[Any]) -> bool:
    """Whether the second argument is of tensors too, not of sizes."""
    if len(tensors) < 2:
        return False
    second = tensors[1]
    return isinstance(second, Tensor) or all(isinstance(one, Tensor) for one in second)


def _group(value: Any) -> dist.ProcessGroup | None:
    if not isinstance(value, torch.ScriptObject):
        return None
    try:
        return dist.ProcessGroup.unbox(value)
    except RuntimeError:  # the operation of a reduction
        return None


@contextmanager
def counted_traffic() -> Iterator[Traffic]:
    """Within it every collective of the main thread is counted."""
    with _Counting() as mode:
        yield mode.found
