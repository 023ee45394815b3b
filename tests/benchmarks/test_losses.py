"""What the benchmarks of the losses compare with is right, and so is how they search and count."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from shardrec.kernels.ranks.traffic import Workload


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("losses")


@pytest.mark.parametrize("loss", ["cce", "cce_minus", "sce", "rece"])
def test_every_baseline_gives_the_loss_of_its_definition(losses: ModuleType, loss: str) -> None:
    importlib.import_module("loss_checks").check(loss)


@pytest.mark.parametrize(("best", "first"), [(2, 64), (64, 64), (512, 64)])
def test_the_search_ends_between_two_worse_blocks(
    losses: ModuleType, best: int, first: int
) -> None:
    times = losses.search_block(first, 4096, lambda block: abs(block - best) + 1.0)
    assert min(times, key=lambda block: times[block]) == best
    assert {best // 2, best, 2 * best} <= set(times)


@pytest.mark.parametrize("best", [1, 100])
def test_the_search_ends_at_the_smallest_and_the_largest_block(
    losses: ModuleType, best: int
) -> None:
    times = losses.search_block(8, 100, lambda block: abs(block - best) + 1.0)
    assert min(times, key=lambda block: times[block]) == best


@pytest.mark.parametrize("loss", ["cce", "cce_minus", "sce", "rece"])
def test_the_largest_block_fits_and_the_next_does_not(losses: ModuleType, loss: str) -> None:
    work = Workload(num_positions=4096, num_items=100_000, num_ranks=1, width=64)
    block = losses.largest_block(loss, work, 0.25)
    assert losses.stored_gib(loss, f"chunked_{block}", work) <= 0.25
    if block < losses.num_lines(loss, work):
        assert losses.stored_gib(loss, f"chunked_{block + 1}", work) > 0.25


@pytest.mark.parametrize(
    ("loss", "share", "milliseconds"),
    # 8 N V D over the rate; traffic of a row for every (position, negative); 4.7 + 0.3; 131.
    [("cce", 128, 3398), ("cce_minus", 1, 63.9), ("sce", 128, 4.97), ("rece", 128, 131)],
)
def test_limits_of_a_gpu_at_ten_million_items(
    losses: ModuleType, loss: str, share: int, milliseconds: float
) -> None:
    limits = importlib.import_module("gpu_limits")
    work = Workload(
        num_positions=131_072,
        num_items=10_000_000,
        num_ranks=1,
        width=256,
        element_bytes=2,
        on_cpu=False,
    )
    called = limits.Options(
        num_negatives=1023, share=share, items_per_bucket=256, rounds=8, reach=1
    )
    found = limits.limit_ms(loss, work, called, limits.H200["bfloat16"])
    assert found == pytest.approx(milliseconds, rel=0.01)
