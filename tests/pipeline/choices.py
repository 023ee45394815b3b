"""What sce and rece choose by comparing floats, seen where it is chosen, and how certain it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from shardrec.kernels.loss.inputs import Inputs
from shardrec.kernels.negatives import STREAM_HASH, STREAM_MIX, random_signs
from shardrec.kernels.rece import HashedChunks, default_num_buckets
from shardrec.kernels.sce import HardBuckets
from shardrec.kernels.select.coarse import coarse


@dataclass
class Choice:
    """One choice of one rank.

    Attributes:
        rule: how it was made.
        states: (N, D) that were compared on this rank.
        rows: (R, D) that were compared on this rank.
        chosen: what came out.
    """

    rule: HardBuckets | HashedChunks
    states: Tensor
    rows: Tensor
    chosen: tuple[Tensor, ...]


@contextmanager
def recorded_choices() -> Iterator[list[Choice]]:
    """Every choice that is made inside the ``with``, in order."""
    choices = list[Choice]()
    with pytest.MonkeyPatch.context() as patch:
        for kind in (HardBuckets, HashedChunks):
            patch.setattr(kind, "choose", _recording(kind.choose, choices))
        yield choices


def _recording(choose: Any, choices: list[Choice]) -> Any:
    def record(rule: Any, problem: Inputs) -> tuple[Tensor, ...]:
        chosen: tuple[Tensor, ...] = choose(rule, problem)
        states, rows = problem.states.detach().clone(), problem.scaled_rows().detach().clone()
        choices.append(Choice(rule, states, rows, tuple(part.clone() for part in chosen)))
        return chosen

    return record


def of_all_ranks(choices: list[Choice]) -> Choice:
    """One choice of all ranks, as one process would have made it."""
    first = choices[0]
    chosen = first.chosen
    if isinstance(first.rule, HashedChunks):  # each rank knows its own positions and rows
        parts = zip(*(choice.chosen for choice in choices), strict=True)
        chosen = tuple(torch.cat(part) for part in parts)
    else:
        for choice in choices:
            assert all(map(torch.equal, choice.chosen, chosen))
    states, rows = (torch.cat([getattr(c, name) for c in choices]) for name in ("states", "rows"))
    return Choice(first.rule, states, rows, chosen)


def scores(choice: Choice) -> list[Tensor]:
    """The float64 scores behind a choice: a line for each list from which the best are taken."""
    rule, states, rows = choice.rule, choice.states.double(), choice.rows.double()
    if isinstance(rule, HashedChunks):
        vectors, width = torch.cat([states, rows]), states.shape[1]
        num_buckets = rule.num_buckets or default_num_buckets(
            len(states), len(rows), rule.num_neighbor_chunks
        )
        hashes = range(STREAM_HASH, STREAM_HASH + rule.num_rounds)
        return [vectors @ _signs(rule, num_buckets, width, hash).T for hash in hashes]
    num_buckets = rule.sizes(len(states), len(rows))["B"]
    centres = _signs(rule, len(states), num_buckets, STREAM_MIX).T @ states
    return [centres @ states.T, centres @ rows.T]


def _signs(rule: HardBuckets | HashedChunks, lines: int, width: int, stream: int) -> Tensor:
    signs = random_signs(0, lines, width, seed=rule.seed, step=rule.step, stream=stream)
    return signs.double()


def is_certain(choice: Choice, apart: list[float]) -> bool:
    """Whether the choice stays the same when no two scores of a line move apart by more than this.

    It does if it does in the worst case: what was chosen falls, and all the rest rises.

    Args:
        choice: of all ranks.
        apart: for each of its ``scores``.
    """
    for lines, size, most in zip(scores(choice), _sizes(choice), apart, strict=True):
        best = _best(choice, lines, size)
        worst = lines + torch.where(best, -most / 2, most / 2)
        if not torch.equal(_best(choice, worst, size), best):
            return False
    return True


def _sizes(choice: Choice) -> list[int]:
    rule = choice.rule
    if isinstance(rule, HashedChunks):
        return [1] * rule.num_rounds
    sizes = rule.sizes(len(choice.states), len(choice.rows))
    return [sizes["P"] // sizes["B"], sizes["Y"]]


def _best(choice: Choice, lines: Tensor, size: int) -> Tensor:
    """What is chosen from each line of scores, as bool of the same shape."""
    compared = lines.float() if isinstance(choice.rule, HashedChunks) else coarse(lines.float())
    order = compared.sort(dim=1, descending=True, stable=True).indices[:, :size]
    return torch.zeros_like(lines, dtype=torch.bool).scatter_(1, order, True)


def largest_differences(one: Choice, other: Choice) -> list[float]:
    """By how much any score of two choices differs, for each of their ``scores``."""
    pairs = zip(scores(one), scores(other), strict=True)
    return [float((a - b).abs().max()) for a, b in pairs]


def assert_same_choices(
    found: list[list[Choice]], expected: list[Choice], *, times: float = 100, least: float = 1e-3
) -> None:
    """Every choice is the same, and certain: no score that moves far above rounding changes it.

    Args:
        found: of each rank, in order.
        expected: of one process alone.
        times: how far above what the scores of the ranks differ by.
        least: and how far at least.
    """
    assert [len(choices) for choices in found] == [len(expected)] * len(found)
    for *parts, alone in zip(*found, expected, strict=True):
        together = of_all_ranks(parts)
        moved = largest_differences(together, alone)
        assert is_certain(alone, [max(least, times * most) for most in moved]), moved
        flips = [int((a != b).sum()) for a, b in zip(together.chosen, alone.chosen, strict=True)]
        assert flips == [0] * len(alone.chosen)
