"""Causal transformers over item vectors: SASRec as published, and newer kinds of block."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardrec.modules.dropout import (
    PositionKeys,
    causal_attention,
    dropout,
    pointwise_attention,
    random_bytes,
)
from shardrec.modules.encoder_config import EncoderConfig
from shardrec.modules.length_groups import LengthGroups

__all__ = ["EncoderConfig", "TransformerEncoder", "encoder_flops", "saved_floats"]


def saved_floats(config: EncoderConfig, length: int, *, on_cpu: bool = True) -> float:
    """Number of float32 values saved for backward per position, if all sequences have this length.

    The formula was fitted to counts by saved-tensor hooks. Dropout saves a mask and its input;
    attention weights are saved if attention dropout is used on a CPU.
    """
    width, hidden, heads = config.width, config.resolved_hidden, config.num_heads
    is_dropped, is_numbered = config.dropout > 0, config.resolved_positions != "rotary"
    stores_weights = on_cpu and config.resolved_attention_dropout > 0
    weights = 3 * heads * length if stores_weights else heads
    first = (1 + is_dropped) * width
    if config.kind == "sasrec":
        copied = stores_weights and heads > 1  # the scaled query is one more if not
        block = (8 - copied + is_dropped) * width + (1 + 2 * is_dropped) * hidden
    elif config.kind == "hstu":
        copied = heads > 1  # query, key and value of each head
        block = (13 + 3 * copied + is_dropped) * width
        weights = (2 + (config.resolved_attention_dropout > 0)) * heads * length
    else:
        # The values of one head are a view of the projection, which is then saved whole.
        copies = 0 if heads == 1 else 1 - 3 * stores_weights
        if is_numbered:  # queries and keys are views too, unless they are scaled or rotated
            copies = (stores_weights and heads == 1) - 2
        block = (12 + copies + 2 * is_dropped) * width + 4 * hidden
        if config.kind == "ligr":
            block += 4 * width
        if config.resolved_norm == "rms":  # which saves its normalised input too
            first += width
        else:
            block -= 2 * width
    block += weights
    return float(first + 2 * is_numbered + config.num_blocks * (block + 4) + 2)


def encoder_flops(config: EncoderConfig, length: int) -> float:
    """FLOP of the matrix products per position, forward and backward, with unmasked attention."""
    width, hidden = config.width, config.resolved_hidden
    # Products of D x D weights, and of weights to and from the hidden units.
    square, inner = {"sasrec": (3, 2), "modern": (4, 3), "ligr": (6, 3), "hstu": (5, 0)}[
        config.kind
    ]
    projections = square * width * width + inner * width * hidden
    return 6.0 * config.num_blocks * (projections + 2 * length * width)


class TransformerEncoder(nn.Module):
    """A causal transformer from item vectors to states: (B, L, D) -> (B, L, D).

    Sequences are padded on the right. A real position then never attends to padding, so no key mask
    is needed; the caller must drop the states at padded positions. ``packed`` takes real positions
    only, and pads them for attention alone. Item vectors are multiplied by sqrt(D) first.

    Learned positions are counted from the first item; with "learned_from_last" the last item of the
    window has position ``max_length - 1``, as in the published SASRec, which pads on the left. A
    state then does not depend on later items themselves, but on their number.
    """

    def __init__(self, config: EncoderConfig, *, seed: int = 0) -> None:
        """Builds the blocks and initialises their weights.

        Args:
            config: sizes and kind.
            seed: seed of the initial weights; equal seeds give equal weights on every rank.
        """
        super().__init__()
        self.config = config
        width = config.width
        self.position_vectors: nn.Parameter | None = None
        if config.resolved_positions != "rotary":
            self.position_vectors = nn.Parameter(torch.empty(config.max_length, width))
        self.rotary = _Rotary(config) if config.resolved_positions == "rotary" else None
        block = _KINDS[config.kind]
        self.blocks = nn.ModuleList(block(config) for _ in range(config.num_blocks))
        self.final_norm = _build_norm(config)
        self._draw_weights(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _draw_weights(self, generator: torch.Generator) -> None:
        for block in self.blocks:
            assert isinstance(block, _Block)
            for linear, num_fused in block.projections():
                for part in linear.weight.chunk(num_fused):  # as if they were not fused
                    nn.init.xavier_uniform_(part, generator=generator)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
            if isinstance(block, _ModernBlock):
                # Keeps the variance of the residual near one at the start, at any depth.
                for branch in (block.attention_out, block.feed_forward_out):
                    branch.weight.mul_(1 / math.sqrt(2 * len(self.blocks)))
        if self.position_vectors is not None:
            nn.init.xavier_uniform_(self.position_vectors, generator=generator)

    def forward(self, vectors: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B, L, D) states of all positions.

        Args:
            vectors: (B, L, D) float item vectors in time order, padded on the right; L is at most
                ``max_length``, B may be 0.
            lengths: (B,) int64 number of real positions of each sequence, which only
                "learned_from_last" reads; None: all L.

        Returns:
            (B, L, D); gradients flow to ``vectors``. Float32 under autocast.

        Raises:
            ValueError: the shape does not fit the config.

        Collectives: none.
        """
        self._check(vectors)
        if vectors.numel() == 0:  # attention kernels refuse empty batches on some devices
            return vectors + sum(parameter.sum() * 0 for parameter in self.parameters())
        if lengths is None:
            lengths = torch.ones_like(vectors[..., 0], dtype=torch.int64).sum(1)
        return self.packed(vectors, LengthGroups.single(lengths, vectors.shape[1]))

    def packed(
        self, vectors: Tensor, groups: LengthGroups, keys: PositionKeys | None = None
    ) -> Tensor:
        """(N, D) states at N real positions; only attention works on padded sequences.

        Args:
            vectors: (N, D) float item vectors in the order of ``groups``, N at least 1; with
                ``LengthGroups.single``, vectors and result are (B, L, D).
            groups: groups of sequences of similar length.
            keys: keys that determine the dropout masks in training on a CPU; None draws them from
                torch's generator.
        """
        if self.training and keys is None:
            keys = PositionKeys.drawn(vectors.shape[:-1], vectors.device)
        call = _Call(groups, self.rotary, keys if self.training else None)
        x = vectors * math.sqrt(self.config.width)
        if self.position_vectors is not None:
            x = x + F.embedding(self._numbers(groups), self.position_vectors)
        x = dropout(x, self.config.dropout, call.next_keys())
        for block in self.blocks:
            x = block(x, call)
        states: Tensor = self.final_norm(x)
        return states

    @property
    def reads_lengths(self) -> bool:
        """Whether states depend on the ``lengths`` given to ``forward``."""
        return self.config.resolved_positions == "learned_from_last"

    def _numbers(self, groups: LengthGroups) -> Tensor:
        """(N,), (L,) or (B, L) int64 row of ``position_vectors`` for each position."""
        first = self.config.max_length - groups.lengths if self.reads_lengths else 0
        return (first + groups.indices).clamp(max=self.config.max_length - 1)  # for padding

    def _check(self, vectors: Tensor) -> None:
        config = self.config
        if vectors.dim() != 3 or vectors.shape[2] != config.width:
            raise ValueError(
                f"vectors must be of shape (B, L, {config.width}), got {tuple(vectors.shape)}; "
                "check that encoder.width is the width of the catalog"
            )
        if vectors.shape[1] > config.max_length:
            raise ValueError(
                f"sequences must have at most {config.max_length} positions, got "
                f"{vectors.shape[1]}; cut them or raise encoder.max_length"
            )


