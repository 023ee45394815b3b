"""Warm start of the vectors of attributes: each value finds its own vector by what it means.

The run folder says what each code of the earlier run means, so the folder that it was trained on is
not needed. A bucket of numbers means its two borders: ``prepare --items`` keeps them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shardrec.pipeline.checkpoint.store import CheckpointState
from shardrec.pipeline.prepared.attribute_rows import labels
from shardrec.pipeline.prepared.attributes import read_columns
from shardrec.pipeline.prepared.folder import Prepared

__all__ = ["CarriedAttributes"]


@dataclass(frozen=True, slots=True)
class CarriedAttributes:
    """Which vectors of attributes an earlier run has learned.

    Attributes:
        sources: for each parameter by name, (n,) int64 rows of the earlier run, -1 for new ones.
        num_former: for each parameter, its rows in the earlier run.
    """

    sources: Mapping[str, Tensor]
    num_former: Mapping[str, int]

    @classmethod
    def find(cls, run: Path, prepared: Prepared) -> "CarriedAttributes":
        """Match the attributes of ``prepared`` with those that ``run`` was trained on.

        Raises:
            FileNotFoundError, ValueError: a file is missing or damaged.
        """
        former, ours = labels(read_columns(run)), labels(read_columns(prepared.path))
        names = ("values", "projection")
        return cls(
            {name: _places(*pair) for name, *pair in zip(names, ours, former, strict=True)},
            {name: len(found) for name, found in zip(names, former, strict=True)},
        )

    def check(self, state: CheckpointState) -> None:
        """Raise ValueError if the checkpoint has other vectors than its run folder names."""
        found = {name: value.shape[0] for name, value in state.attributes.items()}
        if found != dict(self.num_former):
            raise ValueError(
                f"the checkpoint must have vectors for {dict(self.num_former)} as its run folder "
                f"says, got {found}; the run folder is damaged"
            )

    @torch.no_grad()
    def load(self, vectors: nn.Module, state: CheckpointState) -> None:
        """Copy the vectors that were carried over."""
        for name, parameter in vectors.named_parameters():
            parameter.copy_(self._moved(name, state.attributes[name], parameter))

    def memory(
        self, state: CheckpointState, vectors: nn.Module, first: int
    ) -> dict[int, dict[str, Any]]:
        """The state of the optimizer, with that of the vectors moved and zeros for new ones.

        Args:
            state: of the earlier run.
            vectors: of this run.
            first: the optimizer's index of their first parameter.
        """
        moved: dict[int, dict[str, Any]] = dict(state.optimizer["state"])
        for index, (name, parameter) in enumerate(vectors.named_parameters(), first):
            zeros = torch.zeros_like(parameter)
            moved[index] = {
                key: self._moved(name, value, zeros) if value.ndim else value
                for key, value in moved.get(index, {}).items()
            }
        return {index: memory for index, memory in moved.items() if memory}

    @property
    def counts(self) -> dict[str, int]:
        """JSON: how many values were carried over, and how many are new."""
        carried = int((self.sources["values"] >= 0).sum())
        total = self.sources["values"].numel()
        return {"attribute_values_carried_over": carried, "attribute_values_new": total - carried}

    def _moved(self, name: str, former: Tensor, otherwise: Tensor) -> Tensor:
        result, source = otherwise.detach().clone(), self.sources[name]
        known = source >= 0
        result[known.to(result.device)] = former[source[known]].to(result)
        return result


def _places(ours: Sequence[str], former: Sequence[str]) -> Tensor:
    """(n,) int64 place of each of our labels among the former ones; -1 for a new one."""
    known = {label: place for place, label in enumerate(former)}
    return torch.tensor([known.get(label, -1) for label in ours], dtype=torch.int64)
