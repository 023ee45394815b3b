"""The forward and the backward pass that all losses share, one chunk of positions at a time.

A pass has these phases:

1. choose the candidates (forward) or take them as saved (backward), and fetch the rows in use;
2. for each chunk of positions of all ranks: all-gather its states while the chunk before is
   processed, and compute the blocks of logits of this shard;
3. combine the shards: all-reduces (maximum, sum) of log-sum-exps in forward, a reduce-scatter of
   state gradients in backward;
4. in forward, take the slot with the largest loss for each position, and reduce the losses.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from shardrec.kernels import block_logsumexp
from shardrec.kernels.loss.candidates import Candidates, Plan
from shardrec.kernels.loss.inputs import Inputs
from shardrec.kernels.loss.row_fetch import (
    RowFetch,
    fetch_rows,
    return_gradients,
    with_fetched_rows,
)
from shardrec.kernels.ranks.chunks import Chunk, Gradients, prefetched
from shardrec.kernels.ranks.communicator import Communicator, Pending

__all__ = [
    "backward",
    "forward",
    "largest_slots",
    "loss_of_margin",
    "streamed_gradients",
    "streamed_logsumexp",
    "used_rows",
]

FETCH_NAMES = ("shared", "fetched", "wanted", "counts")


def forward(
    inputs: Inputs,
    candidates: Candidates,
    tables: Sequence[Tensor],
    reduction: str,
    *,
    copies_rows: bool,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The loss, the mask of covered positions, and the tensors saved for backward.

    ``loss_i = softplus(logsumexp - correction - target logit)``, the largest over the slots of i.

    Args:
        inputs: The batch and the table.
        candidates: How the loss chooses candidates.
        tables: Tensors that ``candidates`` needs.
        reduction: none, mean or sum.
        copies_rows: Work on a copy of the rows in use, if the loss names them.

    Returns:
        (N,) or () float32; (N,) bool; and the tensors saved for ``backward``, by name.

    Collectives: those of the candidates, of ``streamed_logsumexp`` or ``fetch_rows``, and one
    all-reduce each for a mean's weights and for the sum of losses.
    """
    choice = candidates.choose(inputs)
    tensors = (*tables, *choice)
    saved = {f"choice{index}": tensor for index, tensor in enumerate(choice)}
    if inputs.ranks.group is not None:
        saved["sizes"] = inputs.layout.sizes()
    local = _local_inputs(inputs, candidates, tensors, saved) if copies_rows else inputs
    plan = candidates.plan(inputs, local, tensors)
    logsumexp, target_logits = streamed_logsumexp(local, plan)
    correction = plan.correction()
    margin = logsumexp if correction is None else logsumexp - correction
    covered = torch.ones_like(target_logits, dtype=torch.bool)
    if plan.slot_positions is None:
        margin = margin - target_logits
    else:
        margin = margin - target_logits[plan.slot_positions]
        saved["winner"] = largest_slots(margin, plan.slot_positions, target_logits.numel())
        covered = saved["winner"] < plan.num_slots
        margin = F.pad(margin, (0, 1), value=-torch.inf)[saved["winner"]]
    coefficients = inputs.coefficients(reduction, covered)
    saved |= {"logsumexp": logsumexp, "slope": margin.sigmoid() * coefficients}
    loss = loss_of_margin(margin) * coefficients
    if reduction != "none":
        loss = inputs.ranks.sum(loss.sum())
    return loss, covered, saved


def backward(
    inputs: Inputs,
    candidates: Candidates,
    tables: Sequence[Tensor],
    saved: dict[str, Tensor],
    grad: Tensor,
) -> tuple[Tensor, Tensor]:
    """(N, D) and (R, D) float32 gradients of the scaled states and rows.

    If ``saved["used"]`` names M rows in use, the second gradient is (M, D), of these rows.

    Args:
        inputs: As in ``forward``.
        candidates: As in ``forward``.
        tables: As in ``forward``.
        saved: The tensors that ``forward`` saved, by name.
        grad: (N,) or () float32 gradient of the loss.

    Collectives: those of ``streamed_gradients`` or ``return_gradients``.
    """
    choice = [tensor for name, tensor in saved.items() if name.startswith("choice")]
    held, fetch = inputs, None
    if "used" in saved:
        held = inputs.restrict(saved["used"], saved["used_rows"])
    local = held
    if "shared" in saved and saved["shared"].numel():
        fetch = RowFetch.unpack(*(saved[name] for name in FETCH_NAMES))
        local = with_fetched_rows(held, fetch, saved["fetched_rows"])
    plan = candidates.plan(inputs, local, (*tables, *choice))
    grad_margin = grad * saved["slope"]
    grad_slots = grad_margin
    if "winner" in saved:
        # Positions without a slot write to one extra entry after the last, which is dropped.
        padded = grad_margin.new_zeros(plan.num_slots + 1)
        padded[saved["winner"]] = grad_margin
        grad_slots = padded[:-1]
    grad_states, grad_rows = streamed_gradients(
        local, plan, saved["logsumexp"], grad_slots, -grad_margin
    )
    if fetch is not None:
        grad_rows = return_gradients(held, fetch, grad_rows)
    return grad_states, grad_rows


