"""Warm start of the attribute vectors: they are matched by the meaning of their codes.

The run folder stores the meaning of each code of the earlier run, so the prepared folder that it
was trained on is not needed. The meaning of a bucket of numbers is its two borders, which
``prepare --items`` keeps.
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
    """Which attribute vectors are taken from an earlier run.

    Attributes:
        sources: for each parameter, by name, (n,) int64 row in the earlier run of each of its rows;
            -1 for a new row.
        num_former: for each parameter, by name, its number of rows in the earlier run.
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
        """Raise ValueError if the checkpoint's vectors do not match its run folder."""
        found = {name: value.shape[0] for name, value in state.attributes.items()}
        if found != dict(self.num_former):
            raise ValueError(
                f"the checkpoint must have vectors for {dict(self.num_former)} as its run folder "
                f"says, got {found}; the run folder is damaged"
            )

    @torch.no_grad()
    def load(self, vectors: nn.Module, state: CheckpointState) -> None:
        """Copy the matched vectors of the earlier run into ``vectors``."""
        for name, parameter in vectors.named_parameters():
            parameter.copy_(self._moved(name, state.attributes[name], parameter))

    def memory(
        self, state: CheckpointState, vectors: nn.Module, first: int
    ) -> dict[int, dict[str, Any]]:
        """The optimizer's state of the vectors, by parameter index, with zeros for new rows.

        Args:
            state: checkpoint of the earlier run.
            vectors: the attribute vectors of this run.
            first: index of their first parameter in the optimizer.
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
        """JSON: how many values were matched, and how many are new."""
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
