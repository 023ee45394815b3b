"""A loss as a pair of custom operators of PyTorch.

``shardrec::<loss>`` and ``shardrec::<loss>_backward`` are opaque to torch.compile. The first one
returns what is saved for backward as tensors, after the loss, because a graph can save only
tensors.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import wraps
from typing import Any, TypeVar, cast, get_type_hints

import torch
from torch import Tensor

from shardrec.kernels.loss.candidates import Candidates
from shardrec.kernels.loss.fused import fake_gradients, fused_blocks
from shardrec.kernels.loss.inputs import Inputs, prepare_inputs, restore_inputs, shape_error
from shardrec.kernels.loss.options import SCHEMA_TYPES, Common, OperatorOptions, autocast_dtype
from shardrec.kernels.loss.passes import backward, forward
from shardrec.kernels.shard import RowShard

__all__ = ["Operator"]

# When the gradient is computed.
_NEVER, _IN_FORWARD, _IN_BACKWARD = "never", "in_forward", "in_backward"

FusedLoss = Callable[[Inputs, Tensor], tuple[Tensor, Tensor, Tensor]]
"""Maps inputs and (N,) coefficients to the loss and the gradients of scaled states and rows."""

Kernel = TypeVar("Kernel", bound=Callable[..., Any])


def _without_autocast(kernel: Kernel) -> Kernel:
    """Turns autocast off inside ``kernel``, where each operation chooses its dtype itself."""

    @wraps(kernel)
    def run(self: Any, first: Tensor, *args: Any) -> Any:
        device = first.device.type
        if not torch.is_autocast_enabled(device):
            return kernel(self, first, *args)
        with torch.autocast(device, enabled=False):
            return kernel(self, first, *args)

    return cast(Kernel, run)


# By operator; dropping one unregisters it, so that a module can be loaded again.
_LIBRARIES: dict[str, torch.library.Library] = {}


def _registered(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    differentiate: Callable[..., Any],
    keep: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """The operator of a schema: its kernel on all devices, its fake kernel and its gradient.

    ``torch.library.custom_op`` would import TorchDynamo in the first call of every process, which
    takes 1.8 CPU seconds: a quarter of a full softmax of 4,096 positions over 100,000 rows.
    """
    name = schema.partition("(")[0]
    _LIBRARIES.pop(name, None)
    library = _LIBRARIES[name] = torch.library.Library("shardrec", "FRAGMENT")
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, _unseen_by_dynamo(kernel), "CompositeExplicitAutograd")
    full_name = f"shardrec::{name}"
    torch.library.register_fake(full_name, fake, lib=library)
    torch.library.register_autograd(full_name, differentiate, setup_context=keep, lib=library)
    overload: Callable[..., Any] = getattr(torch.ops.shardrec, name).default
    return overload


def _unseen_by_dynamo(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel, which TorchDynamo, if anything imported it, does not trace."""
    hidden: list[Callable[..., Any]] = []

    def run(*args: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return kernel(*args)
        if not hidden:
            hidden.append(torch.compiler.disable(kernel))
        return hidden[0](*args)

    return run


class Operator:
    """A loss as a callable: custom operators with autograd and fake-tensor support."""

    def __init__(
        self, name: str, candidates: type[Candidates], fused: FusedLoss | None = None
    ) -> None:
        """Registers the two operators of a loss with PyTorch.

        Args:
            name: Name of the public function.
            candidates: A dataclass; its fields become arguments of the operators.
            fused: Computes loss and gradients in one pass; None: ``fused_blocks``.
        """
        self._name = name
        self._candidates = candidates
        self._fused = fused
        types = get_type_hints(OperatorOptions)
        hints = get_type_hints(candidates)
        self._fields = tuple(field.name for field in fields(candidates))  # type: ignore[arg-type]
        types |= {field: hints[field] for field in self._fields}
        options = ", ".join(f"{SCHEMA_TYPES[kind]} {field}" for field, kind in types.items())
        inputs = "Tensor states, Tensor rows, Tensor targets"
        self._forward_overload = _registered(
            f"{name}({inputs}, Tensor? weights, Tensor[] tables, {options}) "
            "-> (Tensor loss, Tensor covered, Tensor[] saved)",
            self._forward,
            self._fake_forward,
            self._differentiate,
            self._keep,
        )
        self._backward_overload = _registered(
            f"{name}_backward(Tensor grad, {inputs}, Tensor[] tables, Tensor[] saved, {options}) "
            "-> (Tensor grad_states, Tensor grad_rows)",
            self._backward,
            self._fake_backward,
            self._refuse_second_derivative,
        )

    def __call__(
        self,
        states: Tensor,
        table: Tensor | RowShard,
        targets: Tensor,
        common: Common,
        candidates: Candidates,
        tables: Sequence[Tensor] = (),
        *,
        fuse: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """() or (N,) float32 loss by ``common.reduction``, and (N,) bool mask of covered positions.

        Args:
            states: (N, D).
            table: (V, D), or this rank's shard of it.
            targets: (N,).
            common: The arguments that all losses have.
            candidates: How the loss chooses candidates.
            tables: Tensors that ``candidates`` needs.
            fuse: Compute the gradient, if one is required, in the forward pass.
        """
        shard = table if isinstance(table, RowShard) else RowShard(table, 0, table.shape[0])
        if common.weights is not None and common.weights.requires_grad:
            raise ValueError(
                "weights must not require a gradient, got some that do; detach them, or multiply "
                "the losses of reduction='none'"
            )
        gradient = _NEVER
        if torch.is_grad_enabled() and (states.requires_grad or shard.rows.requires_grad):
            gradient = _IN_FORWARD if fuse and common.reduction != "none" else _IN_BACKWARD
        if common.sparse_grad and gradient != _NEVER and torch.compiler.is_compiling():
            raise ValueError(
                "sparse_grad must be False in a compiled graph, got True; a graph cannot return a "
                "sparse gradient, so call the loss outside of it or use a dense one"
            )
        loss, covered, _ = self._forward_overload(
            states,
            shard.rows,
            targets,
            common.weights,
            list(tables),
            shard.first_row,
            shard.num_rows,
            "" if shard.group is None else shard.group.group_name,
            common.reduction,
            common.normalize,
            common.temperature,
            common.backend,
            common.sparse_grad,
            autocast_dtype(states),
            gradient,
            *[getattr(candidates, field) for field in self._fields],
        )
        return loss, covered

    def _unpack(self, values: Sequence[Any]) -> tuple[OperatorOptions, Candidates]:
        num_options = len(values) - len(self._fields)
        named = dict(zip(self._fields, values[num_options:], strict=True))
        return OperatorOptions(*values[:num_options]), self._candidates(**named)

    @_without_autocast
    def _forward(
        self,
        states: Tensor,
        rows: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        tables: list[Tensor],
        *values: Any,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        options, candidates = self._unpack(values)
        inputs = prepare_inputs(
            states,
            options.shard(rows),
            targets,
            weights=weights,
            reduction=options.reduction,
            scaling=options.scaling,
            backend=options.backend,
        )
        if options.gradient == _IN_FORWARD:
            covered = torch.ones_like(targets, dtype=torch.bool)
            coefficients = inputs.coefficients(options.reduction)
            if self._fused is not None:
                total, *saved = self._fused(inputs, coefficients)
            else:
                total, *saved = fused_blocks(
                    inputs, candidates, tables, coefficients, options.sparse_grad
                )
            saved[0] = options.scaling.states_gradient(states, saved[0])
            saved[1] = options.scaling.rows_gradient(rows, saved[1])
            return inputs.ranks.sum(total), covered, saved
        copies_rows = options.copies_rows(rows)
        loss, covered, by_name = forward(
            inputs, candidates, tables, options.reduction, copies_rows=copies_rows
        )
        if options.gradient == _NEVER:
            return loss, covered, []
        return loss, covered, [by_name[name] for name in options.saved_names(candidates, rows)]

    def _fake_forward(
        self,
        states: Tensor,
        rows: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        tables: list[Tensor],
        *values: Any,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        options, candidates = self._unpack(values)
        error = shape_error(states, rows, targets, weights, options.reduction, options.scaling)
        if error:
            raise error
        num_losses = list(targets.shape) if options.reduction == "none" else []
        loss = states.new_empty(num_losses, dtype=torch.float32)
        covered = torch.empty_like(targets, dtype=torch.bool)
        if options.gradient == _NEVER:
            return loss, covered, []
        if options.gradient == _IN_FORWARD:
            return loss, covered, fake_gradients(states, rows, options.sparse_grad)
        return loss, covered, options.fake_saved(candidates, states, rows)

    @_without_autocast
    def _backward(
        self,
        grad: Tensor,
        states: Tensor,
        rows: Tensor,
        targets: Tensor,
        tables: list[Tensor],
        saved: list[Tensor],
        *values: Any,
    ) -> tuple[Tensor, Tensor]:
        options, candidates = self._unpack(values)
        if options.gradient == _IN_FORWARD:
            # An operator must not change its inputs: in a traced graph, and only there, the
            # gradient of the table is copied once.
            return saved[0] * grad, saved[1] * grad
        by_name = dict(zip(options.saved_names(candidates, rows), saved, strict=True))
        shard, sizes = options.shard(rows), by_name.get("sizes")
        inputs = restore_inputs(states, shard, targets, options.scaling, options.backend, sizes)
        grad_states, grad_rows = backward(inputs, candidates, tables, by_name, grad)
        grad_states = options.scaling.states_gradient(states, grad_states)
        if "used" not in by_name:
            return grad_states, options.scaling.rows_gradient(rows, grad_rows)
        grad_rows = options.scaling.rows_gradient(by_name["used_rows"], grad_rows)
        if options.sparse_grad:
            return grad_states, grad_rows
        total = rows.new_zeros(rows.shape)
        return grad_states, total.index_copy_(0, by_name["used"], grad_rows)

    def _fake_backward(
        self,
        grad: Tensor,
        states: Tensor,
        rows: Tensor,
        targets: Tensor,
        tables: list[Tensor],
        saved: list[Tensor],
        *values: Any,
    ) -> tuple[Tensor, Tensor]:
        options, _ = self._unpack(values)
        grad_states, grad_rows, *_ = fake_gradients(states, rows, options.sparse_grad)
        return grad_states, grad_rows

    def _keep(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        states, rows, targets, _, tables, *values = inputs
        _, covered, saved = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(covered, *saved)
        ctx.save_for_backward(states, rows, targets, *tables, *saved)
        ctx.num_tables, ctx.values, ctx.is_spent = len(tables), values, False

    def _differentiate(self, ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        """Gradients of states and rows; those that forward took are scaled in place."""
        options, candidates = self._unpack(ctx.values)
        if ctx.is_spent:
            raise RuntimeError(
                f"backward of {self._name} must run once, got a second call; use reduction='none', "
                "which keeps the tensors that a second one needs"
            )
        states, rows, targets, *rest = ctx.saved_tensors
        tables, saved = rest[: ctx.num_tables], rest[ctx.num_tables :]
        # A graph that is traced holds no plain tensors and cannot scale in place.
        in_place = type(grad) is Tensor and not torch.is_grad_enabled()
        if options.gradient == _IN_FORWARD and in_place:
            ctx.is_spent = True
            grad_states, grad_rows = _scaled(saved[:2], grad)
        else:
            grad_states, grad_rows = self._backward_overload(
                grad, states, rows, targets, tables, saved, *ctx.values
            )
        if options.sparse_grad:
            place = 2  # after both gradients
            if options.gradient == _IN_BACKWARD:
                place = options.saved_names(candidates, rows).index("used")
            grad_rows = torch.sparse_coo_tensor(
                saved[place][None], grad_rows, rows.shape, is_coalesced=True, check_invariants=False
            )
        nothing = (None,) * len(ctx.values)
        return grad_states, grad_rows, None, None, [None] * len(tables), *nothing

    def _refuse_second_derivative(self, ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        raise RuntimeError(
            f"{self._name} must be differentiated once, got a second derivative; use "
            "F.cross_entropy over a few positions instead"
        )


def _scaled(gradients: list[Tensor], factor: Tensor) -> list[Tensor]:
    if float(factor) != 1.0:
        for gradient in gradients:
            gradient.mul_(factor)
    return gradients
