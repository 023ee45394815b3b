"""One step of the trainer equals a step written by hand with plain PyTorch."""

import copy
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.pipeline.small_data import small_config
from torch import Tensor, nn

from shardrec.modules.catalog_config import CatalogConfig
from shardrec.pipeline.model.model import Model
from shardrec.pipeline.prepared.loader import Batch, BatchConfig
from shardrec.pipeline.run.config import LimitConfig, OptimizerConfig, ValidationConfig
from shardrec.pipeline.run.step import Stepper, learning_rate_factor
from shardrec.pipeline.train import Run, build

OFF = ValidationConfig(every_epochs=None)


@pytest.fixture(scope="module")
def data(weighted_data: str) -> str:
    return weighted_data


def build_run(data: str, folder: Path, **options: Any) -> Run:
    settings: dict[str, Any] = {
        "validation": OFF,
        "catalog": CatalogConfig(optimizer="sgd", learning_rate=0.7, init_std=0.3),
        "batches": BatchConfig(batch_size=13),
        "limits": LimitConfig(max_steps=8),
    }
    return build(small_config(data, folder / "run", **(settings | options)))


def loss_by_hand(encoder: nn.Module, rows: Tensor, batches: list[Batch]) -> Tensor:
    """Weighted mean of the cross-entropy of every real position against all rows."""
    total, weight = rows.new_zeros(()), rows.new_zeros(())
    for batch in batches:
        states = encoder(F.embedding(batch.items, rows))
        for user, length in enumerate(batch.lengths.tolist()):
            logits = states[user, :length] @ rows.T
            losses = F.cross_entropy(logits, batch.targets[user, :length], reduction="none")
            assert batch.weights is not None
            total = total + (losses * batch.weights[user, :length]).sum()
            weight = weight + batch.weights[user, :length].sum()
    return total / weight


