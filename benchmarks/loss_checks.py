"""Check each loss of the benchmark, ours and the baselines, against its float64 definition."""

from collections.abc import Callable
from functools import partial
from typing import Any

import baselines
import torch
import torch.nn.functional as F
from torch import Tensor

from shardrec import kernels
from shardrec.kernels import reference
from shardrec.kernels.negatives import STREAM_HASH, STREAM_MIX, Uniform, random_signs

__all__ = ["check", "check_triton", "make_batch", "mean_sce"]

Batch = tuple[Tensor, Tensor, Tensor]
Operation = Callable[[Tensor, Tensor, Tensor], Tensor | None]
Case = tuple[Operation, dict[str, Callable[..., Tensor | None]]]
"""The definition of a loss, and what is held to it, which may take options too."""

# Small sizes that divide evenly: then the chunks of the published algorithm are ours.
_N, _D, _V, _K, _SEED = 256, 16, 2048, 64, 7
# bfloat16 has eight bits; gradients are rounded to it.
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def make_batch(N: int, D: int, V: int, dtype: torch.dtype = torch.float32) -> Batch:
    """Random states (N, D) and table (V, D), and targets (N,) that prefer some items."""
    generator = torch.Generator().manual_seed(N + V)
    states = torch.randn(N, D, generator=generator).to(dtype).requires_grad_()
    table = (torch.randn(V, D, generator=generator) * D**-0.5).to(dtype).requires_grad_()
    targets = (V ** torch.rand(N, generator=generator, dtype=torch.float64)).long().clamp(0, V - 1)
    return states, table, targets


def check(loss: str) -> None:
    """Raises AssertionError where ours or a baseline differs from the definition.

    Loss and both gradients, with the same random choices for all.
    """
    definition, operations = _CASES[loss](make_batch(_N, _D, _V))
    expected = _evaluate(definition, make_batch(_N, _D, _V, torch.float64))
    for name, operation in operations.items():
        found = _evaluate(operation, make_batch(_N, _D, _V))
        _compare(f"{name} of {loss}", found, expected, _TOLERANCE[torch.float32])


def check_triton(
    loss: str, device: str, dtype: torch.dtype, positions: int = _N, catalog: int = _V
) -> None:
    """Raises AssertionError where our Triton kernels differ from the definition.

    Loss and both gradients, dense and sparse, of states and rows rounded to ``dtype``. Positions
    and catalog are multiples of 32.
    """
    rounded = make_batch(positions, _D, catalog, dtype)
    definition, operations = _CASES[loss](_each(rounded, lambda part: part.detach().float()))
    expected = _evaluate(definition, _each(rounded, _as_float64))
    for name in (name for name in operations if name.startswith("ours")):
        batch = _each(rounded, lambda part: _leaf(part.to(device)))
        found = _evaluate(partial(operations[name], backend="triton"), batch)
        _compare(f"{name} of {loss} in {dtype}", found, expected, _TOLERANCE[dtype])


def mean_sce(states: Tensor, table: Tensor, targets: Tensor, **options: Any) -> Tensor:
    """Our SCE with a reduction to one number, so that a single tensor is returned."""
    loss = kernels.scalable_cross_entropy(states, table, targets, **options)
    assert isinstance(loss, Tensor)
    return loss