@dataclass(frozen=True, slots=True)
class _Call:
    """What the blocks share in one call of the encoder; ``keys`` is None outside training."""

    groups: LengthGroups
    rotary: _Rotary | None
    keys: PositionKeys | None

    def next_keys(self) -> Tensor | None:
        return None if self.keys is None else self.keys.next()


class _Block(nn.Module, ABC):
    """Causal attention and dropout, for both kinds of block.

    Optimizer states are stored by the order of the parameters: keep it.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.attention_dropout = config.resolved_attention_dropout
        self.attention_norm = _build_norm(config)

    @abstractmethod
    def projections(self) -> list[tuple[nn.Linear, int]]:
        """Each linear layer, and the number of projections fused in it."""

    def attend(self, projected: Tensor, call: _Call) -> Tensor:
        """(N, D) attention of the (N, 3 D) query, key and value."""
        values, keys = [projected], call.next_keys()
        if keys is not None and self.attention_dropout > 0 and keys.device.type == "cpu":
            of_heads = keys[..., None] + torch.arange(self.num_heads)
            values.append(random_bytes(of_heads, call.groups.longest))  # (N, heads, L)
        return call.groups.apply(partial(self._attend_in_group, call.rotary), *values)

    def _attend_in_group(
        self, rotary: _Rotary | None, projected: Tensor, drawn: Tensor | None = None
    ) -> Tensor:
        """(b, l, D) attention of the (b, l, 3 D) query, key and value of a group."""
        length, num_heads = projected.shape[1], self.num_heads
        query, key, value = projected.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
        if rotary is not None:
            query, key = _rotate(query, rotary(length)), _rotate(key, rotary(length))
        if drawn is not None:
            drawn = drawn[..., :length].transpose(1, 2)
        return self.mixed(query, key, value, drawn).transpose(1, 2).flatten(2)

    def mixed(self, query: Tensor, key: Tensor, value: Tensor, drawn: Tensor | None) -> Tensor:
        """(b, heads, l, D / heads) values mixed by the products of query and key."""
        return causal_attention(query, key, value, self.attention_share, drawn)

    @property
    def attention_share(self) -> float:
        """Share of attention weights to drop now."""
        return self.attention_dropout if self.training else 0.0

    def dropped(self, values: Tensor, call: _Call) -> Tensor:
        return dropout(values, self.dropout, call.next_keys())


class _SASRecBlock(_Block):
    """The published block: both residuals add the *normalised* input."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        width, hidden = config.width, config.resolved_hidden
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.feed_forward_norm = _build_norm(config)
        self.feed_forward_in = nn.Linear(width, hidden)
        self.feed_forward_out = nn.Linear(hidden, width)

    def projections(self) -> list[tuple[nn.Linear, int]]:
        single = (self.query, self.feed_forward_in, self.feed_forward_out)
        return [(self.key_value, 2), *((linear, 1) for linear in single)]

    def forward(self, x: Tensor, call: _Call) -> Tensor:
        normed = self.attention_norm(x)
        projected = torch.cat((self.query(normed), self.key_value(x)), dim=-1)
        normed = self.feed_forward_norm(normed + self.attend(projected, call))
        inner = self.dropped(F.relu(self.feed_forward_in(normed)), call)
        added: Tensor = normed + self.dropped(self.feed_forward_out(inner), call)
        return added


