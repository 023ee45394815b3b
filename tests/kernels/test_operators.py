"""The losses as citizens of PyTorch: opcheck, torch.compile, autocast, checkpoints, DDP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from tests.ranks import Ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from shardrec.kernels import (
    RowShard,
    cut_cross_entropy,
    reduced_cross_entropy,
    sampled_cross_entropy,
    scalable_cross_entropy,
)
from shardrec.kernels import cce as cce_file
from shardrec.kernels import cce_minus as cce_minus_file
from shardrec.kernels import rece as rece_file
from shardrec.kernels import sce as sce_file
from shardrec.kernels.loss.operator import Operator
from shardrec.kernels.negatives import InBatch, Mixture, Popularity, Uniform

N, V, D = 23, 61, 8

Loss = Callable[..., Any]


def cce(states: Tensor, table: Tensor, targets: Tensor, step: int = 0, **options: Any) -> Any:
    return cut_cross_entropy(states, table, targets, **options)


def cce_minus(states: Tensor, table: Tensor, targets: Tensor, step: int = 0, **options: Any) -> Any:
    options = {"num_negatives": 9, "share": 8, "seed": 3} | options
    return sampled_cross_entropy(states, table, targets, step=step, **options)


def sce(states: Tensor, table: Tensor, targets: Tensor, step: int = 0, **options: Any) -> Any:
    options = {"items_per_bucket": 11, "seed": 3} | options
    return scalable_cross_entropy(states, table, targets, step=step, **options)


def rece(states: Tensor, table: Tensor, targets: Tensor, step: int = 0, **options: Any) -> Any:
    options = {"num_rounds": 2, "seed": 3} | options
    return reduced_cross_entropy(states, table, targets, step=step, **options)


LOSSES: dict[str, Loss] = {"cce": cce, "cce_minus": cce_minus, "sce": sce, "rece": rece}
OPERATORS: dict[str, Operator] = {
    "cce": cce_file._cut_cross_entropy,
    "cce_minus": cce_minus_file._sampled_cross_entropy,
    "sce": sce_file._scalable_cross_entropy,
    "rece": rece_file._reduced_cross_entropy,
}
PUBLIC_NAMES = {
    "cce": "cut_cross_entropy",
    "cce_minus": "sampled_cross_entropy",
    "sce": "scalable_cross_entropy",
    "rece": "reduced_cross_entropy",
}


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(N, D, generator=generator).to(dtype).requires_grad_()
    table = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
    return states, table, torch.randint(0, V, (N,), generator=generator)


def first(result: Any) -> Tensor:
    """The loss; sce with reduction="none" gives the covered positions too."""
    loss = result[0] if isinstance(result, tuple) else result
    assert isinstance(loss, Tensor)
    return loss


def dense(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient.to_dense() if gradient.is_sparse else gradient


def arguments(
    monkeypatch: pytest.MonkeyPatch, name: str, overload: str, run: Callable[[], Any]
) -> Any:
    """What ``run`` hands to an operator."""
    calls: list[Any] = []
    original = getattr(OPERATORS[name], overload)

    def record(*args: Any) -> Any:
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(OPERATORS[name], overload, record)
    run()
    monkeypatch.undo()
    return calls[-1]


COUNTS = torch.arange(V) % 7
TARGETS = batch()[2]
MIXTURE = Mixture([(InBatch(TARGETS, COUNTS), 4), (Uniform(V), 5)])
WEIGHTS = torch.linspace(0.0, 2.0, N)
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "cce-mean": ("cce", {}),
    "cce-none-cosine": ("cce", {"reduction": "none", "normalize": True, "temperature": 0.3}),
    "cce_minus-sum": ("cce_minus", {"reduction": "sum", "weights": WEIGHTS}),
    "cce_minus-mixture": ("cce_minus", {"proposal": MIXTURE, "parity": True, "share": None}),
    "cce_minus-none": ("cce_minus", {"proposal": Popularity(COUNTS), "reduction": "none"}),
    "sce-mean": ("sce", {}),
    "sce-none": ("sce", {"reduction": "none", "num_buckets": 2, "normalize": True}),
    "rece-mean": ("rece", {"weights": WEIGHTS}),
    "rece-none": ("rece", {"reduction": "none", "align": "rank"}),
}
OPCHECKS = [(case, torch.float32) for case in OPTIONS] + [
    ("cce-mean", torch.bfloat16),
    ("cce_minus-sum", torch.float16),
    ("sce-none", torch.bfloat16),
    ("rece-mean", torch.bfloat16),
]


@pytest.mark.parametrize(("case", "dtype"), OPCHECKS, ids=str)
def test_opcheck_passes(monkeypatch: pytest.MonkeyPatch, case: str, dtype: torch.dtype) -> None:
    name, options = OPTIONS[case]
    states, table, targets = batch(dtype)

    def run() -> None:
        LOSSES[name](states, table, targets, **options)

    overload = OPERATORS[name]._forward_overload
    torch.library.opcheck(overload, arguments(monkeypatch, name, "_forward_overload", run))


# Where every row has a gradient there is no sparse one.
@pytest.mark.parametrize(
    ("name", "sparse"),
    [*((name, False) for name in LOSSES), ("cce_minus", True), ("sce", True)],
)
def test_opcheck_of_backward_passes(
    monkeypatch: pytest.MonkeyPatch, name: str, sparse: bool
) -> None:
    states, table, targets = batch()
    options = {"sparse_grad": True} if sparse else {}

    def run() -> None:
        first(LOSSES[name](states, table, targets, reduction="none", **options)).sum().backward()

    args = arguments(monkeypatch, name, "_backward_overload", run)
    # A second derivative is refused, so autograd is left out.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(OPERATORS[name]._backward_overload, args, test_utils=tests)


class Model(nn.Module):
    """A tied table, an encoder and a loss."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.table = nn.Parameter(torch.randn(V, D, generator=generator))
        self.encoder = nn.Linear(D, D)
        with torch.no_grad():
            self.encoder.weight.copy_(torch.randn(D, D, generator=generator))
            self.encoder.bias.zero_()
        self.name, self.options = name, options

    def forward(self, items: Tensor, targets: Tensor, step: int) -> Tensor:
        states = self.encoder(nn.functional.embedding(items, self.table))
        return first(LOSSES[self.name](states, self.table, targets, step=step, **self.options))


