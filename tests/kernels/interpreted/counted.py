"""What really happens in a call: products and bytes of interpreted kernels, bytes of tensors."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from torch.profiler import ProfilerActivity, profile

__all__ = ["Launched", "counted_launches", "peak_bytes"]


@dataclass
class Launched:
    """Sums over all programs of all launches.

    Attributes:
        flops: Of products, two for a multiply-add, padding of tiles included.
        bytes: Loaded and stored where masks are true.
    """

    flops: int = 0
    bytes: int = 0


@contextmanager
def counted_launches() -> Iterator[Launched]:
    """Within it every product, load and store of an interpreted kernel is counted."""
    from triton.runtime.interpreter import InterpreterBuilder

    found = Launched()

    def dot(left: Any, right: Any) -> None:
        found.flops += 2 * left.data.size * right.data.shape[-1]

    def load(pointers: Any, mask: Any) -> None:
        found.bytes += int(mask.data.sum()) * _bytes(pointers)

    with pytest.MonkeyPatch.context() as patch:
        for name, count in (
            ("create_dot", lambda left, right, *_: dot(left, right)),
            ("create_masked_load", lambda pointers, mask, *_: load(pointers, mask)),
            ("create_masked_store", lambda pointers, _, mask, *__: load(pointers, mask)),
        ):
            patch.setattr(InterpreterBuilder, name, _counting(InterpreterBuilder, name, count))
        yield found


def _counting(owner: Any, name: str, count: Callable[..., None]) -> Callable[..., Any]:
    original = getattr(owner, name)

    def counting(self: Any, *args: Any) -> Any:
        count(*args)
        return original(self, *args)

    return counting


def _bytes(pointers: Any) -> int:
    return max(1, int(pointers.get_element_ty().primitive_bitwidth) // 8)


def peak_bytes(call: Callable[[], Any]) -> int:
    """Most bytes that a call allocates for tensors at any time, its result included.

    The memory of the interpreter is not that of tensors and does not count.
    """
    gc.collect()  # what is freed within must be of the call
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = call()
    held = most = 0
    events = profiled.profiler.kineto_results.events()
    changes = [(one.start_ns(), one.nbytes()) for one in events if one.name() == "[memory]"]
    for _, change in sorted(changes, key=lambda one: one[0]):
        held += change
        most = max(most, held)
    del result
    return most
