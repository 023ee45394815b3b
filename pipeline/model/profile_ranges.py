"""Named profiler ranges for the parts of a training step."""

from typing import Literal

from torch.profiler import record_function

__all__ = ["PART", "Part", "part"]

# The prefix of the names.
PART = "step/"
Part = Literal[
    "look-up",
    "encoder",
    "loss",
    "next ids",
    "loss backward",
    "encoder backward",
    "gradients over ranks",
    "update",
]


def part(name: Part) -> record_function:
    """Context manager: a range that the profiler, if one is running, records by this name."""
    return record_function(PART + name)