def items_and_targets(num_positions: int) -> tuple[Tensor, Tensor]:
    items = torch.arange(num_positions) * 5 % V
    return items, (items + 1) % V


def train(model: Callable[..., Any], parameters: list[nn.Parameter]) -> list[Tensor]:
    """Losses and last gradients over steps of different sizes and seeds."""
    losses = []
    for step, num_positions in enumerate((20, 20, 24, 17, 31, 29, 20, 26)):
        for parameter in parameters:
            parameter.grad = None
        loss = model(*items_and_targets(num_positions), step)
        loss.backward()
        losses.append(loss.detach())
    return losses + [dense(parameter.grad) for parameter in parameters]


@pytest.mark.parametrize("case", ["cce", "cce-weighted", "cce_minus", "sce", "rece"])
def test_a_compiled_model_is_one_graph_and_is_not_compiled_at_each_step(case: str) -> None:
    name, _, _ = case.partition("-")
    options: dict[str, Any] = {"normalize": True, "reduction": "none"} if "-" in case else {}
    compiled, frames = None, torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    class Summed(Model):
        def forward(self, items: Tensor, targets: Tensor, step: int) -> Tensor:
            return super().forward(items, targets, step).sum()

    eager, model = Summed(name, **options), Summed(name, **options)
    compiled = torch.compile(model, fullgraph=True, backend=frames)
    ours = train(compiled, list(model.parameters()))
    for found, expected in zip(ours, train(eager, list(eager.parameters())), strict=True):
        torch.testing.assert_close(found, expected)
    # Step 0 and 1 are constants to the compiler; then numbers that change are arguments.
    assert frames.frame_count <= 3


@pytest.mark.parametrize("name", LOSSES)
def test_under_autocast_products_have_its_dtype_and_gradients_that_of_the_parameters(
    name: str,
) -> None:
    model = Model(name)
    items, targets = items_and_targets(20)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(items, targets, 2)
    loss.backward()
    assert loss.dtype is torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        states = model.encoder(nn.functional.embedding(items, model.table)).detach()
    rounded = model.table.detach().bfloat16()
    assert states.dtype is torch.bfloat16
    expected = first(LOSSES[name](states, rounded, targets, step=2))
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=0)
    assert model.table.grad is not None and model.table.grad.dtype is torch.float32
    exact = Model(name)
    exact(items, targets, 2).backward()
    scale = float(dense(exact.table.grad).abs().max())
    error = (dense(model.table.grad) - dense(exact.table.grad)).abs().max()
    if name in ("cce", "cce_minus"):  # the others choose other candidates
        assert float(error) < 0.05 * scale


