"""What losses choose by comparing floats, recorded where it is chosen, and how certain it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tests.loss_entry import Choice as Rule
from tests.loss_entry import Compared
from tests.losses import LOSSES
from torch import Tensor

from shardrec.kernels.loss.candidates import Candidates
from shardrec.kernels.loss.inputs import Inputs
from shardrec.kernels.select.coarse import coarse

RULES: dict[type[Candidates], Rule] = {
    loss.choice.rule: loss.choice for loss in LOSSES.values() if loss.choice is not None
}


@dataclass
class Choice:
    """One choice of one rank.

    Attributes:
        rule: how it was made.
        states: (N, D) that were compared on this rank.
        rows: (R, D) that were compared on this rank.
        chosen: what came out.
    """

    rule: Candidates
    states: Tensor
    rows: Tensor
    chosen: tuple[Tensor, ...]


@contextmanager
def recorded_choices() -> Iterator[list[Choice]]:
    """Every choice that is made inside the ``with``, in order."""
    choices = list[Choice]()
    with pytest.MonkeyPatch.context() as patch:
        for rule in RULES:
            patch.setattr(rule, "choose", _recording(rule.choose, choices))
        yield choices


def _recording(choose: Any, choices: list[Choice]) -> Any:
    def record(rule: Any, inputs: Inputs) -> tuple[Tensor, ...]:
        chosen: tuple[Tensor, ...] = choose(rule, inputs)
        states, rows = inputs.states.detach().clone(), inputs.scaled_rows().detach().clone()
        choices.append(Choice(rule, states, rows, tuple(part.clone() for part in chosen)))
        return chosen

    return record


def of_all_ranks(choices: list[Choice]) -> Choice:
    """One choice of all ranks, as one process would have made it."""
    rule, chosen = choices[0].rule, list(choices[0].chosen)
    for index, is_own in enumerate(RULES[type(rule)].is_own):
        parts = [choice.chosen[index] for choice in choices]
        if is_own:
            chosen[index] = torch.cat(parts)
        else:
            assert all(torch.equal(part, parts[0]) for part in parts)
    states, rows = (torch.cat([getattr(c, name) for c in choices]) for name in ("states", "rows"))
    return Choice(rule, states, rows, tuple(chosen))


def scores(choice: Choice) -> list[Compared]:
    """The float64 scores behind a choice."""
    compared = RULES[type(choice.rule)].compared
    return compared(choice.rule, choice.states.double(), choice.rows.double())


def is_certain(choice: Choice, apart: list[float]) -> bool:
    """Whether the choice stays the same when no two scores of a line move apart by more than this.

    It does if it does in the worst case: what was chosen falls, and all the rest rises.

    Args:
        choice: of all ranks.
        apart: for each of its ``scores``.
    """
    for one, most in zip(scores(choice), apart, strict=True):
        best = _best(one.scores, one)
        worst = one.scores + torch.where(best, -most / 2, most / 2)
        if not torch.equal(_best(worst, one), best):
            return False
    return True


def _best(lines: Tensor, compared: Compared) -> Tensor:
    """What is chosen from each line of scores, as bool of the same shape."""
    values = coarse(lines.float()) if compared.is_coarse else lines.float()
    order = values.sort(dim=1, descending=True, stable=True).indices[:, : compared.size]
    return torch.zeros_like(lines, dtype=torch.bool).scatter_(1, order, True)


def largest_differences(one: Choice, other: Choice) -> list[float]:
    """By how much any score of two choices differs, for each of their ``scores``."""
    pairs = zip(scores(one), scores(other), strict=True)
    return [float((a.scores - b.scores).abs().max()) for a, b in pairs]


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
