"""These tests run only in a process whose Triton interprets; see test_triton_interpreted.py."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.kernels.interpreted.shortcuts import take_shortcuts
from torch import Tensor

IS_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if IS_INTERPRETING else ["test_*.py"]

if IS_INTERPRETING:
    take_shortcuts()


@pytest.fixture(autouse=True)
def unwritten_elements_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """An element that a kernel forgets to write is NaN, or an integer far below all others."""
    owners: dict[str, Any] = {"empty": torch, "empty_like": torch, "new_empty": Tensor}
    for name, owner in owners.items():
        monkeypatch.setattr(owner, name, _filled(getattr(owner, name)))


def _filled(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def filled(*args: Any, **options: Any) -> Tensor:
        result = empty(*args, **options)
        if result.is_floating_point():
            return result.fill_(float("nan"))
        integer = result.dtype is not torch.bool and not result.is_complex()
        return result.fill_(torch.iinfo(result.dtype).min // 2) if integer else result

    return filled
