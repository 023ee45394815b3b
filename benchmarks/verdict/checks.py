"""Every loss by its Triton kernels against the definition in float64, in processes of their own.

A width has the tiles that production uses. Sizes that 16 divides share their compiled code with the
sizes that are timed; the others are odd on purpose.
"""

import multiprocessing as mp
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from verdict.lines import Lines, failure

from shardrec import kernels

__all__ = ["LOSSES", "Case", "cases", "check", "check_all", "options_of", "run"]

# Functions with the options that are timed.
LOSSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "cce": (kernels.cut_cross_entropy, {}),
    "cce_minus": (
        kernels.sampled_cross_entropy,
        {"num_negatives": 1024, "share": 128, "seed": 7, "sparse_grad": True},
    ),
    "cce_minus_1": (
        kernels.sampled_cross_entropy,
        {"num_negatives": 1023, "share": 1, "seed": 7, "sparse_grad": True},
    ),
    "sce": (
        kernels.scalable_cross_entropy,
        {"items_per_bucket": 256, "seed": 7, "sparse_grad": True},
    ),
    "rece": (kernels.reduced_cross_entropy, {"num_rounds": 8, "seed": 7}),
    "hce": (kernels.hybrid_cross_entropy, {"seed": 7, "sparse_grad": True}),
}
# Options of the checks, whose catalogs are smaller.
_SMALL: dict[str, dict[str, Any]] = {
    "cce_minus": {"num_negatives": 300},
    "cce_minus_1": {"num_negatives": 33},
    "sce": {"items_per_bucket": 70},
    "rece": {"num_rounds": 3},
    "hce": {"num_negatives": 64, "items_per_bucket": 64},
}
# In the interpreter, where a product takes milliseconds.
_TOY: dict[str, dict[str, Any]] = {
    "cce_minus": {"num_negatives": 24},
    "cce_minus_1": {"num_negatives": 5},
    "sce": {"items_per_bucket": 12},
    "rece": {"num_rounds": 2},
    "hce": {"num_negatives": 12, "items_per_bucket": 12},
}
_CHOOSES = ("sce", "rece", "hce")
# Of the largest number: half precision has 8 or 11 bits, and its products are rounded once.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 5e-3}
_PROCESSES = 12
Batch = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Case:
    """One loss in one dtype at one size, on a device."""

    loss: str
    dtype: str
    N: int
    D: int
    V: int
    device: str


def cases(device: str, *, toy: bool) -> list[Case]:
    """The widths and dtypes in use first, then rare ones."""
    if toy:
        return [Case(loss, "float32", 16, 16, 40, device) for loss in LOSSES]
    even, odd = (784, 1504), (777, 1501)
    sizes = {256: even, 64: odd, 128: even, 100: odd}
    found = [
        Case(loss, dtype, sizes[width][0], width, sizes[width][1], device)
        for width in sizes
        for dtype in ("bfloat16", "float32")
        for loss in LOSSES
    ]
    found += [Case(loss, "float16", 777, 64, 1501, device) for loss in ("cce", "cce_minus")]
    return [*found, Case("cce", "bfloat16", 777, 1024, 1501, device)]


def run(loss: str, batch: Batch, backend: str, **options: Any) -> list[Tensor]:
    """The mean loss and the gradients of states and table."""
    function, usual = LOSSES[loss]
    batch[0].grad = batch[1].grad = None
    found = function(*batch, backend=backend, **(usual | options))
    value = found[0] if isinstance(found, tuple) else found
    value.backward()
    gradients = [part.grad for part in batch[:2]]
    return [value.detach(), *(one for one in gradients if one is not None)]


def options_of(loss: str, device: str) -> dict[str, Any]:
    """Options of a check, or of anything in the interpreter."""
    return (_SMALL if device == "cuda" else _TOY).get(loss, {})


