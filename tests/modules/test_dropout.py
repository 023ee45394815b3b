"""Dropout by bytes keeps the right share, the expectation and the gradient; so does attention."""

import pytest
import torch
import torch.nn.functional as F

from shardrec.modules.dropout import PositionKeys, causal_attention, dropout, random_bytes


def keys_of(*shape: int, seed: int = 0) -> torch.Tensor:
    words = torch.empty(shape, dtype=torch.int64)
    return words.random_(-(2**63), None, generator=torch.Generator().manual_seed(seed))


def split_mix(word: int) -> int:
    """The finaliser of SplitMix64, as published."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) % 2**64
    return word ^ (word >> 31)


def test_bytes_are_those_of_split_mix() -> None:
    keys = keys_of(5)
    found = random_bytes(keys, 11)
    for key, row in zip(keys.tolist(), found.tolist(), strict=True):
        words = [split_mix((key + i * 0x9E3779B97F4A7C15) % 2**64) for i in (1, 2)]
        assert bytes(row) == b"".join(word.to_bytes(8, "little") for word in words)[:11]


def test_each_use_of_the_keys_gives_others_and_they_belong_to_the_position() -> None:
    whole, part = PositionKeys(torch.arange(100)), PositionKeys(torch.arange(40, 60))
    first, second = whole.next(), whole.next()
    assert torch.equal(part.next(), first[40:60]) and torch.equal(part.next(), second[40:60])
    assert len(torch.cat((first, second)).unique()) == 200


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.999])
def test_the_share_is_the_nearest_byte_and_the_kept_values_are_scaled_by_it(share: float) -> None:
    values = torch.ones(10_007, 101)
    rounded = min(max(round(share * 256), 1), 255) / 256
    result = dropout(values, share, keys_of(10_007))
    assert set(result.unique().tolist()) == {0.0, torch.tensor(1 / (1 - rounded)).item()}
    error = (rounded * (1 - rounded) / values.numel()) ** 0.5
    assert abs((result == 0).double().mean().item() - rounded) < 5 * error


def test_neighbours_are_dropped_independently() -> None:
    # Eight neighbours of a position, and one value of eight positions with keys in a row.
    across = PositionKeys(torch.arange(2**17)).next()
    for values in (torch.ones(2**17, 8), torch.ones(2**17, 1)):
        kept = (dropout(values, 0.5, across) > 0).view(-1, 8).double()
        assert_independent(kept)


def assert_independent(kept: torch.Tensor) -> None:
    together = kept.T @ kept / kept.shape[0]
    expected = torch.full((8, 8), 0.25, dtype=torch.float64).fill_diagonal_(0.5)
    torch.testing.assert_close(together, expected, rtol=0, atol=5 * 0.5 / kept.shape[0] ** 0.5)


def test_the_gradient_is_zero_exactly_where_the_value_was_dropped() -> None:
    values = torch.rand(3, 5, 7).add_(1).requires_grad_()
    result = dropout(values, 0.3, keys_of(3, 5))
    (gradient,) = torch.autograd.grad(result.sum(), values)
    torch.testing.assert_close(gradient * values, result)
    assert 0 < (gradient == 0).sum() < gradient.numel()


def test_nothing_is_dropped_outside_training_or_at_share_zero() -> None:
    values = torch.rand(4)
    assert dropout(values, 0.5, None) is values
    assert dropout(values, 0.0, keys_of()) is values


def test_equal_keys_drop_the_same_and_longer_rows_begin_alike() -> None:
    values, keys = torch.rand(100, 30), keys_of(100)
    first = dropout(values, 0.5, keys)
    assert torch.equal(dropout(values, 0.5, keys), first)
    assert torch.equal(dropout(values[:, :13], 0.5, keys), first[:, :13])
    assert not torch.equal(dropout(values, 0.5, keys_of(100, seed=1)), first)


def test_attention_with_dropout_is_on_average_attention_without() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 5, 4) for _ in range(3))
    queries, keys, values = (part.expand(20_000, -1, -1, -1) for part in (query, key, value))
    drawn = random_bytes(keys_of(20_000, 2, 5), 5)
    dropped = causal_attention(queries, keys, values, share=0.25, drawn=drawn)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)[0]
    error = dropped.std(0) / dropped.shape[0] ** 0.5
    assert ((dropped.mean(0) - expected).abs() <= 5 * error).all()
    assert len(dropped[:, 0, 0, 0].unique()) == 2  # the first position sees only itself
