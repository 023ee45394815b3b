"""Lists of blocks of every kind, and what the block log-sum-exp of one must be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from tests.tolerance import assert_as_close_as_eager
from torch import Tensor

from shardrec.kernels.block_logsumexp import Blocks, EveryPair, Rounds
from shardrec.kernels.block_logsumexp.reference import block_logsumexp_reference

# Of states, rows, blocks and the gradients of both values: the values, and both gradients.
AnyBlocks = Blocks | EveryPair
Run = Callable[[Tensor, Tensor, AnyBlocks, tuple[Tensor, Tensor]], list[Tensor]]
KINDS = ("full", "listed", "offsets", "gathered", "gathered-offsets", "slots", "rounds")


def draw(n: int, r: int, d: int, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n * 1000 + r * 10 + d)
    states = torch.randn(n, d, generator=generator) * scale * d**-0.25
    rows = torch.randn(r, d, generator=generator) * scale * d**-0.25
    return states.to(dtype), rows.to(dtype)


def some_targets(n: int, r: int) -> Tensor:
    """Targets with repeats; every fifth is on another shard."""
    targets = torch.arange(n) * 7 % max(r, 1)
    return torch.where((torch.arange(n) % 5 == 4) | (r == 0), -1, targets)


def listed(n: int, r: int, *, offsets: bool) -> Blocks:
    """Blocks of uneven sizes, one without pairs, one without items; items repeat and overlap."""
    generator = torch.Generator().manual_seed(n + r)
    starts = torch.tensor([0, n // 3, n // 3, n - 1, n])
    items = torch.randint(0, r, (2 * r + 3,), generator=generator)
    return Blocks(
        pair_positions=torch.randperm(n, generator=generator),
        pair_starts=starts,
        items=items,
        item_starts=torch.tensor([0, 2, r // 2, r]),
        item_ends=torch.tensor([r + 1, r, r // 2, 2 * r + 3]),
        targets=some_targets(n, r),
        num_slots=n,
        offsets=torch.randn(2 * r + 3, generator=generator) if offsets else None,
    )


def gathered(n: int, r: int, *, offsets: bool) -> Blocks:
    """A list of its own for every other position: of uneven lengths, one without items."""
    generator = torch.Generator().manual_seed(n * r)
    positions = torch.randperm(n, generator=generator)[: (n + 1) // 2]
    sizes = torch.randint(0, 40, positions.shape, generator=generator)
    sizes[-1] = 0
    ends = sizes.cumsum(0)
    num_items = int(sizes.sum())
    return Blocks(
        pair_positions=positions,
        pair_starts=torch.arange(positions.numel() + 1),
        items=torch.randint(0, r, (num_items,), generator=generator),
        item_starts=ends - sizes,
        item_ends=ends,
        targets=some_targets(n, r),
        num_slots=n,
        offsets=torch.randn(num_items, generator=generator) if offsets else None,
    )


def with_slots(n: int, r: int) -> Blocks:
    """Two blocks that share positions, a slot for each pair and one slot that two pairs share."""
    blocks = listed(n, r, offsets=False)
    positions = torch.cat([torch.arange(n), torch.arange(0, n, 2)])
    num_pairs = positions.numel()
    slots = torch.randperm(num_pairs, generator=torch.Generator().manual_seed(1))
    slots[0] = slots[-1]
    return replace(
        blocks,
        pair_positions=positions,
        pair_starts=torch.tensor([0, n, n, num_pairs, num_pairs]),
        item_ends=torch.tensor([r + 1, r, r // 2 + 1, 2 * r + 3]),
        pair_slots=slots,
        num_slots=num_pairs + 1,
    )


def with_rounds(n: int, r: int) -> Blocks:
    """Three rounds of four chunks that reach one to each side, as rece lists them."""
    generator = torch.Generator().manual_seed(n - r)
    position_chunks = torch.randint(0, 4, (n, 3), generator=generator, dtype=torch.int32)
    item_chunks = torch.randint(0, 4, (r, 3), generator=generator, dtype=torch.int32)
    sorted_chunks, order = item_chunks.T.contiguous().sort(dim=1, stable=True)
    chunk = torch.arange(4, dtype=torch.int32)
    pairs, starts, ends, sizes = [], [], [], []
    for index in range(3):
        line = sorted_chunks[index].contiguous()
        pairs.append(torch.argsort(position_chunks[:, index], stable=True))
        sizes.append(torch.bincount(position_chunks[:, index], minlength=4))
        starts.append(torch.searchsorted(line, chunk - 1) + index * r)
        ends.append(torch.searchsorted(line, chunk + 1, right=True) + index * r)
    return Blocks(
        pair_positions=torch.cat(pairs),
        pair_starts=torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat(sizes).cumsum(0)]),
        items=order.flatten(),
        item_starts=torch.cat(starts),
        item_ends=torch.cat(ends),
        targets=some_targets(n, r),
        num_slots=n,
        rounds=Rounds(position_chunks, item_chunks, 1, torch.arange(3).repeat_interleave(4)),
    )


def blocks_of(kind: str, n: int, r: int) -> AnyBlocks:
    made: dict[str, Callable[[], AnyBlocks]] = {
        "full": lambda: EveryPair(r, some_targets(n, r)),
        "listed": lambda: listed(n, r, offsets=False),
        "offsets": lambda: listed(n, r, offsets=True),
        "gathered": lambda: gathered(n, r, offsets=False),
        "gathered-offsets": lambda: gathered(n, r, offsets=True),
        "slots": lambda: with_slots(n, r),
        "rounds": lambda: with_rounds(n, r),
    }
    return made[kind]()


def by_autograd(
    states: Tensor,
    rows: Tensor,
    blocks: AnyBlocks,
    dtype: torch.dtype,
    grads: tuple[Tensor, Tensor],
) -> list[Tensor]:
    """Values and gradients of the definition in a dtype."""
    states = states.detach().to(dtype).requires_grad_()
    rows = rows.detach().to(dtype).requires_grad_()
    logsumexp, target_logits = block_logsumexp_reference(states, rows, blocks)
    has = logsumexp > -torch.inf
    total = (logsumexp[has] * grads[0][has].to(dtype)).sum()
    total = total + (target_logits * grads[1].to(dtype)).sum()
    grad_states, grad_rows = torch.autograd.grad(total, (states, rows), materialize_grads=True)
    return [logsumexp.detach(), target_logits.detach(), grad_states, grad_rows]


def assert_as_close_as_definition(
    run: Run, states: Tensor, rows: Tensor, blocks: AnyBlocks, slack: float = 0.0
) -> None:
    """Values and gradients of ``run`` are as exact as those of the definition in the same dtype."""
    generator = torch.Generator().manual_seed(5)
    grad_logsumexp = torch.randn(blocks.num_slots, generator=generator)
    grad_logsumexp[::4] = 0.0
    grads = (grad_logsumexp, torch.randn(states.shape[0], generator=generator))
    truth = by_autograd(states, rows, blocks, torch.float64, grads)
    eager = by_autograd(states, rows, blocks, states.dtype, grads)
    for ours, yardstick, true in zip(run(states, rows, blocks, grads), eager, truth, strict=True):
        assert ours.dtype is torch.float32
        assert torch.equal(ours == -torch.inf, true == -torch.inf)
        finite = true.nan_to_num(neginf=0.0)
        assert_as_close_as_eager(
            ours.nan_to_num(neginf=0.0), yardstick.nan_to_num(neginf=0.0), finite, slack
        )
