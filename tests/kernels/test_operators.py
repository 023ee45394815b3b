"""The losses as citizens of PyTorch: opcheck, torch.compile, autocast, checkpoints, DDP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from tests.every_loss import batch, config_of, dense, loss_of, names
from tests.losses import LOSSES
from tests.ranks import Ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from shardrec.kernels import RowShard
from shardrec.modules.losses import Step

N, V, D = 60, 83, 12
COUNTS = torch.arange(V) % 7
WEIGHTS = torch.linspace(0.0, 2.0, N)
OPERATORS = names(is_operator=True)


class Called(TorchDispatchMode):
    """The operators of this package that run within it, with their arguments and results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: list[Any] = []
        self.arguments: list[tuple[Any, ...]] = []
        self.results: list[Any] = []

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = operator(*args, **(kwargs or {}))
        if operator.namespace == "shardrec":
            self.operators.append(operator)
            self.arguments.append(args)
            self.results.append(result)
        return result


def leaves(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    states, table, targets = batch()
    return states.to(dtype).requires_grad_(), table.to(dtype).requires_grad_(), targets


# What only the options of training can say.
TRAINED = [f"{name}-{variant}" for name in OPERATORS for variant in LOSSES[name].config_variants]
FORMS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "mean": (torch.float32, {}),
    "mean-bfloat16": (torch.bfloat16, {}),
    "sum-weights": (torch.float32, {"reduction": "sum", "weights": WEIGHTS}),
    "sum-weights-float16": (torch.float16, {"reduction": "sum", "weights": WEIGHTS}),
    "none-cosine": (
        torch.float32,
        {"reduction": "none", "normalize": True, "temperature": 0.3},
    ),
}


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=[pytest.mark.slow] * (form != "mean")) for form in FORMS]
)
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck_passes(name: str, form: str) -> None:
    dtype, options = FORMS[form]
    states, table, targets = leaves(dtype)
    with Called() as called:
        loss_of(name, states, table, targets, **options)
    (operator,), (args,) = called.operators, called.arguments
    assert args[0].requires_grad and args[1].requires_grad
    torch.library.opcheck(operator, args)


@pytest.mark.parametrize("case", TRAINED)
def test_opcheck_passes_with_the_options_of_training(case: str) -> None:
    with Called() as called:
        config_of(case)(*leaves(), step=Step(seed=3, step=2, item_counts=COUNTS))
    (operator,), (args,) = called.operators, called.arguments
    names_of_arguments = [argument.name for argument in operator._schema.arguments]
    # A graph holds no sparse gradient.
    arguments = dict(zip(names_of_arguments, args, strict=True)) | {"sparse_grad": False}
    torch.library.opcheck(operator, tuple(arguments.values()))


# Where every row has a gradient there is no sparse one.
@pytest.mark.parametrize(
    "case", [*OPERATORS, *(f"{name}-sparse" for name in names(has_sparse_grad=True))]
)
def test_opcheck_of_backward_passes(case: str) -> None:
    with Called() as called:
        loss_of(case, *leaves(), reduction="none").sum().backward()
    _, operator = called.operators
    # A second derivative is refused, so autograd is left out.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator, called.arguments[1], test_utils=tests)


def at_step(
    step: int, name: str, states: Tensor, table: Tensor, targets: Tensor, **options: Any
) -> Tensor:
    """The loss of a function at a step, if it draws."""
    options |= {"step": step} if LOSSES[name].has_draws else {}
    return loss_of(name, states, table, targets, **options)


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
        return at_step(step, self.name, states, self.table, targets, **self.options)


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


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_compiled_model_is_one_graph_and_is_not_compiled_at_each_step(
    name: str, reduction: str
) -> None:
    options: dict[str, Any] = {"normalize": reduction == "none", "reduction": reduction}
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
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


@pytest.mark.parametrize("name", OPERATORS)
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
    expected = at_step(2, name, states, rounded, targets)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=0)
    assert model.table.grad is not None and model.table.grad.dtype is torch.float32
    exact = Model(name)
    exact(items, targets, 2).backward()
    scale = float(dense(exact.table.grad).abs().max())
    error = (dense(model.table.grad) - dense(exact.table.grad)).abs().max()
    if not LOSSES[name].chooses:  # else other candidates are chosen
        assert float(error) < 0.05 * scale


