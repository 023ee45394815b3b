"""A loss and its gradients, given what its candidates are: what is the same for all four."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from shardrec.kernels.loss.candidates import Candidates, Shape
from shardrec.kernels.loss.inputs import Problem
from shardrec.kernels.loss.row_fetch import (
    RowTrip,
    fetch_rows,
    return_gradients,
    with_fetched_rows,
)
from shardrec.kernels.streaming import streamed_gradients, streamed_logsumexp

__all__ = ["compare", "gradients", "kept_shapes", "largest_slots", "touched_rows"]

_TRIP = ("shared", "fetched", "wanted", "counts")


def compare(
    problem: Problem,
    candidates: Candidates,
    tables: Sequence[Tensor],
    reduction: str,
    *,
    copies_rows: bool,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The loss, which positions it covers, and what its gradients need.

    ``loss_i = softplus(logsumexp - correction - target logit)`` of the slot where it is largest.

    Args:
        problem: The batch and the table.
        candidates: The candidates of every position.
        tables: Tensors that they need.
        reduction: none, mean or sum.
        copies_rows: Work on a copy of the rows that are touched, where these are few.

    Returns:
        (N,) or () float32; (N,) bool; and by the names of ``kept_shapes`` what ``gradients`` takes.

    Collectives: those of the candidates, of ``streamed_logsumexp`` or ``fetch_rows``, and of
    ``Problem.reduce``.
    """
    choice = candidates.choose(problem)
    tensors = (*tables, *choice)
    kept = {f"choice{index}": tensor for index, tensor in enumerate(choice)}
    if problem.exchange.layout is not None:
        kept["layout"] = problem.exchange.layout
    meeting = _meeting(problem, candidates, tensors, kept) if copies_rows else problem
    plan = candidates.plan(problem, meeting, tensors)
    logsumexp, target_logits = streamed_logsumexp(meeting, plan)
    correction = plan.correction()
    margin = logsumexp if correction is None else logsumexp - correction
    covered = torch.ones_like(target_logits, dtype=torch.bool)
    if plan.slot_positions is None:
        margin = margin - target_logits
    else:
        margin = margin - target_logits[plan.slot_positions]
        kept["winner"] = largest_slots(margin, plan.slot_positions, target_logits.numel())
        covered = kept["winner"] < plan.num_slots
        margin = F.pad(margin, (0, 1), value=-torch.inf)[kept["winner"]]
    coefficients = problem.coefficients(reduction, covered)
    kept |= {"logsumexp": logsumexp, "slope": margin.sigmoid() * coefficients}
    loss = candidate_loss(margin) * coefficients
    if reduction != "none":
        loss = problem.exchange.sum(loss.sum())
    return loss, covered, kept


def kept_shapes(
    candidates: Candidates, dtype: torch.dtype, *, has_group: bool, copies_rows: bool
) -> dict[str, tuple[Shape, torch.dtype]]:
    """Names, shapes and dtypes of what ``compare`` keeps for ``gradients``, in their order.

    "slope" is the derivative of the loss with respect to each position's margin, "winner" the slot
    of each position, "used" the rows that are touched, "used_rows" their copy.

    Args:
        candidates: The candidates.
        dtype: Of the rows.
        has_group: Whether other ranks hold a part.
        copies_rows: As in ``compare``.
    """
    whole, single = torch.int64, torch.float32
    kept: dict[str, tuple[Shape, torch.dtype]] = {
        "slope": (("N",), single),
        "logsumexp": ((candidates.slots,), single),
    }
    if candidates.slots != "N":
        kept["winner"] = ("N",), whole
    if has_group:
        kept["layout"] = ("W", 2), whole
    kept |= {f"choice{index}": spec for index, spec in enumerate(candidates.choice)}
    if candidates.rows != "R" and copies_rows:
        kept |= {"used": (("M",), whole), "used_rows": (("M", "D"), dtype)}
    if candidates.travels and has_group:
        # Empty, but for the counts, where the rows stay.
        kept |= {"shared": (("A",), whole), "fetched": (("B",), whole), "wanted": (("C",), whole)}
        kept |= {"counts": ((2, "W"), whole), "fetched_rows": (("E", "D"), dtype)}
    return kept


