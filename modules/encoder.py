"""Causal transformers over item vectors: SASRec as published, and a modern variant."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardrec.modules.dropout import PositionKeys, causal_attention, dropout, random_bytes
from shardrec.modules.length_groups import LengthGroups
from shardrec.modules.option_checks import require_at_least, require_choice

__all__ = ["EncoderConfig", "TransformerEncoder", "encoder_flops", "saved_floats"]


Positions = Literal["learned", "learned_from_last", "rotary"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderConfig:
    """The sizes and options of a `TransformerEncoder`.

    Attributes:
        width: D, the length of an item vector and of a state.
        max_length: the longest sequence, in positions.
        kind: "sasrec" is the block of the SASRec paper and its public code: only the query is
            normalised, the residual adds the normalised query, attention has no output
            projection, the feed-forward is point-wise with ReLU and D hidden units. "modern" is
            pre-norm with SwiGLU.
        num_blocks: transformer blocks.
        num_heads: attention heads; must divide ``width``.
        dropout: share of activations dropped in training, on the input and in the residual
            branches.
        attention_dropout: share of attention weights dropped in training. None means ``dropout``
            for "sasrec" (as published) and 0 for "modern". Above 0 a CPU stores (L, L) weights.
        norm: "layer" or "rms"; None means "layer" for "sasrec" (the only choice there) and "rms"
            for "modern".
        positions: "learned" counts positions from the first item of a sequence,
            "learned_from_last" from the last item, as left padding does, and "rotary" rotates
            queries and keys; None means "learned" for "sasrec" (which cannot be "rotary") and
            "rotary" for "modern".
        hidden: hidden units of the feed-forward; None means ``width`` for "sasrec" and 8/3 of it,
            rounded up to a multiple of 16, for "modern".
    """

    width: int
    max_length: int
    kind: Literal["sasrec", "modern"] = "sasrec"
    num_blocks: int = 2
    num_heads: int = 1
    dropout: float = 0.2
    attention_dropout: float | None = None
    norm: Literal["layer", "rms"] | None = None
    positions: Positions | None = None
    hidden: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for an option out of range or an invalid combination."""
        for name in ("width", "max_length", "num_blocks", "num_heads", "hidden"):
            require_at_least(f"encoder.{name}", getattr(self, name), 1)
        require_choice("encoder.kind", self.kind, ("sasrec", "modern"))
        if self.norm is not None:
            require_choice("encoder.norm", self.norm, ("layer", "rms"))
        if self.positions is not None:
            require_choice("encoder.positions", self.positions, get_args(Positions))
        for name in ("dropout", "attention_dropout"):
            _require_share(f"encoder.{name}", getattr(self, name))
        self._check_combination()

    def _check_combination(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(
                f"encoder.width must be divisible by encoder.num_heads, got {self.width} and "
                f"{self.num_heads}; change one of them"
            )
        if self.kind == "sasrec" and (self.norm == "rms" or self.positions == "rotary"):
            raise ValueError(
                "encoder.norm and encoder.positions must be 'layer' and not 'rotary' for kind "
                f"'sasrec', got {self.norm!r} and {self.positions!r}; use kind 'modern'"
            )
        if self.resolved_positions == "rotary" and (self.width // self.num_heads) % 2:
            raise ValueError(
                "encoder.width / encoder.num_heads must be even for rotary positions, got "
                f"{self.width // self.num_heads}; change it or use positions 'learned'"
            )

    @property
    def resolved_attention_dropout(self) -> float:
        """The attention dropout, after None is resolved."""
        if self.attention_dropout is not None:
            return self.attention_dropout
        return self.dropout if self.kind == "sasrec" else 0.0

    @property
    def resolved_positions(self) -> str:
        """The kind of positions, after None is resolved."""
        return self.positions or ("learned" if self.kind == "sasrec" else "rotary")

    @property
    def resolved_norm(self) -> str:
        """The kind of norm, layer or rms, after None is resolved."""
        return self.norm or ("layer" if self.kind == "sasrec" else "rms")

    @property
    def resolved_hidden(self) -> int:
        """Hidden units of the feed-forward, after None is resolved."""
        if self.hidden is not None:
            return self.hidden
        return self.width if self.kind == "sasrec" else 16 * math.ceil(self.width / 6)


def saved_floats(config: EncoderConfig, length: int, *, on_cpu: bool = True) -> float:
    """Number of float32 values saved for backward per position, if all sequences have this length.

    The formula was fitted to counts by saved-tensor hooks. Dropout saves a mask and its input;
    attention weights are saved if attention dropout is used on a CPU.
    """
    width, hidden, heads = config.width, config.resolved_hidden, config.num_heads
    is_dropped, is_numbered = config.dropout > 0, config.resolved_positions != "rotary"
    stores_weights = on_cpu and config.resolved_attention_dropout > 0
    if config.kind == "sasrec":
        copied = stores_weights and heads > 1  # the scaled query is one more if not
        block = (8 - copied + is_dropped) * width + (1 + 2 * is_dropped) * hidden
        first = (1 + is_dropped) * width
    else:
        # The values of one head are a view of the projection, which is then saved whole.
        copies = 0 if heads == 1 else 1 - 3 * stores_weights
        block = (12 + copies + 2 * is_dropped) * width + 4 * hidden
        first = (2 + is_dropped) * width
    block += 3 * heads * length if stores_weights else heads
    return float(first + 2 * is_numbered + config.num_blocks * (block + 4) + 2)


def encoder_flops(config: EncoderConfig, length: int) -> float:
    """FLOP of the matrix products per position, forward and backward, with unmasked attention."""
    width, hidden = config.width, config.resolved_hidden
    modern = config.kind == "modern"
    projections = (4 if modern else 3) * width * width + (3 if modern else 2) * width * hidden
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
        block = _SASRecBlock if config.kind == "sasrec" else _ModernBlock
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
        share = self.attention_dropout if self.training else 0.0
        return causal_attention(query, key, value, share, drawn).transpose(1, 2).flatten(2)

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
        x = x + self.dropped(self.attention_out(self.attend(projected, call)), call)
        gate, inner = self.feed_forward_in(self.feed_forward_norm(x)).chunk(2, dim=-1)
        return x + self.dropped(self.feed_forward_out(F.silu(gate) * inner), call)


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


def _require_share(name: str, value: float | None) -> None:
    if value is not None and not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}; 0 turns it off")