@pytest.mark.parametrize("name", OPERATORS)
def test_without_gradients_nothing_is_kept(name: str) -> None:
    inputs = leaves()
    with torch.no_grad(), Called() as without:
        loss = loss_of(name, *inputs)
    with Called() as called:
        kept = loss_of(name, *inputs)
    assert not loss.requires_grad and kept.requires_grad
    # The loss and the mask of covered positions.
    assert len(tree_leaves(without.results)) <= 2 < len(tree_leaves(called.results))
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
        return at_step(2, name, states, model.table, targets)

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
@pytest.mark.slow
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
    states, table, targets = leaves()
    expected = torch.autograd.grad(loss_of(name, states, table, targets), (states, table))
    wide = torch.stack([states.detach(), -states.detach()], dim=2).requires_grad_()
    turned = table.detach().T.contiguous().requires_grad_()
    loss = loss_of(name, wide[:, :, 0], turned.T, targets.int())
    found = torch.autograd.grad(loss, (wide, turned))
    torch.testing.assert_close(found[0][:, :, 0], expected[0])
    torch.testing.assert_close(found[1].T, expected[1])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_second_derivative_is_refused_by_name(name: str, reduction: str) -> None:
    states, table, targets = leaves()
    loss = loss_of(name, states, table, targets, reduction=reduction).sum()
    (gradient,) = torch.autograd.grad(loss, states, create_graph=True)
    with pytest.raises(
        RuntimeError, match=f"{LOSSES[name].function.__name__} must be differentiated once"
    ):
        gradient.square().sum().backward()


@pytest.mark.parametrize("name", OPERATORS)
def test_weights_that_want_a_gradient_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="weights must not require a gradient"):
        loss_of(name, *leaves(), weights=torch.ones(N, requires_grad=True))


@pytest.mark.parametrize("name", OPERATORS)
def test_a_kept_graph_gives_the_gradient_again(name: str) -> None:
    states, table, targets = leaves()
    loss = loss_of(name, states, table, targets, reduction="none").sum()
    once = torch.autograd.grad(loss, (states, table), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, (states, table)), once)


def own_part() -> tuple[Tensor, RowShard, Tensor]:
    rank = dist.get_rank()
    states, table, targets = leaves()
    own, held = (slice(0, 35), slice(0, 50)) if rank == 0 else (slice(35, N), slice(50, V))
    rows = table.detach()[held].clone().requires_grad_()
    shard = RowShard(rows, held.start, V, dist.group.WORLD)
    return states.detach()[own].clone().requires_grad_(), shard, targets[own]


def compiled_over_ranks(name: str, fullgraph: bool) -> list[Tensor]:
    """Loss and gradients of a compiled function that holds a loss over two shards."""
    states, shard, targets = own_part()
    torch._dynamo.reset()

    def function(states: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        part = RowShard(rows, shard.first_row, shard.num_rows, shard.group)
        return 2 * loss_of(name, states * 1.5, part, targets)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=fullgraph):
        compiled = torch.compile(function, fullgraph=fullgraph, backend="aot_eager")
        loss = compiled(states, shard.rows, targets)
        loss.backward()
    return [loss.detach(), dense(states.grad), dense(shard.rows.grad)]


def eager_over_ranks(name: str) -> list[Tensor]:
    states, shard, targets = own_part()
    loss = 2 * loss_of(name, states * 1.5, shard, targets)
    loss.backward()
    return [loss.detach(), dense(states.grad), dense(shard.rows.grad)]


@pytest.mark.slow
@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_compiled_loss_over_shards_equals_the_eager_one(
    ranks: Ranks, name: str, fullgraph: bool
) -> None:
    expected = ranks(2).run(eager_over_ranks, name)
    for found, right in zip(
        ranks(2).run(compiled_over_ranks, name, fullgraph), expected, strict=True
    ):
        for ours, theirs in zip(found, right, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", names(has_sparse_grad=True))
def test_a_sparse_gradient_breaks_the_graph_and_says_so(name: str) -> None:
    states, table, targets = leaves()

    def function(states: Tensor, table: Tensor) -> Tensor:
        return 2 * loss_of(name, states, table, targets, sparse_grad=True)

    torch._dynamo.reset()
    with pytest.raises(Exception, match="sparse_grad must be False in a compiled graph"):
        torch.compile(function, fullgraph=True, backend="aot_eager")(states, table)
    torch._dynamo.reset()
    loss = torch.compile(function, backend="aot_eager")(states, table)
    (found,) = torch.autograd.grad(loss, table)
    (expected,) = torch.autograd.grad(function(states, table), table)
    assert found.is_sparse
    torch.testing.assert_close(found.to_dense(), expected.to_dense())
