"""The search for tiles at toy size, where no time means anything."""

import threading

import pytest
import torch
from compiled import tile_search
from compiled.tile_search import Size, neighbours, search

from shardrec.kernels.device.tiles import KERNELS, Tile, tile_for, trial

TOY = Size(positions=4, items=9, width=16, dtype=torch.float32, negatives=3, queries=4, repeats=1)


@pytest.mark.parametrize("kernel", KERNELS)
def test_candidates_are_checked_and_timed(kernel: str) -> None:
    found = search(kernel, TOY, "cpu", most=1)
    assert found.kernel == kernel and found.tried == 1 and found.refused == 0
    assert 0 < found.seconds[0] <= found.seconds[1]


def test_the_faster_neighbour_is_taken_as_long_as_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used: list[Tile] = []

    def seconds(*_: object) -> float:
        used.append(tile_for("mixed_signs", 16, torch.float32, 0))
        return 1.0 + abs(used[-1].positions - 128) + used[-1].num_warps

    monkeypatch.setattr(tile_search, "_seconds", seconds)
    found = search("mixed_signs", TOY, "cpu")
    assert (found.tile.positions, found.tile.num_warps) == (128, 2)
    assert len(set(used)) == len(used), "no tile is timed twice"
    entry = found.entry("measured: a card, a commit")
    assert entry.startswith('(0, "mixed_signs", ') and "measured: a card, a commit" in entry
    assert "Tile(128, " in entry


def test_a_wrong_result_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(100))
    wrong = {"full_forward": lambda: [torch.tensor(float(next(calls)))]}
    monkeypatch.setattr(tile_search, "_operations", lambda *_: wrong)
    with pytest.raises(AssertionError, match="full_forward with .* is off by"):
        search("full_forward", TOY, "cpu")


def test_a_trial_ends_with_its_block() -> None:
    shipped, other = tile_for("mixed_signs", 64, torch.bfloat16, 90), Tile(16, 16, 16, 16, 2, 1)
    with trial("mixed_signs", other):
        assert tile_for("mixed_signs", 64, torch.bfloat16, 90) == other
        assert tile_for("group_maxima", 64, torch.bfloat16, 90) != other
    assert tile_for("mixed_signs", 64, torch.bfloat16, 90) == shipped


def test_a_trial_reaches_the_thread_of_a_backward_pass() -> None:
    """On a GPU autograd runs backward in a thread of its own."""
    tried, found = Tile(16, 16, 16, 16, 2, 1), []
    with trial("full_rows_backward", tried):
        thread = threading.Thread(
            target=lambda: found.append(tile_for("full_rows_backward", 64, torch.bfloat16, 90))
        )
        thread.start()
        thread.join()
    assert found == [tried]


def test_neighbours_stay_within_what_kernels_take() -> None:
    for tile in neighbours("best_sign_direction", Tile(16, 256, 128, 128, 16, 5), 1024):
        assert 16 <= tile.positions <= 256 and tile.items <= 256 and tile.width <= 128
        assert tile.num_warps <= 16 and 1 <= tile.num_stages <= 5
