"""What sce and rece choose by comparing floats, seen where they choose it, and by which margin."""

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
from shardrec.kernels.rece import HashedChunks
from shardrec.kernels.sce import HardBuckets


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
        hashes = range(STREAM_HASH, STREAM_HASH + rule.num_rounds)
        return [vectors @ _signs(rule, rule.num_buckets, width, hash).T for hash in hashes]
    centres = _signs(rule, len(states), rule.num_buckets, STREAM_MIX).T @ states
    return [centres @ states.T, centres @ rows.T]


def _signs(
    rule: HardBuckets | HashedChunks, lines: int | None, width: int | None, stream: int
) -> Tensor:
    assert lines is not None and width is not None
    signs = random_signs(0, lines, width, seed=rule.seed, step=rule.step, stream=stream)
    return signs.double()


def smallest_margin(choice: Choice) -> float:
    """By how much the last score that was chosen is above the first one that was not."""
    rule, margins = choice.rule, list[Tensor]()
    if isinstance(rule, HashedChunks):
        sizes = [1] * rule.num_rounds
    else:
        assert rule.positions_per_bucket is not None
        sizes = [rule.positions_per_bucket, rule.items_per_bucket]
    for lines, size in zip(scores(choice), sizes, strict=True):
        best = lines.topk(size + 1).values
        margins.append(best[:, size - 1] - best[:, size])
    return float(torch.cat(margins).min())


def largest_difference(one: Choice, other: Choice) -> float:
    """By how much any score of two choices differs."""
    pairs = zip(scores(one), scores(other), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)