def gradients(
    problem: Problem,
    candidates: Candidates,
    tables: Sequence[Tensor],
    kept: dict[str, Tensor],
    grad: Tensor,
) -> tuple[Tensor, Tensor]:
    """(N, D) and (R, D) float32 gradients of the scaled states and rows.

    Of the rows of ``kept["used"]`` alone, where these are all that is touched.

    Args:
        problem: As in ``compare``, like ``candidates`` and ``tables``.
        candidates: The candidates of every position.
        tables: Tensors that they need.
        kept: What ``compare`` kept.
        grad: (N,) or () float32 gradient of the loss.

    Collectives: those of ``streamed_gradients`` or ``return_gradients``.
    """
    choice = [tensor for name, tensor in kept.items() if name.startswith("choice")]
    part, trip = problem, None
    if "used" in kept:
        part = problem.restrict(kept["used"], kept["used_rows"])
    meeting = part
    if "shared" in kept and kept["shared"].numel():
        trip = RowTrip.unpack(*(kept[name] for name in _TRIP))
        meeting = with_fetched_rows(part, trip, kept["fetched_rows"])
    plan = candidates.plan(problem, meeting, (*tables, *choice))
    grad_margin = grad * kept["slope"]
    grad_slots = grad_margin
    if "winner" in kept:
        # Positions without a slot write a zero behind the last one.
        padded = grad_margin.new_zeros(plan.num_slots + 1)
        padded[kept["winner"]] = grad_margin
        grad_slots = padded[:-1]
    grad_states, grad_rows = streamed_gradients(
        meeting, plan, kept["logsumexp"], grad_slots, -grad_margin
    )
    if trip is not None:
        grad_rows = return_gradients(part, trip, grad_rows)
    return grad_states, grad_rows


def _meeting(
    problem: Problem,
    candidates: Candidates,
    tensors: tuple[Tensor, ...],
    kept: dict[str, Tensor],
) -> Problem:
    """Where states meet rows; keeps the rows that are touched, and their trip."""
    touched = candidates.touched(problem, tensors)
    trip = touched if isinstance(touched, RowTrip) else None
    items = touched if isinstance(touched, Tensor) else None
    items = items if trip is None else trip.leaving
    meeting = problem if items is None else _touched_part(problem, items, kept)
    if candidates.travels and problem.exchange.layout is not None:
        counts = torch.zeros_like(problem.exchange.layout.T.contiguous())
        packed = (*(problem.targets.new_empty(0) for _ in range(3)), counts)
        fetched = problem.rows.new_empty((0, problem.rows.shape[1]))
        if trip is not None:
            packed, fetched = trip.pack(), fetch_rows(meeting, trip)
            meeting = with_fetched_rows(meeting, trip, fetched)
        kept |= {**dict(zip(_TRIP, packed, strict=True)), "fetched_rows": fetched}
    return meeting


def _touched_part(problem: Problem, items: Tensor, kept: dict[str, Tensor]) -> Problem:
    """The problem over the rows of some items; keeps the rows."""
    used = _rows_of(problem, items)
    kept |= {"used": used, "used_rows": problem.rows.index_select(0, used)}
    return problem.restrict(used, kept["used_rows"])


def touched_rows(problem: Problem, candidates: Candidates, tables: Sequence[Tensor]) -> Tensor:
    """(M,) int64 ascending rows of one process that are candidates or targets of any position."""
    items = candidates.touched(problem, tuple(tables))
    assert isinstance(items, Tensor)
    return _rows_of(problem, items)


def _rows_of(problem: Problem, items: Tensor) -> Tensor:
    found = problem.row_ids.find(items)
    return torch.unique(found[found >= 0])


def largest_slots(values: Tensor, slot_positions: Tensor, num_positions: int) -> Tensor:
    """(N,) int64 slot of the largest value of every position, the lower one of equals.

    Args:
        values: (S,) float32.
        slot_positions: (S,) int64 in [0, N).
        num_positions: N.

    Returns:
        S stands for a position without a slot.

    >>> largest_slots(torch.tensor([1.0, 3.0, 2.0]), torch.tensor([0, 0, 2]), 3)
    tensor([1, 3, 2])
    """
    best = values.new_full((num_positions,), -torch.inf)
    best.scatter_reduce_(0, slot_positions, values, "amax")
    # A value that is no number must show in the loss.
    is_best = (values == best[slot_positions]) | values.isnan()
    slots = torch.arange(values.numel(), device=values.device)
    winner = torch.full((num_positions,), values.numel(), device=values.device)
    return winner.scatter_reduce_(0, slot_positions[is_best], slots[is_best], "amin")


def candidate_loss(margin: Tensor) -> Tensor:
    """``log(1 + exp(margin))``, margin the log-sum-exp of the candidates less the target logit.

    The target is no candidate, so nothing is subtracted from 1: the gradient of a row that is
    nearly sure is as precise as any other.

    >>> candidate_loss(torch.tensor([0.0, -torch.inf]))
    tensor([0.6931, 0.0000])
    """
    return F.softplus(margin)