@pytest.mark.parametrize("name", LOSSES)
def test_without_gradients_nothing_is_kept(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    states, table, targets = batch()
    saved = []
    original = OPERATORS[name]._forward_overload

    def record(*args: Any) -> Any:
        result = original(*args)
        saved.extend(result[2])
        return result

    monkeypatch.setattr(OPERATORS[name], "_forward_overload", record)
    with torch.no_grad():
        loss = first(LOSSES[name](states, table, targets))
    assert not loss.requires_grad and not saved
    kept = first(LOSSES[name](states, table, targets))
    assert kept.requires_grad and saved
    torch.testing.assert_close(loss, kept.detach())


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_a_checkpointed_loss_has_the_same_gradients(name: str, use_reentrant: bool) -> None:
    model = Model(name)
    items, targets = items_and_targets(20)
    model(items, targets, 2).backward()
    expected = dense(model.table.grad)
    model.table.grad = None
    states = model.encoder(nn.functional.embedding(items, model.table))

    def loss(states: Tensor) -> Tensor:
        return first(LOSSES[name](states, model.table, targets, step=2))

    result = checkpoint(loss, states, use_reentrant=use_reentrant)
    assert isinstance(result, Tensor)
    result.backward()
    torch.testing.assert_close(dense(model.table.grad), expected)


def gradients_under_ddp(name: str) -> list[Tensor]:
    rank = dist.get_rank()
    model = Model(name)
    items, targets = items_and_targets(20)
    own = slice(rank * 10, rank * 10 + 10)
    averaging = DistributedDataParallel(model)
    averaging(items[own], targets[own], 2).backward()
    return [dense(parameter.grad) for parameter in model.parameters()]


@pytest.mark.parametrize("name", LOSSES)
def test_ddp_averages_the_gradients(ranks: Ranks, name: str) -> None:
    model = Model(name)
    items, targets = items_and_targets(20)
    for own in (slice(0, 10), slice(10, 20)):
        (model(items[own], targets[own], 2) / 2).backward()
    for result in ranks(2).run(gradients_under_ddp, name):
        for found, parameter in zip(result, model.parameters(), strict=True):
            torch.testing.assert_close(found, dense(parameter.grad))


@pytest.mark.parametrize("name", LOSSES)
def test_strided_inputs_and_int32_targets_change_nothing(name: str) -> None:
    states, table, targets = batch()
    expected = torch.autograd.grad(first(LOSSES[name](states, table, targets)), (states, table))
    wide = torch.stack([states.detach(), -states.detach()], dim=2).requires_grad_()
    turned = table.detach().T.contiguous().requires_grad_()
    loss = first(LOSSES[name](wide[:, :, 0], turned.T, targets.int()))
    found = torch.autograd.grad(loss, (wide, turned))
    torch.testing.assert_close(found[0][:, :, 0], expected[0])
    torch.testing.assert_close(found[1].T, expected[1])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_second_derivative_is_refused_by_name(name: str, reduction: str) -> None:
    states, table, targets = batch()
    loss = first(LOSSES[name](states, table, targets, reduction=reduction)).sum()
    (gradient,) = torch.autograd.grad(loss, states, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{PUBLIC_NAMES[name]} must be differentiated once"):
        gradient.square().sum().backward()


def test_weights_that_want_a_gradient_are_refused() -> None:
    with pytest.raises(ValueError, match="weights must not require a gradient"):
        cut_cross_entropy(*batch(), weights=torch.ones(N, requires_grad=True))


@pytest.mark.parametrize("name", LOSSES)
def test_a_kept_graph_gives_the_gradient_again(name: str) -> None:
    states, table, targets = batch()
    loss = first(LOSSES[name](states, table, targets, reduction="none")).sum()
    once = torch.autograd.grad(loss, (states, table), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, (states, table)), once)


def own_part() -> tuple[Tensor, RowShard, Tensor]:
    rank = dist.get_rank()
    states, table, targets = batch()
    own, held = (slice(0, 15), slice(0, 40)) if rank == 0 else (slice(15, N), slice(40, V))
    rows = table.detach()[held].clone().requires_grad_()
    shard = RowShard(rows, held.start, V, dist.group.WORLD)
    return states.detach()[own].clone().requires_grad_(), shard, targets[own]


def compiled_over_ranks(name: str, fullgraph: bool) -> list[Tensor]:
    """Loss and gradients of a compiled function that holds a loss over two shards."""
    states, shard, targets = own_part()
    torch._dynamo.reset()

    def function(states: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        part = RowShard(rows, shard.first_row, shard.num_rows, shard.group)
        return 2 * first(LOSSES[name](states * 1.5, part, targets, step=2))

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=fullgraph):
        compiled = torch.compile(function, fullgraph=fullgraph, backend="aot_eager")
        loss = compiled(states, shard.rows, targets)
        loss.backward()
    return [loss.detach(), dense(states.grad), dense(shard.rows.grad)]


def eager_over_ranks(name: str) -> list[Tensor]:
    states, shard, targets = own_part()
    loss = 2 * first(LOSSES[name](states * 1.5, shard, targets, step=2))
    loss.backward()
    return [loss.detach(), dense(states.grad), dense(shard.rows.grad)]


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_a_compiled_loss_over_shards_equals_the_eager_one(
    ranks: Ranks, name: str, fullgraph: bool
) -> None:
    expected = ranks(2).run(eager_over_ranks, name)
    for found, right in zip(
        ranks(2).run(compiled_over_ranks, name, fullgraph), expected, strict=True
    ):
        for ours, theirs in zip(found, right, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["cce_minus", "sce"])
def test_a_sparse_gradient_breaks_the_graph_and_says_so(name: str) -> None:
    states, table, targets = batch()

    def function(states: Tensor, table: Tensor) -> Tensor:
        return 2 * first(LOSSES[name](states, table, targets, sparse_grad=True))

    torch._dynamo.reset()
    with pytest.raises(Exception, match="sparse_grad must be False in a compiled graph"):
        torch.compile(function, fullgraph=True, backend="aot_eager")(states, table)
    torch._dynamo.reset()
    loss = torch.compile(function, backend="aot_eager")(states, table)
    (found,) = torch.autograd.grad(loss, table)
    (expected,) = torch.autograd.grad(function(states, table), table)
    assert found.is_sparse
    torch.testing.assert_close(found.to_dense(), expected.to_dense())
