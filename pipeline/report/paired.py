"""Compare runs pairwise on the same users: is their difference more than noise?"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from shardrec.pipeline.outputs.files import sha256
from shardrec.pipeline.report.records import RunRecord

__all__ = ["compare_pairs", "paired"]

_LEAST_ERRORS = 2.0  # standard errors from zero; noise alone is farther in 5 of 100 comparisons


def compare_pairs(records: Sequence[RunRecord], k: int) -> list[str]:
    """For each run except the best by NDCG@k, a sentence on its distance, and if that is noise.

    Runs that were not evaluated, or without a file of their targets' ranks, are left out.
    """
    values = {record.name: found for record in records if (found := _ndcg_of_users(record, k))}
    if len(values) < 2 or len({users for users, _ in values.values()}) > 1:
        return []
    means = {name: float(found.mean()) for name, (_, found) in values.items()}
    best = max(means, key=means.__getitem__)
    return [
        _sentence(f"NDCG@{k}", best, name, values[best][1] - found)
        for name, (_, found) in values.items()
        if name != best
    ]


def paired(differences: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Mean of the (U,) differences of the users and its standard error; NaN for one user.

    >>> mean, error = paired(np.array([1.0, 0.0, 0.0, 0.0, 0.0]))
    >>> round(mean, 6), round(error, 6)
    (0.2, 0.2)
    """
    count = len(differences)
    error = float(differences.std(ddof=1)) / math.sqrt(count) if count > 1 else math.nan
    return float(differences.mean()), error


def _sentence(metric: str, best: str, other: str, differences: npt.NDArray[np.float64]) -> str:
    mean, error = paired(differences)
    verdict = (
        "more than noise" if mean > _LEAST_ERRORS * error else "no more than noise: call them equal"
    )
    return (
        f"{metric} of {best} is {mean:.4f} ± {error:.4f} above that of {other} on the same "
        f"{len(differences):,} users: {verdict} (paired, {_LEAST_ERRORS:g} standard errors)."
    )


def _ndcg_of_users(
    record: RunRecord, k: int
) -> tuple[tuple[str, ...], npt.NDArray[np.float64]] | None:
    """What the users are, and (U,) their NDCG@k; None if the ranks of their targets are not there.

    Raises:
        ValueError: the file of ranks is not the one that was evaluated.
    """
    evaluation = record.evaluation
    if evaluation is None or record.folder is None or "users" not in evaluation:
        return None
    path = record.folder / evaluation["users"]["file"]
    if not path.is_file() or k > max(evaluation["request"]["ks"]):
        return None
    if sha256(path) != evaluation["users"]["sha256"]:
        raise ValueError(
            f"{path} must belong to the metrics.json next to it, got other ranks; evaluate again"
        )
    import torch  # imported late, as a report of one run needs neither

    from shardrec.modules.metrics import NDCG

    lists = pq.read_table(path).column("ranks").combine_chunks()
    lengths = torch.from_numpy(np.diff(lists.offsets.to_numpy()).astype(np.int64))
    ranks = torch.from_numpy(lists.values.to_numpy().astype(np.int64))
    values = NDCG(k).per_user(ranks.where(ranks >= 0, k), lengths)
    protocol = evaluation["protocol"]
    compared = ("data_fingerprint", "split", "users", "candidates", "seen_items", "ties")
    return tuple(str(protocol.get(name)) for name in compared), values.numpy()
