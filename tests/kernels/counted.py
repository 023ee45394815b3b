"""What really happens in a call: products and bytes of interpreted kernels, bytes of tensors."""

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from torch.profiler import ProfilerActivity, profile

__all__ = ["Launched", "counted_launches", "peak_bytes", "product_flops"]


@dataclass
class Launched:
    """Sums over all programs of all launches.

    Attributes:
        flops: Of products, two for a multiply-add, padding of tiles included.
        bytes: Loaded and stored where masks are true.
        kernels: Names of the kernels that were launched.
        precisions: Of the products, by the name of the kernel around them.
    """

    flops: int = 0
    bytes: int = 0
    kernels: set[str] = field(default_factory=set)
    precisions: dict[str, set[str]] = field(default_factory=dict)


@contextmanager
def counted_launches() -> Iterator[Launched]:
    """Within it every launch, product, load and store of an interpreted kernel is counted."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    found = Launched()
    running = [""]

    run = GridExecutor.__call__

    def launch(executor: Any, *args: Any, **options: Any) -> Any:
        running[0] = executor.fn.__name__
        found.kernels.add(running[0])
        return run(executor, *args, **options)

    def dot(left: Any, right: Any, precision: Any) -> None:
        found.flops += 2 * left.data.size * right.data.shape[-1]
        name = str(precision).rpartition(".")[2]
        found.precisions.setdefault(running[0], set()).add(name)

    def load(pointers: Any, mask: Any) -> None:
        found.bytes += int(mask.data.sum()) * _bytes(pointers)

    with pytest.MonkeyPatch.context() as patch:
        for name, count in (
            ("create_dot", lambda left, right, _, precision, *__: dot(left, right, precision)),
            ("create_masked_load", lambda pointers, mask, *_: load(pointers, mask)),
            ("create_masked_store", lambda pointers, _, mask, *__: load(pointers, mask)),
        ):
            patch.setattr(InterpreterBuilder, name, _counting(InterpreterBuilder, name, count))
        patch.setattr(GridExecutor, "__call__", launch)
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


def product_flops(call: Callable[[], Any]) -> int:
    """FLOP of the matrix products that PyTorch makes on the CPU in a call, custom operators too."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        call()
    return sum(_flops(event.name, event.input_shapes) for event in profiled.events())


# Where the left of two factors stands among the inputs of a product.
_LEFT = {
    "aten::mm": 0,
    "aten::bmm": 0,
    "aten::mv": 0,
    "aten::addmm": 1,
    "aten::addmm_": 1,
    "aten::baddbmm": 1,
    "aten::baddbmm_": 1,
    "mkldnn::_linear_pointwise": 0,
}


def _flops(name: str, shapes: list[list[int]]) -> int:
    if name not in _LEFT:
        return 0
    left, right = shapes[_LEFT[name] : _LEFT[name] + 2]
    # The weight of a linear layer stands on its side.
    columns = right[0] if name.startswith("mkldnn") else math.prod(right[len(left) - 1 :])
    return 2 * math.prod(left) * columns
