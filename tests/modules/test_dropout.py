"""Dropout by bytes keeps the right share, the expectation and the gradient; so does attention."""

import pytest
import torch
import torch.nn.functional as F

from shardrec.modules.dropout import causal_attention, dropout


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.999])
def test_the_share_is_the_nearest_byte_and_the_kept_values_are_scaled_by_it(share: float) -> None:
    torch.manual_seed(0)
    values = torch.ones(1_000_003)
    rounded = min(max(round(share * 256), 1), 255) / 256
    result = dropout(values, share, training=True)
    assert set(result.unique().tolist()) == {0.0, torch.tensor(1 / (1 - rounded)).item()}
    error = (rounded * (1 - rounded) / values.numel()) ** 0.5
    assert abs((result == 0).double().mean().item() - rounded) < 5 * error


def test_neighbours_are_dropped_independently() -> None:
    torch.manual_seed(0)
    kept = (dropout(torch.ones(2**20), 0.5, training=True) > 0).view(-1, 8).double()
    together = kept.T @ kept / kept.shape[0]
    expected = torch.full((8, 8), 0.25, dtype=torch.float64).fill_diagonal_(0.5)
    torch.testing.assert_close(together, expected, rtol=0, atol=5 * 0.5 / kept.shape[0] ** 0.5)


def test_the_gradient_is_zero_exactly_where_the_value_was_dropped() -> None:
    values = torch.rand(3, 5, 7).add_(1).requires_grad_()
    result = dropout(values, 0.3, training=True)
    (gradient,) = torch.autograd.grad(result.sum(), values)
    torch.testing.assert_close(gradient * values, result)
    assert 0 < (gradient == 0).sum() < gradient.numel()


def test_nothing_is_dropped_outside_training_or_at_share_zero() -> None:
    values = torch.rand(4)
    assert dropout(values, 0.5, training=False) is values
    assert dropout(values, 0.0, training=True) is values


def test_equal_seeds_drop_the_same() -> None:
    values = torch.rand(1000)
    torch.manual_seed(7)
    first = dropout(values, 0.5, training=True)
    torch.manual_seed(7)
    assert torch.equal(dropout(values, 0.5, training=True), first)


def test_attention_with_dropout_is_on_average_attention_without() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 5, 4) for _ in range(3))
    queries, keys, values = (part.expand(20_000, -1, -1, -1) for part in (query, key, value))
    dropped = causal_attention(queries, keys, values, share=0.25)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)[0]
    error = dropped.std(0) / dropped.shape[0] ** 0.5
    assert ((dropped.mean(0) - expected).abs() <= 5 * error).all()
    assert len(dropped[:, 0, 0, 0].unique()) == 2  # the first position sees only itself