def streamed_logsumexp(inputs: Inputs, plan: Plan) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over all shards of each slot of this rank, and the logit of each target.

    The workspace is two chunks of states, independent of the number of ranks: the states of one
    chunk are in flight while the chunk before is processed.

    Returns:
        (num_slots,) float32, -inf for a slot without candidates, and (N,) float32. Outside of
        autograd: ``streamed_gradients`` computes the gradient.

    Collectives: per chunk an all-gather each of states, targets and ``plan.per_position``, and two
    all-reduces, of the maximum and of the sum of exponentials and the target logits.
    """
    states, rows = inputs.states, inputs.scaled_rows()
    logsumexp: Tensor | None = None
    target_logits: Tensor | None = None
    for chunk, (chunk_states, targets, *rest) in _chunks(inputs, plan):
        blocks = plan.blocks(chunk, targets, inputs.row_ids, rest)
        shard = block_logsumexp.forward(chunk_states, rows, blocks, inputs.backend)
        chunk_logsumexp, chunk_target_logits = _combine_shards(*shard, inputs.ranks)
        slots = plan.slots(chunk)
        logsumexp = _with_own(logsumexp, chunk_logsumexp, slots, plan.num_slots)
        target_logits = _with_own(target_logits, chunk_target_logits, chunk, states.shape[0])
    if logsumexp is None or target_logits is None:
        logsumexp = states.new_full((plan.num_slots,), -torch.inf, dtype=torch.float32)
        target_logits = states.new_zeros(states.shape[0], dtype=torch.float32)
    return logsumexp, target_logits


def _with_own(total: Tensor | None, values: Tensor, chunk: Chunk, size: int) -> Tensor:
    """(size,) values of this rank, with those of a chunk; the first chunk makes the tensor."""
    own = values if values.numel() == size else values[chunk.own_slice]
    if isinstance(chunk.own, slice):
        return own
    total = values.new_empty(size) if total is None else total
    total[chunk.own] = own
    return total


def streamed_gradients(
    inputs: Inputs,
    plan: Plan,
    logsumexp: Tensor,
    grad_logsumexp: Tensor,
    grad_target_logits: Tensor,
) -> tuple[Tensor, Tensor]:
    """(N, D) and (R, D) float32 gradients of ``inputs.states`` and ``inputs.scaled_rows()``.

    The gradients of one chunk are in flight while the next chunk is processed.

    Args:
        inputs: The batch and the table of the forward pass.
        plan: The plan of the forward pass, or one that lists the same candidates.
        logsumexp: (num_slots,) float32 log-sum-exps of the forward pass.
        grad_logsumexp: (num_slots,) float32 gradient of the loss.
        grad_target_logits: (N,) float32 gradient of the loss.

    Collectives: per chunk an all-gather each of states, targets, slots with their gradients,
    gradients of target logits and ``plan.per_position``, and a reduce-scatter of state gradients.
    """
    states, rows = inputs.states, inputs.scaled_rows()
    of_slots = [logsumexp, grad_logsumexp]
    if inputs.ranks.group is not None:  # one collective for both
        of_slots = [torch.stack(of_slots, dim=1)]
    grad_states = Gradients(inputs.ranks, states)
    grad_rows = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
    for chunk, gathered in _chunks(inputs, plan, (of_slots, grad_target_logits)):
        chunk_states, targets, of_targets, *rest = gathered
        columns, rest = rest[: len(of_slots)], rest[len(of_slots) :]
        if len(columns) == 1:
            columns = [column.contiguous() for column in columns[0].unbind(1)]
        chunk_logsumexp, chunk_grad = columns
        part = block_logsumexp.backward(
            chunk_states,
            rows,
            plan.blocks(chunk, targets, inputs.row_ids, rest),
            chunk_logsumexp,
            chunk_grad,
            of_targets,
            grad_rows,
            inputs.backend,
        )
        grad_states.send(part, chunk)
    return grad_states.finish(), grad_rows


def used_rows(inputs: Inputs, candidates: Candidates, tables: Sequence[Tensor]) -> Tensor:
    """(M,) int64 ascending local rows that are candidates or targets; for a single process."""
    items = candidates.used_items(inputs, tuple(tables))
    assert isinstance(items, Tensor)
    return _rows_of(inputs, items)


def largest_slots(values: Tensor, slot_positions: Tensor, num_positions: int) -> Tensor:
    """(N,) int64 slot with the largest value of each position; of equal values the lower slot.

    A position without a slot gets S, the number of slots.

    Args:
        values: (S,) float32.
        slot_positions: (S,) int64 in [0, N).
        num_positions: N.

    >>> largest_slots(torch.tensor([1.0, 3.0, 2.0]), torch.tensor([0, 0, 2]), 3)
    tensor([1, 3, 2])
    """
    best = values.new_full((num_positions,), -torch.inf)
    best.scatter_reduce_(0, slot_positions, values, "amax")
    # A NaN counts as the best, so that the loss becomes NaN.
    is_best = (values == best[slot_positions]) | values.isnan()
    slots = torch.arange(values.numel(), device=values.device)
    slots = torch.where(is_best, slots, values.numel())
    winner = torch.full((num_positions,), values.numel(), device=values.device)
    return winner.scatter_reduce_(0, slot_positions, slots, "amin")


def loss_of_margin(margin: Tensor) -> Tensor:
    """(N,) losses ``log(1 + exp(margin))``; margin = log-sum-exp of candidates - target logit.

    The target is not among the candidates, so the gradient is not computed as 1 - p, which would
    lose precision for a target with probability p near 1.

    >>> loss_of_margin(torch.tensor([0.0, -torch.inf]))
    tensor([0.6931, 0.0000])
    """
    return F.softplus(margin)


def _local_inputs(
    inputs: Inputs,
    candidates: Candidates,
    tensors: tuple[Tensor, ...],
    saved: dict[str, Tensor],
) -> Inputs:
    """The inputs restricted to the rows in use, some fetched; adds rows and plan to ``saved``."""
    used = candidates.used_items(inputs, tensors)
    if used is None:
        return inputs
    fetch = used if isinstance(used, RowFetch) else None
    local = _over_items(inputs, used if isinstance(used, Tensor) else used.leaving, saved)
    if inputs.ranks.group is None:
        return local
    counts = torch.zeros((2, inputs.ranks.size), dtype=torch.int64)
    packed = (*(inputs.targets.new_empty(0) for _ in range(3)), counts)
    fetched = inputs.rows.new_empty((0, inputs.rows.shape[1]))
    if fetch is not None:
        packed, fetched = fetch.pack(), fetch_rows(local, fetch)
        local = with_fetched_rows(local, fetch, fetched)
    saved |= {**dict(zip(FETCH_NAMES, packed, strict=True)), "fetched_rows": fetched}
    return local


def _over_items(inputs: Inputs, items: Tensor, saved: dict[str, Tensor]) -> Inputs:
    """The inputs restricted to a copy of the rows of some items; adds the copy to ``saved``."""
    used = _rows_of(inputs, items)
    saved |= {"used": used, "used_rows": inputs.rows.index_select(0, used)}
    return inputs.restrict(used, saved["used_rows"])


def _rows_of(inputs: Inputs, items: Tensor) -> Tensor:
    found = inputs.row_ids.find(items)
    return torch.unique(found if inputs.row_ids.is_complete else found[found >= 0])


def _chunks(
    inputs: Inputs, plan: Plan, grads: tuple[list[Tensor], Tensor] | None = None
) -> Iterator[tuple[Chunk, list[Tensor]]]:
    """Each chunk with its gathered tensors: states, targets, ``grads`` if any, per_position.

    ``grads`` are tensors of slots, and one of positions, which is gathered first.
    """
    gather = inputs.layout.start_gather

    def start(chunk: Chunk) -> list[Pending]:
        pending = [gather(one, chunk) for one in (inputs.states, inputs.targets)]
        if grads is not None:
            of_slots, of_targets = grads
            pending.append(gather(of_targets, chunk))
            slots = plan.slots(chunk)
            pending += [gather(one, slots) for one in of_slots]
        return [*pending, *(gather(one, chunk) for one in plan.per_position)]

    # All chunks are listed first, so that no iteration waits for the device to count positions.
    return prefetched(list(inputs.layout.chunks(plan.chunk_of())), start)


def _combine_shards(
    logsumexp: Tensor, target_logits: Tensor, ranks: Communicator
) -> tuple[Tensor, Tensor]:
    """Log-sum-exps and target logits over all shards; two all-reduces, a maximum and a sum."""
    if ranks.group is None:
        return logsumexp, target_logits
    largest = ranks.max(logsumexp)
    shift = largest.masked_fill(largest == -torch.inf, 0.0)
    sums = ranks.sum(torch.cat([(logsumexp - shift).exp_(), target_logits]))
    num_slots = logsumexp.numel()
    return sums[:num_slots].log() + shift, sums[num_slots:]
