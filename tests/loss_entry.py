"""The entry of a loss in ``tests/losses.py``: everything that tests need to know of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shardrec.kernels.loss.candidates import Candidates
from shardrec.kernels.negatives import InBatch, Mixture, Popularity, Uniform
from shardrec.modules.losses import Loss

Options = dict[str, Any]
# Takes states, rows, targets and the options of a loss; gives (N,) losses and the covered mask.
Definition = Callable[..., tuple[Tensor, Tensor]]
# Arguments, the error that they raise, and a regular expression for its message.
Refusal = tuple[Options, type[Exception], str]

DRAWN: Options = {"seed": 3, "step": 2}
# N, V and D at which peak memory is measured.
LARGE = (2048, 60_000, 64)


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """Bounds and options of a measurement of peak memory at the sizes ``LARGE``.

    Attributes:
        stored: number of floats that the shortest implementation of the loss would store.
        options: options of the function and of its class of options.
        reduction: with "none" the gradient is not computed in forward.
    """

    stored: int
    options: Options = field(default_factory=dict)
    reduction: str = "mean"


@dataclass(frozen=True)
class Compared:
    """Scores that a loss compares to choose candidates.

    Attributes:
        scores: (lines, candidates) float64.
        size: number of candidates chosen from each line.
        is_coarse: whether they are compared at coarse precision.
    """

    scores: Tensor
    size: int
    is_coarse: bool


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How a loss chooses candidates by comparing scores, which rounding could change.

    Attributes:
        rule: the ``Candidates`` class of the loss.
        compared: maps an instance of it and all states and rows in float64 to the scores compared.
        is_own: for each result of ``choose``, True if a rank holds only its own part.
    """

    rule: type[Candidates]
    compared: Callable[[Any, Tensor, Tensor], list[Compared]]
    is_own: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One loss, as tests see it.

    Attributes:
        function: the public function.
        config: the class of its options for training.
        definition: the loss in float64, with the same ``options``.
        options: small options, for batches of 20 to 60 positions and 60 to 300 items.
        variants: other options, by name.
        config_variants: options that only ``config`` has, by name.
        has_draws: the function takes a seed and a step.
        has_sparse_grad: the function can give a sparse gradient of the table.
        has_covered: ``reduction="none"`` returns the mask of covered positions too.
        is_operator: the function is a custom operator of PyTorch with a choice of backends.
        padding: share of the products by which padding may exceed the cost model.
        choice: how it chooses candidates by comparing scores; None if it does not.
        in_forward: computes the gradient of a mean or sum in forward, in float32 on one CPU.
        refused: arguments of its own that are wrong for 2 positions and a table of 30 rows.
        refused_options: wrong values of its own options for training.
        workspaces: measurements of its peak memory, by name.
    """

    function: Callable[..., Any]
    config: type[Loss]
    definition: Definition
    options: Options = field(default_factory=dict)
    variants: dict[str, Options] = field(default_factory=dict)
    config_variants: dict[str, Options] = field(default_factory=dict)
    has_draws: bool = True
    has_sparse_grad: bool = False
    has_covered: bool = False
    is_operator: bool = True
    padding: float = 0.001
    choice: Choice | None = None
    in_forward: bool = False
    refused: Sequence[Refusal] = ()
    refused_options: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    workspaces: Mapping[str, Workspace] = field(default_factory=dict)

    @property
    def chooses(self) -> bool:
        """Whether it compares scores to choose candidates."""
        return self.choice is not None

    def shared_variants(self) -> dict[str, Options]:
        """Options that both the function and ``config`` have, by name."""
        cosine = self.options | {"normalize": True, "temperature": 0.2}
        return {"": self.options, "cosine": cosine, **self.variants}

    def function_variants(self) -> dict[str, Options]:
        """Options of the function, by name."""
        sparse = {"sparse": self.options | {"sparse_grad": True}} if self.has_sparse_grad else {}
        return self.shared_variants() | sparse


# Proposals over another number of items than 30.
OTHER_CATALOGS = (
    Uniform(31),
    Popularity(torch.ones(29).long()),
    InBatch(torch.tensor([0]), torch.ones(31).long()),
    Mixture([(Uniform(30), 2), (Uniform(31), 1)]),
)

# PyTorch's custom operators raise RuntimeError for anything but a 64-bit integer.
REFUSED_DRAWS: list[Refusal] = [
    *[({"seed": value}, RuntimeError, "for argument 'seed'") for value in (1.5, None, 2**63)],
    ({"step": 0.5}, RuntimeError, "for argument 'step'"),
]


def each(
    names: str, values: Sequence[Any], message: str, error: type[Exception] = ValueError
) -> list[Refusal]:
    """Refusals of every value of every argument in ``names``, with one message."""
    return [({name: value}, error, message) for name in names.split() for value in values]
