"""A Lightning callback that records when each training step ended; for peers.py."""

import time
from collections.abc import Callable
from typing import Any

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:
    from pytorch_lightning.callbacks import Callback

__all__ = ["Clock"]


class Clock(Callback):
    """Records the end time, loss and number of real targets of each step.

    Args:
        count_targets: Number of real targets of a batch.
    """

    def __init__(self, count_targets: Callable[[Any], int]) -> None:
        """Starts empty."""
        self._count_targets = count_targets
        self._ends: list[float] = []
        self._losses: list[float] = []
        self._targets: list[int] = []

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        """Notes a step; the optimizer has made its update."""
        self._ends.append(time.perf_counter())
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        self._losses.append(float(loss))
        self._targets.append(self._count_targets(batch))

    def answer(self, warmup: int) -> dict[str, Any]:
        """The answer to peers.py: statistics of the steps after the first ``warmup``."""
        times = [after - before for before, after in zip(self._ends, self._ends[1:], strict=False)]
        return {
            "times_s": times[warmup - 1 :],
            "targets_per_step": sum(self._targets) / len(self._targets),
            "loss_first": self._losses[0],
            "loss_last": self._losses[-1],
        }
