"""Copies of a GPU's state on their way to host memory, tried between tensors of the host."""

from typing import Any

import pytest
import torch

from shardrec.pipeline.checkpoint.pinned import PinnedBuffers


@pytest.mark.parametrize("shape", [(), (0,), (1,), (64,), (65, 3), (1000, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_what_arrives_is_what_was_sent(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    buffers = PinnedBuffers(512, pinned=False)
    source = torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)
    for sent in (source, torch.stack((source, source), -1)[..., 0]):
        arrived = torch.zeros(shape, dtype=dtype)
        buffers.copy(sent, arrived)
        assert torch.equal(arrived, sent)


def test_a_large_tensor_takes_no_more_pinned_memory_than_the_two_buffers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = list[int]()
    empty: Any = torch.empty

    def counted(*shape: int, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        found: torch.Tensor = empty(*shape, **options)
        made.append(found.nbytes * pin_memory)
        return found

    monkeypatch.setattr(torch, "empty", counted)
    PinnedBuffers(1024).copy(torch.ones(100_000), torch.zeros(100_000))
    assert made == [512, 512]
