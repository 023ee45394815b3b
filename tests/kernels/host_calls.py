"""What a call asks of the host of a GPU: operations to start, and waits for the device."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

__all__ = ["HostCalls", "counted_host_calls"]

# On a GPU each of these reads a size or a value from the device, or copies from pageable memory.
_WAITS = {
    "_unique2",
    "bincount",
    "lift_fresh",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
_READS = ("__bool__", "__float__", "__index__", "__int__", "item", "tolist")
_BY_MASK = {"index", "index_put", "index_put_", "_index_put_impl_"}


@dataclass
class HostCalls:
    """Calls of PyTorch, views included, and of Triton kernels.

    Attributes:
        operations: Number of calls of each operation.
        waits: Number of calls of each operation that would wait for a GPU.
        kernels: Number of launches of each Triton kernel.
    """

    operations: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)


class _Counting(TorchDispatchMode):
    def __init__(self, found: HostCalls) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "shardrec":
            # A mode is off inside of an operation that it handles: here it comes back.
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args)
        if func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        self._found.operations[name] += 1
        if name in _WAITS or (name in _BY_MASK and _has_mask(args[1])) or _unsized(name, kwargs):
            self._found.waits[name] += 1
        return func(*args, **kwargs)


def _has_mask(indices: Any) -> bool:
    return any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in indices)


def _unsized(name: str, kwargs: dict[str, Any]) -> bool:
    return name == "repeat_interleave" and kwargs.get("output_size") is None


@contextmanager
def counted_host_calls() -> Iterator[HostCalls]:
    """Within it the calls of this thread are counted, inside the losses' operators too."""
    from triton.runtime.interpreter import GridExecutor

    found = HostCalls()
    launch = GridExecutor.__call__

    def launched(executor: Any, *args: Any, **options: Any) -> Any:
        found.kernels[executor.fn.__name__] += 1
        with _disable_current_modes():  # the interpreter's own tensors do not count
            return launch(executor, *args, **options)

    def reading(name: str) -> Callable[[Tensor], Any]:
        read = getattr(Tensor, name)

        def counted(tensor: Tensor) -> Any:
            found.waits[name] += 1
            with _disable_current_modes():
                return read(tensor)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", launched)
        for name in _READS:
            patch.setattr(Tensor, name, reading(name))
        with _Counting(found):
            yield found