class _ModernBlock(_Block):
    """Pre-norm attention with one fused projection for query, key and value, then SwiGLU."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        width, hidden = config.width, config.resolved_hidden
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.feed_forward_norm = _build_norm(config)
        self.feed_forward_in = nn.Linear(width, 2 * hidden, bias=False)
        self.feed_forward_out = nn.Linear(hidden, width, bias=False)

    def projections(self) -> list[tuple[nn.Linear, int]]:
        single = (self.attention_out, self.feed_forward_out)
        fused = [(self.query_key_value, 3), (self.feed_forward_in, 2)]
        return [*fused, *((linear, 1) for linear in single)]

    def forward(self, x: Tensor, call: _Call) -> Tensor:
        projected = self.query_key_value(self.attention_norm(x))
        x = self.added(x, self.dropped(self.attention_out(self.attend(projected, call)), call), 0)
        gate, inner = self.feed_forward_in(self.feed_forward_norm(x)).chunk(2, dim=-1)
        return self.added(x, self.dropped(self.feed_forward_out(F.silu(gate) * inner), call), 1)

    def added(self, x: Tensor, branch: Tensor, index: int) -> Tensor:
        """The residual sum after attention, 0, or after the feed-forward, 1."""
        return x + branch


class _LiGRBlock(_ModernBlock):
    """The modern block with a gate on each branch: x + sigmoid(G x + g) * branch."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.gates = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(2))

    def projections(self) -> list[tuple[nn.Linear, int]]:
        gates = [(gate, 1) for gate in self.gates if isinstance(gate, nn.Linear)]
        return [*super().projections(), *gates]

    def added(self, x: Tensor, branch: Tensor, index: int) -> Tensor:
        gate: Tensor = self.gates[index](x).sigmoid()
        return x + gate * branch


class _HSTUBlock(_Block):
    """Pre-norm pointwise attention with a normalized, gated output; no feed-forward."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        width = config.width
        self.gate_query_key_value = nn.Linear(width, 4 * width, bias=False)
        self.distance_bias = nn.Parameter(torch.zeros(config.max_length))
        self.mixed_norm = _build_norm(config)
        self.attention_out = nn.Linear(width, width)

    def projections(self) -> list[tuple[nn.Linear, int]]:
        return [(self.gate_query_key_value, 4), (self.attention_out, 1)]

    def mixed(self, query: Tensor, key: Tensor, value: Tensor, drawn: Tensor | None) -> Tensor:
        share = self.attention_share
        return pointwise_attention(query, key, value, self.distance_bias, share, drawn)

    def forward(self, x: Tensor, call: _Call) -> Tensor:
        projected = F.silu(self.gate_query_key_value(self.attention_norm(x)))
        gate, projected = projected.split([x.shape[-1], 3 * x.shape[-1]], dim=-1)
        gated = gate * self.mixed_norm(self.attend(projected, call))
        added: Tensor = x + self.attention_out(self.dropped(gated, call))
        return added


_KINDS: dict[str, type[_Block]] = {
    "sasrec": _SASRecBlock,
    "modern": _ModernBlock,
    "ligr": _LiGRBlock,
    "hstu": _HSTUBlock,
}


class _Rotary(nn.Module):
    """Cosines and sines of the rotation angles of queries and keys."""

    angles: Tensor

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        half = config.width // config.num_heads // 2
        frequencies = 10_000.0 ** (-torch.arange(half, dtype=torch.float32) / half)
        angles = torch.outer(torch.arange(config.max_length, dtype=torch.float32), frequencies)
        self.register_buffer(
            "angles", torch.stack((angles.cos(), angles.sin()), 1), persistent=False
        )

    def forward(self, length: int) -> Tensor:
        return self.angles[:length]  # (L, 2, D / heads / 2); torch.export needs L first


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + half]) of (B, heads, L, D / heads) by its position's angle."""
    cosine, sine = rotation.to(x.dtype).unbind(1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, first * sine + second * cosine), dim=-1)


def _build_norm(config: EncoderConfig) -> nn.Module:
    if config.resolved_norm == "rms":
        return nn.RMSNorm(config.width, eps=1e-6)
    return nn.LayerNorm(config.width, eps=1e-8 if config.kind == "sasrec" else 1e-6)