@pytest.mark.parametrize("clip_norm", [None, 0.01], ids=["no-clip", "clip"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_equals_plain_pytorch(
    data: str, tmp_path: Path, clip_norm: float | None, accumulate: int
) -> None:
    config = OptimizerConfig(
        learning_rate=2e-3, weight_decay=0.1, eps=1e-4, clip_norm=clip_norm, accumulate=accumulate
    )
    run = build_run(data, tmp_path, optimizer=config)
    model, stepper = run.stepper.model, run.stepper
    encoder = copy.deepcopy(model.encoder)
    rows = model.catalog.shard.rows.detach().clone().requires_grad_()
    ours = [*encoder.parameters(), rows]
    optimizer = torch.optim.AdamW(
        encoder.parameters(), lr=2e-3, betas=config.betas, eps=1e-4, weight_decay=0.1
    )
    for step in (1, 2):
        batches = list(islice(run.batches, accumulate))
        loss = loss_by_hand(encoder, rows, batches)
        gradients = torch.autograd.grad(loss, ours)
        norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
        scale = 1.0 if clip_norm is None else float(clip_norm / norm)
        for parameter, gradient in zip(ours, gradients, strict=True):
            parameter.grad = gradient * scale
        optimizer.step()
        assert rows.grad is not None
        rows.data -= 0.7 * rows.grad

        outcome = stepper.take(batches, step)
        assert outcome.loss == pytest.approx(float(loss.detach()), rel=1e-5)
        assert outcome.gradient_norm == pytest.approx(float(norm), rel=1e-5)
        assert outcome.positions == sum(batch.num_positions for batch in batches)
        torch.testing.assert_close(model.catalog.shard.rows.detach(), rows.detach())
        expected = {name: value.detach() for name, value in encoder.state_dict().items()}
        torch.testing.assert_close(dict(model.encoder.state_dict()), expected, rtol=1e-4, atol=1e-6)


def take_steps(data: str, folder: Path, ahead: bool) -> tuple[list[float], torch.Tensor]:
    """Losses and rows of three steps of two batches, the ids of the next sent ahead or not."""
    run = build_run(data, folder, optimizer=OptimizerConfig(accumulate=2))
    batches = list(islice(run.batches, 7))
    losses = []
    for step in (1, 2, 3):
        following = batches[2 * step] if ahead else None
        now = batches[2 * step - 2 : 2 * step]
        losses.append(run.stepper.take(now, step, following=following).loss)
    return losses, run.stepper.model.catalog.shard.rows.detach()


def test_ids_sent_ahead_change_nothing(data: str, tmp_path: Path) -> None:
    losses, rows = take_steps(data, tmp_path / "ahead", True)
    expected, expected_rows = take_steps(data, tmp_path / "plain", False)
    assert losses == expected
    assert torch.equal(rows, expected_rows)


def test_another_batch_than_the_one_announced_is_taken_as_it_is(data: str, tmp_path: Path) -> None:
    losses = []
    for announced in (1, 2):
        run = build_run(data, tmp_path / str(announced))
        batches = list(islice(run.batches, 3))
        run.stepper.take(batches[:1], 1, following=batches[announced])
        losses.append(run.stepper.take(batches[1:2], 2).loss)
    assert losses[0] == losses[1]


def test_both_learning_rates_warm_up_and_decay(data: str, tmp_path: Path) -> None:
    config = OptimizerConfig(learning_rate=1e-3, warmup_steps=2, decay="cosine")
    run = build_run(data, tmp_path, optimizer=config)
    used = []
    for step, batch in zip(range(1, 9), run.batches, strict=False):
        outcome = run.stepper.take([batch], step)
        factor = learning_rate_factor(step, config, 8)
        assert outcome.learning_rate == pytest.approx(1e-3 * factor)
        assert run.stepper.model.catalog.learning_rate == pytest.approx(0.7 * factor)
        used.append(factor)
    assert used[:2] == [0.5, 1.0] and used == sorted(used[:2]) + sorted(used[2:], reverse=True)


def test_bfloat16_stays_close_to_float32(data: str, tmp_path: Path) -> None:
    outcomes = []
    for precision in ("float32", "bfloat16"):
        run = build_run(data, tmp_path / precision, precision=precision)
        outcomes.append(run.stepper.take(list(islice(run.batches, 1)), 1).loss)
        rows = run.stepper.model.catalog.shard.rows
        assert rows.dtype == torch.float32 and rows.isfinite().all()
    assert outcomes[0] != outcomes[1]
    assert outcomes[1] == pytest.approx(outcomes[0], rel=0.02)


def test_padding_changes_nothing(data: str, tmp_path: Path) -> None:
    run = build_run(data, tmp_path)
    batch = next(iter(run.batches))
    model = run.stepper.model
    model.encoder.eval()
    states = model.states(batch.items, batch.lengths)
    longest = int(batch.lengths.max())
    noisy = batch.items.clone()
    places = torch.arange(longest) >= batch.lengths[:, None]
    noisy[places] = 5
    assert places.any()
    torch.testing.assert_close(model.states(noisy, batch.lengths), states, rtol=0, atol=0)
    last = model.last_states(batch.items, batch.lengths)
    torch.testing.assert_close(last, states[batch.lengths.cumsum(0) - 1], rtol=0, atol=0)


def test_items_and_targets_outside_the_catalog_are_refused(data: str, tmp_path: Path) -> None:
    run = build_run(data, tmp_path)
    batch = next(iter(run.batches))
    num_items = run.prepared.num_items
    wrong = batch.items.clone()
    wrong[0, 0] = num_items
    with pytest.raises(ValueError, match=rf"items must be in \[0, {num_items}\), got {num_items}"):
        run.stepper.take([Batch(wrong, batch.lengths, batch.targets, batch.weights)], 1)
    wrong = batch.targets.clone()
    wrong[0, 0] = -1
    with pytest.raises(ValueError, match="targets must"):
        run.stepper.take([Batch(batch.items, batch.lengths, wrong, batch.weights)], 1)


def test_the_optimizer_of_a_gpu_is_fused_and_that_of_a_cpu_is_not(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever kind of device wrote the state that it goes on from."""
    on_cpu = build_run(data, tmp_path / "cpu").stepper
    with monkeypatch.context() as patch:
        patch.setattr(Model, "device", torch.device("cuda", 0))
        on_gpu = Stepper(
            on_cpu.model, on_cpu.loss, on_cpu.config, seed=1, total_steps=on_cpu.total_steps
        )
    steppers = {None: on_cpu, True: on_gpu}
    saved = {fused: one.optimizer.state_dict() for fused, one in steppers.items()}
    for fused, one in steppers.items():
        for state in saved.values():
            one.load_optimizer(state)
            assert [group["fused"] for group in one.optimizer.param_groups] == [fused]
