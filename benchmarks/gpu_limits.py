"""Lower bound on the time of a loss on a GPU: counted FLOP and bytes over the card's rates.

A stage takes no less than its products at the rate of the matrix units and no less than its traffic
at that of the memory; stages that need each other's results follow one another. A logit costs 2 D
FLOP in forward; each of the two gradients as many, and as many again where no logits are kept.
"""

from dataclasses import dataclass

from shardrec.kernels.buckets import default_num_buckets as num_sce_buckets
from shardrec.kernels.ranks.traffic import Workload
from shardrec.kernels.rece import default_num_buckets

__all__ = ["H200", "Options", "Rates", "limit_ms"]

_FORWARD, _BACKWARD = 2, 6

Stages = list[tuple[float, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Peak rates of a card.

    Attributes:
        tflops: 1e12 FLOP/s of a matrix product.
        tbps: 1e12 bytes/s of its memory.
    """

    tflops: float
    tbps: float

    def ms(self, flops: float, num_bytes: float) -> float:
        """Milliseconds of a stage: the slower of its products and its traffic."""
        return max(flops / self.tflops, num_bytes / self.tbps) / 1e9


# bfloat16 and float16 as large products and copies were measured on such a card; float32 from the
# vendor's data sheet, without the matrix units, as IEEE products are made.
H200 = {
    "bfloat16": Rates(tflops=790, tbps=4.3),
    "float16": Rates(tflops=790, tbps=4.3),
    "float32": Rates(tflops=67, tbps=4.3),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Options of the losses.

    Attributes:
        num_negatives: K.
        share: Positions that share their draws.
        items_per_bucket: b_y.
        rounds: r.
        reach: e.
    """

    num_negatives: int
    share: int
    items_per_bucket: int
    rounds: int
    reach: int


def limit_ms(loss: str, work: Workload, options: Options, rates: Rates) -> float:
    """Least milliseconds of forward and backward; the zeros of a dense gradient do not count.

    >>> work = Workload(num_positions=131072, num_items=10**6, num_ranks=1, width=256,
    ...                 element_bytes=2, on_cpu=False)
    >>> options = Options(num_negatives=1024, share=128, items_per_bucket=256, rounds=8, reach=1)
    >>> [round(limit_ms(loss, work, options, H200["bfloat16"]), 2) for loss in STAGES]
    [339.79, 0.55, 0.74, 13.88]
    """
    return sum(rates.ms(*stage) for stage in STAGES[loss](work, options))


def _cce(work: Workload, options: Options) -> Stages:
    """One product of all positions and rows, each read twice, each gradient written once."""
    pairs = float(work.num_positions) * work.num_items
    vectors = 3 * _vectors(work, work.num_positions + work.num_items)
    return [((_FORWARD + _BACKWARD) * pairs * work.width, vectors)]


def _cce_minus(work: Workload, options: Options) -> Stages:
    """Blocks of positions and the rows that they draw."""
    blocks = -(-work.num_positions // options.share)
    pairs = float(work.num_positions) * options.num_negatives
    return [_listed(pairs, pairs, blocks * options.num_negatives, work)]


def _sce(work: Workload, options: Options) -> Stages:
    """Centres, the best positions and rows of each, and buckets; backward is of one bucket each."""
    N, n_b = work.num_positions, num_sce_buckets(work.num_positions)
    listed = n_b * options.items_per_bucket
    choices = [_products(n_b, of, work) for of in (N, N, work.num_items)]
    return [*choices, _listed(listed * n_b, N * options.items_per_bucket, listed, work)]


def _rece(work: Workload, options: Options) -> Stages:
    """Hashes of positions and rows, then every position and the chunks of rows near its own.

    Neighbouring chunks share rows, which are read once a round.
    """
    n_b = default_num_buckets(work.num_positions, work.num_items, options.reach)
    near = (1 + 2 * options.reach) * work.num_items / n_b
    pairs = options.rounds * work.num_positions * near
    hashes = [
        _products(options.rounds * n_b, of, work) for of in (work.num_positions, work.num_items)
    ]
    return [*hashes, _listed(pairs, pairs, options.rounds * work.num_items, work)]


STAGES = {"cce": _cce, "cce_minus": _cce_minus, "sce": _sce, "rece": _rece}


def _products(directions: int, vectors: int, work: Workload) -> tuple[float, float]:
    """FLOP and bytes of a projection that keeps only the top k."""
    return 2.0 * directions * vectors * work.width, _vectors(work, vectors)


def _listed(
    pairs: float, backward_pairs: float, rows: float, work: Workload
) -> tuple[float, float]:
    """FLOP and bytes of blocks that list so many rows: each read twice, its gradient added up."""
    flops = (_FORWARD * pairs + _BACKWARD * backward_pairs) * work.width
    return flops, 4 * _vectors(work, rows) + 3 * _vectors(work, work.num_positions)


def _vectors(work: Workload, count: float) -> float:
    """Bytes of so many states or rows."""
    return count * work.width * work.element_bytes
