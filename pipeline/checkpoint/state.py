"""The training state that a checkpoint holds, and its conversion to tensors and JSON and back."""

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shardrec import __version__

__all__ = ["CheckpointState", "is_row_name", "join_state", "versions"]


def versions() -> dict[str, str]:
    """Versions of shardrec, torch and Python; results may round differently with others."""
    return {
        "shardrec": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointState:
    """The training state that a checkpoint holds, with one rank's rows of the table.

    Attributes:
        encoder: ``state_dict()`` of the encoder, equal on all ranks; like attributes and rows, an
            average over steps if the run asks for it.
        optimizer: ``state_dict()`` of the encoder's optimizer.
        table: ``state_dict()`` of the table shard: tensors with one row per table row, and numbers
            of shape (), among which ``first_row`` and ``num_rows`` say which rows these are.
        progress: counters, position in the data and best metric, to resume from, as JSON.
        config: the config of the run, as JSON.
        attributes: ``state_dict()`` of the attribute vectors, equal on all ranks; empty if the run
            has none.
        unaveraged: trained parameters of encoder and attributes, by their index, where those above
            are averages; empty otherwise. Those of the rows are in ``table``.
        written_by: versions of the software that wrote the checkpoint, by name.
    """

    encoder: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    table: Mapping[str, Tensor]
    progress: Mapping[str, Any]
    config: Mapping[str, Any]
    attributes: Mapping[str, Tensor] = field(default_factory=dict)
    unaveraged: Mapping[str, Tensor] = field(default_factory=dict)
    written_by: Mapping[str, str] = field(default_factory=versions)

    @property
    def rows(self) -> range:
        """The range of table rows that this state holds."""
        first = int(self.table["first_row"])
        count = next(value.shape[0] for value in self.table.values() if value.ndim)
        return range(first, first + count)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, including the table rows of other ranks."""
        whole, rows = self.tensors()
        of_row = sum(one.element_size() * one.shape[1:].numel() for one in rows.values())
        of_whole = sum(one.element_size() * one.numel() for one in whole.values())
        return of_whole + of_row * int(self.table["num_rows"])

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The replicated tensors, and those sharded by rows, by their names in the files.

        Raises:
            TypeError: the encoder's or the optimizer's state holds something other than tensors.
        """
        whole = {f"encoder.{name}": value for name, value in self.encoder.items()}
        whole |= {f"attributes.{name}": value for name, value in self.attributes.items()}
        whole |= {f"unaveraged.{name}": value for name, value in self.unaveraged.items()}
        for index, memory in self.optimizer["state"].items():
            whole |= {f"optimizer.{index}.{name}": value for name, value in memory.items()}
        for name, value in whole.items():
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"{name} must be a tensor to be saved, got {type(value).__name__}; "
                    "register it as a buffer"
                )
        return whole, {f"table.{name}": one for name, one in self.table.items() if one.ndim}

    def copied(self, copy: Callable[[str, Tensor], Tensor]) -> "CheckpointState":
        """A state in which each tensor is replaced by ``copy(name, tensor)``."""
        whole, rows = self.tensors()
        tensors = {name: copy(name, one) for name, one in (whole | rows).items()}
        return join_state(tensors, self.numbers(), self.rows.start)

    def numbers(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON."""
        table = {name: value.item() for name, value in self.table.items() if not value.ndim}
        return {
            "progress": dict(self.progress),
            "config": dict(self.config),
            "optimizer": self.optimizer["param_groups"],
            "table": {name: value for name, value in table.items() if name != "first_row"},
            "versions": dict(self.written_by),
        }


def join_state(
    tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], first: int
) -> CheckpointState:
    """The state with these ``CheckpointState.tensors`` and ``numbers``."""
    whole: dict[str, dict[str, Tensor]] = {"encoder": {}, "attributes": {}, "unaveraged": {}}
    table = dict[str, Tensor]()
    memory = dict[int, dict[str, Tensor]]()
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        if part in whole:
            whole[part][rest] = value
        elif part == "optimizer":
            index, _, key = rest.partition(".")
            memory.setdefault(int(index), {})[key] = value
        else:
            table[rest] = value
    for name, number in {**numbers["table"], "first_row": first}.items():
        dtype = torch.int64 if isinstance(number, int) else torch.float64
        table[name] = torch.tensor(number, dtype=dtype)
    return CheckpointState(
        **whole,
        optimizer={"state": memory, "param_groups": numbers["optimizer"]},
        table=table,
        progress=numbers["progress"],
        config=numbers["config"],
        written_by=numbers["versions"],
    )


def is_row_name(name: str) -> bool:
    """Whether a tensor is sharded by rows over the ranks."""
    return name.startswith("table.")
