"""Sizes and options of the encoder; does not import torch."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from shardrec.modules.option_checks import require_at_least, require_choice

__all__ = ["EncoderConfig"]


Kind = Literal["sasrec", "modern", "ligr", "hstu"]
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
            pre-norm with SwiGLU; "ligr" (eSASRec, arXiv 2508.06450) is that with a learned sigmoid
            gate on each residual branch. "hstu" (arXiv 2402.17152) has no softmax and no
            feed-forward: weights silu(q k + bias by distance), gated values.
        num_blocks: transformer blocks.
        num_heads: attention heads; must divide ``width``.
        dropout: share of activations dropped in training, on the input and in the residual
            branches.
        attention_dropout: share of attention weights dropped in training. None means ``dropout``
            for "sasrec" (as published) and 0 for the others. Above 0 a CPU stores (L, L) weights,
            which "hstu" always does.
        norm: "layer" or "rms"; None means "rms" for "modern" and "layer" for the others; "sasrec"
            has no other choice.
        positions: "learned" counts positions from the first item of a sequence,
            "learned_from_last" from the last item, as left padding does, and "rotary" rotates
            queries and keys, except for "sasrec"; None means "learned" for "sasrec" and "hstu",
            "rotary" for "modern", "learned_from_last" for "ligr", each as published.
        hidden: hidden units of the feed-forward; None means ``width`` for "sasrec" and 8/3 of it,
            rounded up to a multiple of 16, for "modern" and "ligr". "hstu" has none.
    """

    width: int
    max_length: int
    kind: Kind = "sasrec"
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
        require_choice("encoder.kind", self.kind, get_args(Kind))
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
        if self.kind == "hstu" and self.hidden is not None:
            raise ValueError(
                f"encoder.hidden must be none for kind 'hstu', got {self.hidden}; it has no "
                "feed-forward layer"
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
        own = {"modern": "rotary", "ligr": "learned_from_last"}
        return self.positions or own.get(self.kind, "learned")

    @property
    def resolved_norm(self) -> str:
        """The kind of norm, layer or rms, after None is resolved."""
        return self.norm or ("rms" if self.kind == "modern" else "layer")

    @property
    def resolved_hidden(self) -> int:
        """Hidden units of the feed-forward, after None is resolved."""
        if self.hidden is not None:
            return self.hidden
        has_gates = self.kind in ("modern", "ligr")
        return 16 * math.ceil(self.width / 6) if has_gates else self.width


def _require_share(name: str, value: float | None) -> None:
    if value is not None and not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}; 0 turns it off")
