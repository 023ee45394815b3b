"""Metrics of an export on the users of any prepared folder, also of one that is newer."""

from pathlib import Path

import torch
from torch import Tensor

from shardrec.kernels.shard import RowShard
from shardrec.pipeline.model.config import MeasureConfig
from shardrec.pipeline.model.measure import Split, measure
from shardrec.pipeline.prepared.folder import Prepared
from shardrec.pipeline.prepared.loader import EvaluationBatches
from shardrec.pipeline.serve import Recommender

__all__ = ["measure_export"]

NEVER = -1e30  # added to the score of an item that the export does not know


def measure_export(
    folder: Path, prepared: Prepared, config: MeasureConfig, split: Split
) -> dict[str, float]:
    """The metrics that ``measure`` gives the exported model.

    Items are matched by the log's own ids. Those that the export does not know are skipped in
    histories and stand behind all others, so that targets among them are missed, as they are when
    the export serves these users. Those that only the export knows are no candidates here.

    Args:
        folder: an export.
        prepared: whose users are ranked.
        config: list lengths and the seen filter.
        split: which users.

    Raises:
        FileNotFoundError, ValueError: the export is not whole, or its ids are of another kind.

    Collectives: none; the vectors must fit into this process.
    """
    exported = _Exported(Recommender.open(folder, min_count=0), prepared)
    batches = EvaluationBatches(
        prepared,
        split,
        batch_size=config.batch_size,
        max_length=exported.model.manifest["max_length"],
    )
    return measure(exported.states, exported.shard(), batches, config, prepared)


class _Exported:
    """An export in the item indices of a prepared folder.

    States and rows have one column more than the vectors: 1 in every state, and in the rows 0, or
    ``NEVER`` for an item that the export does not know.
    """

    def __init__(self, model: Recommender, prepared: Prepared) -> None:
        self.model = model
        self.rows = model.ids.items(prepared.item_ids())  # (V,) rows of the export, or -1

    def shard(self) -> RowShard:
        """The (V, D + 1) rows that states are scored against."""
        is_known = self.rows >= 0
        scored = self.model.scored
        rows = torch.full((len(self.rows), scored.shape[1] + 1), NEVER)
        rows[:, :-1] = 0
        rows[is_known, :-1] = scored[self.rows[is_known]]
        rows[is_known, -1] = 0
        return RowShard(rows, 0, len(rows), None)

    def states(self, items: Tensor, lengths: Tensor) -> Tensor:
        """(B, D + 1) states after the last known item; zeros and a 1 where none is known.

        Args:
            items: (B, L) int64, right padded.
            lengths: (B,) int64 in [1, L].
        """
        rows = self.rows[items]
        is_real = torch.arange(items.shape[1]) < lengths[:, None]
        histories = [row[kept] for row, kept in zip(rows, is_real & (rows >= 0), strict=True)]
        known = [index for index, history in enumerate(histories) if len(history)]
        states = torch.zeros(len(items), self.model.scored.shape[1] + 1)
        states[:, -1] = 1
        if known:
            states[known, :-1] = self.model.states([histories[index] for index in known])
        return states