def check(case: Case) -> dict[str, Any]:
    """Errors of loss and gradients, relative to the largest number, and whether bits repeat."""
    began = time.monotonic()
    try:
        found = _compare(case)
    except Exception as error:  # one case that fails leaves the others alone
        found = {"ok": False, **failure(error)}
    return {**asdict(case), **found, "s": round(time.monotonic() - began, 1)}


def check_all(lines: Lines, device: str, seconds: float, *, toy: bool) -> None:
    """A line for each case that fails, and one that counts them; ends within ``seconds``."""
    wanted = cases(device, toy=toy)
    end = time.monotonic() + seconds
    rows: list[dict[str, Any]] = []
    if toy:
        rows = [check(case) for case in wanted]
    else:
        # Compiling is what takes time; a process that breaks its GPU context checks nothing more.
        with mp.get_context("spawn").Pool(_PROCESSES, maxtasksperchild=1) as pool:
            coming = pool.imap_unordered(check, wanted)
            try:
                while len(rows) < len(wanted):
                    rows.append(coming.next(timeout=max(0.1, end - time.monotonic())))
                    _say_if_bad(lines, rows[-1])
            except mp.TimeoutError:
                done = [{name: row[name] for name in asdict(wanted[0])} for row in rows]
                missing = [asdict(case) for case in wanted if asdict(case) not in done]
                lines.say("left_out", what="check", cases=missing)
    if toy:
        for row in rows:
            _say_if_bad(lines, row)
    bad = sum(not _is_good(row) for row in rows)
    worst = {dtype: _worst(rows, dtype) for dtype in _TOLERANCE}
    lines.say("checks", of=len(wanted), done=len(rows), bad=bad, worst=worst)


def _is_good(row: dict[str, Any]) -> bool:
    return bool(row["ok"] and row["same_bits"])


def _say_if_bad(lines: Lines, row: dict[str, Any]) -> None:
    if not _is_good(row):
        lines.say("check", **row)


def _worst(rows: list[dict[str, Any]], dtype: str) -> float:
    errors = [max(row["errors"]) for row in rows if row["dtype"] == dtype and "errors" in row]
    return max(errors, default=0.0)


def _compare(case: Case) -> dict[str, Any]:
    batch, options = _batch(case), options_of(case.loss, case.device)
    exact = tuple(
        part.detach().cpu().double().requires_grad_() if part.is_floating_point() else part.cpu()
        for part in batch
    )
    found = run(case.loss, batch, "triton", **options)
    expected = run(case.loss, (exact[0], exact[1], exact[2]), "torch", **options)
    errors = [_error(*pair) for pair in zip(found, expected, strict=True)]
    again = run(case.loss, batch, "triton", **options)
    same = [torch.equal(a.to_dense(), b.to_dense()) for a, b in zip(found, again, strict=True)]
    return {
        "ok": all(error <= _TOLERANCE[case.dtype] for error in errors),
        "same_bits": all(same),
        "errors": errors,
    }


def _error(found: Tensor, expected: Tensor) -> float:
    right = expected.to_dense()
    apart = (found.to_dense().cpu().double() - right).abs().max() / right.abs().max()
    return float(f"{float(apart):.2g}")


def _batch(case: Case) -> Batch:
    """States, table and targets of which few are popular.

    For a loss that chooses by scores they are eighths, whose sums are exact in every dtype, so that
    the definition chooses alike.
    """
    generator = torch.Generator().manual_seed(case.N + case.D + case.V)
    parts = [torch.randn(lines, case.D, generator=generator) for lines in (case.N, case.V)]
    parts = [part * case.D**-0.25 for part in parts]
    if case.loss in _CHOOSES:
        parts = [part.mul(8).round().div(8) for part in parts]
    skewed = case.V ** torch.rand(case.N, generator=generator, dtype=torch.float64)
    targets = skewed.long().clamp(0, case.V - 1).to(case.device)
    dtype = getattr(torch, case.dtype)
    states, table = (part.to(case.device, dtype).requires_grad_() for part in parts)
    return states, table, targets
