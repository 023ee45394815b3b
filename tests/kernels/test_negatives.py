from __future__ import annotations

import pytest
import torch

from shardrec.kernels.negatives import (
    InBatch,
    Mixture,
    Popularity,
    Proposal,
    Uniform,
    draw_below,
    random_signs,
)
from shardrec.kernels.negatives.reference import philox

# Known answers published with the generator (Random123, kat_vectors): key and counter, then words.
KNOWN = [
    ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF,) * 4,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
BLOCKS = torch.arange(400)


@pytest.mark.parametrize(("key", "counter", "words"), KNOWN)
def test_philox_gives_the_published_words(
    key: tuple[int, int], counter: tuple[int, int, int, int], words: tuple[int, ...]
) -> None:
    c0, c1 = torch.tensor([counter[0]]), torch.tensor([counter[1]])
    result = philox(key[0] | key[1] << 32, c0, c1, counter[2], counter[3])
    assert tuple(int(word) for word in result) == words


def test_a_draw_depends_on_its_block_and_number_alone() -> None:
    together = draw_below(1000, torch.tensor([3, 9, 4]), 7, seed=5, step=2, stream=1)
    alone = draw_below(1000, torch.tensor([9]), 5, seed=5, step=2, stream=1)
    assert torch.equal(together[1, :5], alone[0])


@pytest.mark.parametrize("change", ["seed", "step", "stream"])
def test_another_seed_step_or_stream_draws_differently(change: str) -> None:
    counters = {"seed": 5, "step": 2, "stream": 1}

    def draws(seed: int, step: int, stream: int) -> torch.Tensor:
        return draw_below(1 << 30, BLOCKS, 8, seed=seed, step=step, stream=stream)

    one, other = draws(**counters), draws(**(counters | {change: 7}))
    assert (one == other).float().mean() < 0.01


def test_draws_are_uniform() -> None:
    counts = torch.bincount(draw_below(7, BLOCKS, 700, seed=1, step=0, stream=0).flatten())
    assert counts.numel() == 7
    assert (counts.double() / 40000 - 1).abs().max() < 0.03


def test_signs_do_not_depend_on_the_range_asked_for() -> None:
    whole = random_signs(0, 50, 300, seed=1, step=2, stream=3)
    assert torch.equal(whole[20:30], random_signs(20, 10, 300, seed=1, step=2, stream=3))
    assert set(whole.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(whole.mean())) < 0.03


COUNTS = torch.tensor([0, 3, 0, 40, 7, 50])
TARGETS = torch.tensor([3] * 4 + [4] + [5] * 5)
PROPOSALS: dict[str, Proposal] = {
    "uniform": Uniform(6),
    "popularity": Popularity(COUNTS, 0.75),
    "mixture": Mixture([(Uniform(6), 300), (Popularity(COUNTS), 700)]),
}


@pytest.mark.parametrize("name", PROPOSALS)
def test_the_probability_of_a_proposal_is_the_frequency_of_its_draws(name: str) -> None:
    proposal = PROPOSALS[name]
    draws = proposal.draw(BLOCKS, 1000, seed=3, step=1, stream=0)
    frequency = torch.bincount(draws.flatten(), minlength=6).double() / draws.numel()
    probability = proposal.probability(torch.arange(6))
    assert float(probability.sum()) == pytest.approx(1.0)
    assert (frequency - probability).abs().max() < 0.003


def test_in_batch_draws_targets_and_knows_their_training_frequency() -> None:
    proposal = InBatch(TARGETS, COUNTS)
    draws = proposal.draw(BLOCKS, 500, seed=0, step=0, stream=0)
    frequency = torch.bincount(draws.flatten(), minlength=6).double() / draws.numel()
    assert (frequency - torch.tensor([0, 0, 0, 0.4, 0.1, 0.5])).abs().max() < 0.01
    assert proposal.probability(torch.tensor([3])).tolist() == [0.4]


def test_an_empty_batch_draws_an_item_that_nobody_is_compared_with() -> None:
    proposal = InBatch(TARGETS[:0], COUNTS)
    assert not proposal.draw(BLOCKS, 5, seed=0, step=0, stream=0).any()


def test_popularity_reaches_a_tail_beyond_2_to_24() -> None:
    num_items = (1 << 24) + 1000
    proposal = Popularity(torch.ones(num_items, dtype=torch.int64))
    draws = proposal.draw(BLOCKS, 200, seed=0, step=0, stream=0)
    assert int(draws.max()) > 0.999 * num_items and draws.unique().numel() > 79000


def test_a_mixture_refuses_another_number_of_draws() -> None:
    with pytest.raises(ValueError, match="must be the mixture's 1000 draws, got 5"):
        PROPOSALS["mixture"].draw(BLOCKS, 5, seed=0, step=0, stream=0)


@pytest.mark.parametrize("bound", [0, 1 << 31])
def test_a_bound_outside_31_bits_is_refused(bound: int) -> None:
    with pytest.raises(ValueError, match="bound must be in"):
        draw_below(bound, BLOCKS, 1, seed=0, step=0, stream=0)


def test_draws_reach_items_above_2_to_24() -> None:
    num_items = 1 << 30
    items = Uniform(num_items).draw(torch.arange(100), 100, seed=0, step=0, stream=0)
    assert int(items.max()) > num_items * 0.99 and int(items.unique().numel()) > 9990
    assert (items % 2).float().mean() == pytest.approx(0.5, abs=0.03)