def _each(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    states, table, targets = batch
    return change(states), change(table), change(targets)


def _as_float64(part: Tensor) -> Tensor:
    return _leaf(part.double()) if part.is_floating_point() else part


def _leaf(part: Tensor) -> Tensor:
    return part.detach().requires_grad_(part.is_floating_point())


def _compare(
    what: str, found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float
) -> None:
    for part in found.keys() & expected.keys():
        error = float((found[part].cpu().double() - expected[part]).abs().max())
        scale = float(expected[part].abs().max())
        assert error <= tolerance * scale, f"{part} of {what} is off by {error / scale:.2g}"


def _evaluate(operation: Operation, batch: Batch) -> dict[str, Tensor]:
    loss = operation(*batch)
    if loss is not None:
        loss.backward()
    gradients = [part.grad for part in batch[:2]]
    values = {"states' gradient": gradients[0], "table's gradient": gradients[1]}
    found = {name: value.to_dense() for name, value in values.items() if value is not None}
    return found if loss is None else found | {"loss": loss.detach()}


def _mean(losses: Callable[..., Tensor], **choices: Any) -> Operation:
    return lambda *batch: losses(*batch, **choices).mean()


def _cce(batch: Batch) -> Case:
    of_torch = {"torch": baselines.torch_cce} if hasattr(F, "linear_cross_entropy") else {}
    return _mean(reference.cross_entropy_reference), of_torch | {
        "ours": kernels.cut_cross_entropy,
        "eager": baselines.eager_cce,
        "chunked": partial(baselines.chunked_cce, block=100),
    }


def _cce_minus(batch: Batch) -> Case:
    N, V = len(batch[0]), len(batch[1])
    drawn = Uniform(V).draw(torch.arange(2), _K, seed=_SEED, step=0, stream=0)
    negatives = drawn[torch.arange(N) % 2]
    shared = drawn[:1].expand(N, _K)
    correction = torch.tensor(_K / V).log().expand(N, _K)
    mine = partial(kernels.sampled_cross_entropy, num_negatives=_K, share=N // 2, seed=_SEED)
    # The fair baseline has one set of draws, so it is compared with the eager one on that set.
    batches = [make_batch(N, _D, V) for _ in range(2)]
    fair = baselines.fair_cce_minus(*batches[0], drawn[0])
    assert torch.allclose(fair, baselines.eager_cce_minus(*batches[1], shared)), "fair CE- is off"
    definition = _mean(
        reference.sampled_cross_entropy_reference, negatives=negatives, corrections=correction
    )
    return definition, {
        "ours": mine,
        "ours with a sparse gradient": partial(mine, sparse_grad=True),
        "eager": partial(baselines.eager_cce_minus, negatives=negatives),
        "chunked": partial(baselines.chunked_cce_minus, negatives=negatives, block=100),
    }


def _sce(batch: Batch) -> Case:
    states, table, _ = (part.detach() for part in batch)
    centres = random_signs(0, 32, _D, seed=_SEED, step=0, stream=STREAM_MIX)
    positions = (centres @ states.T).topk(32, 1).indices
    items = (centres @ table.T).topk(_K, 1).indices
    covered = torch.bincount(positions.flatten(), minlength=len(states)) > 0
    sizes: dict[str, Any] = {"centres": centres, "b_x": 32, "b_y": _K}
    mine = partial(
        mean_sce,
        num_buckets=32,
        positions_per_bucket=32,
        items_per_bucket=_K,
        mix=False,
        seed=_SEED,
    )

    def definition(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        losses = reference.scalable_cross_entropy_reference(
            states, table, targets, positions, items
        )
        return losses.sum() / covered.sum()

    return definition, {
        "ours": mine,
        "ours with a sparse gradient": partial(mine, sparse_grad=True),
        "eager": partial(baselines.eager_sce, **sizes),
        "chunked": partial(baselines.chunked_sce, **sizes, block=5),
    }


def _rece(batch: Batch) -> Case:
    states, table, _ = (part.detach() for part in batch)
    lines = [random_signs(0, 32, _D, seed=_SEED, step=0, stream=STREAM_HASH + q) for q in (0, 1, 2)]
    plan = [baselines.chunks_of(states, table, line, reach=1) for line in lines]
    own = torch.stack([of_position for *_, of_position, _ in plan], 1)
    rows = torch.stack([of_item for *_, of_item in plan], 1)
    definition = _mean(
        reference.reduced_cross_entropy_reference, position_chunks=own, item_chunks=rows, reach=1
    )
    sizes: dict[str, Any] = {"directions": torch.stack(lines), "reach": 1}
    mine = partial(
        kernels.reduced_cross_entropy,
        num_buckets=32,
        num_rounds=3,
        num_neighbor_chunks=1,
        align="rank",
        seed=_SEED,
    )
    return definition, {
        "ours": mine,
        "eager": partial(baselines.eager_rece, **sizes),
        "chunked": partial(baselines.chunked_rece, **sizes, block=5),
    }


_CASES = {"cce": _cce, "cce_minus": _cce_minus, "sce": _sce, "rece": _rece}
