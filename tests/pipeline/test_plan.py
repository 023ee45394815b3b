"""Plans: within 15 % of the peaks that this machine measures, and sums that can be checked."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.pipeline.peak_memory import peak_bytes
from tests.ranks import Ranks

from shardrec.kernels.ranks.traffic import Workload
from shardrec.launch.cli import main
from shardrec.modules.losses import LOSSES
from shardrec.pipeline.checkpoint.pinned import PINNED_BYTES
from shardrec.pipeline.config import override
from shardrec.pipeline.plan import AttributeCounts, Machine, Plan, plan
from shardrec.pipeline.recipes import large_catalog, tiny_cpu
from shardrec.pipeline.run.config import TrainConfig

MIB = 1 << 20
# glibc raises the size from which a block goes back to the system to that of blocks freed before,
# and keeps what is smaller: what a process holds would depend on its past. Here the size is fixed.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "1000000"}


@dataclass(frozen=True)
class Case:
    """A run whose peak is measured.

    Attributes:
        batch: sequences of all ranks together, and their length.
        options: what differs from ``tiny_cpu``, besides sizes.
        is_saved: whether a checkpoint is written in the background where the peak is measured.
    """

    num_items: int
    batch: tuple[int, int]
    options: str
    num_ranks: int = 1
    is_saved: bool = False

    def config(self) -> TrainConfig:
        return override(tiny_cpu("none", "none"), self.overrides())

    def overrides(self) -> list[str]:
        sequences, length = self.batch
        shape = [f"batches.batch_size={sequences}", f"encoder.max_length={length}"]
        written = f"checkpoints.background={self.is_saved}".lower()
        return ["encoder.width=64", written, *shape, *self.options.split()]


POPULARITY = "loss=cce_minus loss.proposal=popularity loss.num_negatives=256"
CASES = {
    "fused-softmax": Case(30_000, (64, 20), "loss=cce"),
    "streamed-softmax": Case(400_000, (16, 20), "loss=cce"),
    "sampled-adam": Case(300_000, (256, 20), "loss=cce_minus catalog.optimizer=adam"),
    "sampled-popularity": Case(1_500_000, (64, 20), POPULARITY),
    "sampled-rowwise": Case(600_000, (256, 40), "loss=cce_minus"),
    "buckets-sparse-adam": Case(300_000, (128, 20), "loss=sce catalog.optimizer=sparse_adam"),
    "hashes-sgd": Case(150_000, (16, 20), "loss=rece catalog.optimizer=sgd"),
    "stored-logits": Case(20_000, (64, 20), "loss=eager_ce"),
    "stored-negatives": Case(20_000, (64, 20), "loss=gbce loss.num_negatives=64"),
    "sasrec": Case(2_000, (768, 50), "loss=cce_minus loss.num_negatives=64"),
    "modern": Case(2_000, (512, 50), "loss=cce_minus loss.num_negatives=64 encoder.kind=modern"),
    "checkpoint": Case(300_000, (128, 20), "loss=cce_minus catalog.optimizer=adam", 1, True),
    "attributes": Case(300_000, (128, 20), "loss=cce_minus catalog.attributes=add"),
    "attributes-alone": Case(400_000, (16, 20), "loss=cce catalog.attributes=only"),
    "two-ranks-attributes": Case(600_000, (64, 20), "loss=cce_minus catalog.attributes=add", 2),
    "two-ranks-streamed": Case(400_000, (8, 20), "loss=cce", 2),
    "two-ranks-sampled": Case(600_000, (512, 40), "loss=cce_minus", 2),
    "two-ranks-buckets": Case(400_000, (64, 20), "loss=sce", 2),
    "two-ranks-hashes": Case(200_000, (16, 20), "loss=rece", 2),
    "bfloat16-softmax": Case(400_000, (16, 20), "loss=cce precision=bfloat16"),
    "bfloat16-buckets": Case(300_000, (128, 20), "loss=sce precision=bfloat16"),
    "two-ranks-checkpoint": Case(600_000, (256, 20), "loss=cce_minus", 2, True),
}


# Those of peak_memory.py.
ATTRIBUTES = AttributeCounts(attribute_values=1000, attribute_codes=6, attribute_numbers=32)


def without_libraries(config: TrainConfig, num_items: int, num_ranks: int = 1) -> Plan:
    attributes = None if config.catalog.attributes == "none" else ATTRIBUTES
    return plan(config, num_items, Machine(libraries_gb=0.0, ranks=num_ranks), attributes)


@pytest.fixture(scope="module")
def processes() -> Iterator[Ranks]:
    pool = Ranks(ENVIRONMENT)
    yield pool
    pool.close()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_the_plan_is_within_15_percent_of_the_measured_peak(
    case: Case, processes: Ranks, tmp_path: Path
) -> None:
    planned = without_libraries(case.config(), case.num_items, case.num_ranks).peak_bytes
    processes.stop()  # each case in fresh ones
    measured = max(
        processes(case.num_ranks).run(
            peak_bytes, case.overrides(), case.num_items, case.batch, str(tmp_path)
        )
    )
    assert planned == pytest.approx(measured, rel=0.15), (
        f"planned {planned / MIB:.0f} MiB, measured {measured / MIB:.0f} MiB"
    )


def test_terms_are_those_that_one_counts_by_hand() -> None:
    options = "encoder.width=64 catalog.optimizer=adam loss=cce checkpoints.background=false"
    config = override(tiny_cpu("none", "none"), options.split())
    planned = without_libraries(config, 1_000_000)
    assert planned.memory["table"] == 256_000_000
    assert planned.memory["optimizer state"] == 512_000_000
    assert planned.memory["gradient"] == 256_000_000
    assert planned.dominant == "optimizer state"
    assert planned.flops["loss"] == 8 * 32 * 16 * 1e6 * 64
    assert not any(planned.moved.values())
    halved = plan(config, 1_000_000, Machine(ranks=2, libraries_gb=0.0))
    assert halved.memory["table"] == 128_000_000
    assert halved.moved["states, twice"] == 2 * 4 * 32 * 16 * 64 / 2


def test_replicas_move_states_of_their_own_batches_and_sum_row_gradients() -> None:
    options = "encoder.width=64 catalog.optimizer=adam loss=cce optimizer.accumulate=4"
    config = override(tiny_cpu("none", "none"), options.split())
    shared, replicas, alone = (
        plan(override(config, [f"parallel.shards={shards}"]), 10**6, Machine(ranks=ranks))
        for shards, ranks in ((0, 8), (2, 8), (0, 2))
    )
    assert "4 replicas x 2 shards" in replicas.describe() and "1 replica x 8" in shared.describe()
    # All four batches over eight ranks, or one of them over two.
    batch = 2 * 4 * 32 * 16 * 64
    assert shared.moved["states, twice"] == 4 * batch * 7 / 8
    assert replicas.moved["states, twice"] == batch / 2
    assert replicas.moved["row gradients of replicas"] == 2 * 3 / 4 * 4 * 500_000 * 64
    assert "row gradients of replicas" not in shared.moved
    assert replicas.memory["table"] == alone.memory["table"] == 4 * shared.memory["table"]
    assert 4 * replicas.flops["encoder"] == alone.flops["encoder"]
    assert replicas.memory["checkpoint copy"] < alone.memory["checkpoint copy"] / 3


def test_replicas_send_sparse_row_gradients_as_pairs_or_as_the_shard() -> None:
    options = "encoder.width=64 loss=cce_minus optimizer.accumulate=2 parallel.shards=1"
    config = override(tiny_cpu("none", "none"), options.split())
    few, many = (plan(config, size, Machine(ranks=2)).moved for size in (10**7, 50))
    touched = few["row gradients of replicas"] / (8 + 4 * 64)
    assert 1_000 < touched < 100_000
    assert many["row gradients of replicas"] == 50 * (4 + 4 * 64)


def test_attributes_are_codes_of_the_shard_and_vectors_on_every_rank() -> None:
    options = "encoder.width=64 catalog.optimizer=adam checkpoints.background=false".split()
    plain = without_libraries(override(tiny_cpu("none", "none"), options), 1_000_000)
    for mode, rows, state in (("add", 256_000_000, 512_000_000), ("only", 0, 0)):
        config = override(tiny_cpu("none", "none"), [*options, f"catalog.attributes={mode}"])
        planned = without_libraries(config, 1_000_000, num_ranks=2)
        assert planned.memory["table"] == 128_000_000
        assert planned.memory["composed rows"] == rows / 2
        assert planned.memory["optimizer state"] == state / 2
        vectors = 1032 * 64 * 4
        assert planned.memory["attributes"] == 500_000 * (6 * 8 + 32 * 4 + 9) + 5 * vectors
        assert planned.moved["attribute gradients"] == 2 * vectors / 2
    assert "attributes" not in plain.memory


def test_attributes_and_their_use_go_together() -> None:
    config = tiny_cpu("none", "none")
    with pytest.raises(ValueError, match="attribute_values or attribute_numbers must be above 0"):
        plan(override(config, ["catalog.attributes=add"]), 1000, Machine())
    with pytest.raises(ValueError, match=r"got 1000 and 32 with catalog\.attributes=none"):
        plan(config, 1000, Machine(), ATTRIBUTES)
    with pytest.raises(ValueError, match="attribute_codes must be at least 0"):
        AttributeCounts(attribute_codes=-1)


@pytest.mark.parametrize("ranks", [1, 8])
def test_every_rank_holds_the_counts_of_the_whole_catalog_and_their_table(ranks: int) -> None:
    config = override(tiny_cpu("none", "none"), ["loss=cce_minus"])
    machine = Machine(ranks=ranks, libraries_gb=0.0)
    uniform = plan(config, 10_000_000, machine)
    popularity = plan(override(config, ["loss.proposal=popularity"]), 10_000_000, machine)
    assert uniform.memory["item counts"] == 80_000_000
    assert popularity.memory["item counts"] == 160_000_000
    assert popularity.peak_bytes == uniform.peak_bytes + 80_000_000


def test_what_travels_is_states_or_rows_whichever_is_fewer_bytes() -> None:
    config = override(
        tiny_cpu("none", "none"),
        ["encoder.width=64", "loss=cce_minus", "loss.num_negatives=100", "loss.share=0"],
    )
    by_rows = plan(config, 10**9, Machine(ranks=4, libraries_gb=0.0)).moved
    positions = 32 * 16
    # 100 rows for every rank, and its own targets; hardly any item is met twice in so large a V.
    vectors = 0.75 * (100 + positions / 4) * 64
    assert by_rows["candidates"] == pytest.approx(4 * vectors, rel=1e-3)
    assert by_rows["gradients of candidates"] == pytest.approx(4 * vectors, rel=1e-3)
    assert "states, twice" not in by_rows
    by_states = plan(
        override(config, ["loss.num_negatives=1000"]), 10**9, Machine(ranks=4, libraries_gb=0.0)
    ).moved
    assert by_states["states, twice"] == 2 * 4 * positions * 64 * 0.75
    assert by_states["gradients of states"] == 4 * positions * 64 * 0.75
    assert "candidates" not in by_states


def test_a_catalog_at_the_limit_fits_and_a_larger_one_does_not() -> None:
    config = large_catalog("none", "none")
    machine = Machine(ranks=8, memory_gb=80, device="cuda")
    largest = plan(config, 1, machine).largest_num_items
    assert largest is not None and largest > 10_000_000
    assert plan(config, largest, machine).peak_bytes <= 80e9
    assert plan(config, math.ceil(largest * 1.001), machine).peak_bytes > 80e9
    more = plan(config, 1, Machine(ranks=16, memory_gb=80, device="cuda")).largest_num_items
    assert more is not None and 1.8 * largest < more
    none = plan(config, 1, Machine(memory_gb=0.1)).largest_num_items
    assert none == 0


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_a_cost_that_grows_with_its_batch(name: str) -> None:
    loss = LOSSES[name]()
    small, large = (
        loss.cost(Workload(num_positions=n, num_items=50_000, num_ranks=2, width=32))
        for n in (1_000, 9_000)
    )
    assert 0 < small.flops < large.flops
    assert small.workspace_bytes <= large.workspace_bytes
    assert 0 < small.touched_rows <= large.touched_rows <= 25_000


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_copy_of_a_checkpoint_counts_where_it_lies(device: str) -> None:
    config, machine = tiny_cpu("none", "none"), Machine(device=device)
    assert config.checkpoints.background
    with_copy = plan(config, 100_000, machine)
    without = plan(override(config, ["checkpoints.background=false"]), 100_000, machine)
    assert (without.memory["checkpoint copy"], without.host_bytes) == (0, 0)
    encoder = without.memory["encoder"] * 3 // 5
    copied = without.memory["table"] + without.memory["optimizer state"] + encoder
    on_cpu = device == "cpu"
    assert with_copy.peak_bytes - without.peak_bytes == copied * on_cpu
    assert with_copy.host_bytes == (copied + PINNED_BYTES) * (not on_cpu)
    assert (with_copy.batch_bytes == 2 * 32 * 16 * 28) is not on_cpu
    assert ("host memory for a checkpoint" in with_copy.describe()) is not on_cpu


def test_what_the_loss_reads_and_writes_is_shown_with_its_products() -> None:
    config = override(tiny_cpu("none", "none"), ["encoder.width=64", "loss=cce"])
    for ranks in (1, 4):
        planned = plan(config, 1_000_000, Machine(ranks=ranks))
        work = Workload(
            num_positions=32 * 16, num_items=1_000_000, num_ranks=ranks, width=64, on_cpu=True
        )
        cost = config.loss.cost(work).work
        assert planned.traffic == {"loss": cost.bytes} and planned.flops["loss"] == cost.flops
        # At least each row once forward and once backward, and its gradient.
        assert cost.bytes >= 3 * 4 * 1_000_000 / ranks * 64
        lines = planned.describe().splitlines()
        told = lines[lines.index("read and written in a step") + 1].split()
        assert told[0] == "loss" and float(told[1]) > 0 and told[2] in ("MB", "GB")


def test_the_command_prints_terms_and_the_largest_catalog(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["plan", "--num-items", "10_000_000", "--ranks", "8", "--memory-gb", "80"]
    assert main([*words, "--device", "cuda", "--recipe", "large_catalog", "loss=cce"]) == 0
    printed = capsys.readouterr().out
    for name in ("table", "optimizer state", "loss workspace", "peak", "dominated by", "encoder"):
        assert f"\n{name}" in printed
    assert "largest catalog that fits" in printed
    assert "not measured on a GPU" in printed and "MALLOC" not in printed
    assert main([*words, "--recipe", "large_catalog"]) == 0
    assert "MALLOC_MMAP_THRESHOLD_=1000000" in capsys.readouterr().out
    assert main([*words, "--ranks", "0"]) == 2
    assert main([*words, "loss=ccee"]) == 2


def test_a_memory_is_counted_apart_because_training_holds_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tiny_cpu("none", "none")
    alone, with_memory = (plan(config, 1_000_000, Machine(neighbors=n)) for n in (0, 32))
    assert (alone.memorized_bytes, with_memory.memorized_bytes) == (0, 8 * 33_000_001)
    assert with_memory.peak_bytes == alone.peak_bytes
    shown = "item pairs, in ranking only"
    assert shown in with_memory.describe() and shown not in alone.describe()
    assert main(["plan", "--num-items", "1000", "--neighbors", "-1"]) == 2
    assert "neighbors must be at least 0" in capsys.readouterr().err
