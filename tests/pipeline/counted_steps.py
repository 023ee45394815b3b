"""Count the steps that an encoder trains; it is called several times in each, group by group."""

import torch


class CountedSteps:
    """The number of different training steps that ``count`` was called in."""

    def __init__(self) -> None:
        self._seeds: set[int] = set()

    def count(self, *, training: bool) -> int:
        """The steps so far; each one seeds torch's generator with a seed of its own."""
        if training:
            self._seeds.add(torch.initial_seed())
        return len(self._seeds)
