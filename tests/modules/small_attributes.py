"""Attributes of a small catalog: a category, a list and a vector, known by item in plain Python."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shardrec.modules.attributes import AttributeRows, AttributeSizes, AttributeVectors

CATEGORIES, TAGS, NUMBERS = 5, 7, 3


@dataclass(frozen=True)
class SmallAttributes:
    """Every tenth item has no training events; the codes of a list follow those of the category."""

    num_items: int

    @property
    def sizes(self) -> AttributeSizes:
        return AttributeSizes(CATEGORIES + TAGS, (0, CATEGORIES), NUMBERS)

    def category(self, item: int) -> int:
        return item % CATEGORIES

    def tags(self, item: int) -> list[int]:
        return [(item + place) * place % TAGS for place in range(1, 2 + item % 3)]

    def numbers(self, item: int) -> list[float]:
        return [float(item % 4 - 1), (item % 7) / 7, 1.0]

    def rows(self, items: range) -> AttributeRows:
        codes, shares, offsets = list[int](), list[float](), [0]
        for item in items:
            tags = self.tags(item)
            codes += [self.category(item), *(CATEGORIES + tag for tag in tags)]
            shares += [1.0] + [1 / len(tags)] * len(tags)
            offsets.append(len(codes))
        vectors = torch.tensor([self.numbers(item) for item in items]).reshape(-1, NUMBERS)
        return AttributeRows(
            torch.tensor(codes, dtype=torch.int32),
            torch.tensor(shares),
            torch.tensor(offsets),
            vectors,
        )

    def trained(self, items: range) -> Tensor:
        return torch.tensor([item % 10 != 0 for item in items], dtype=torch.bool)

    def compose(self, vectors: AttributeVectors, ids: Tensor | None, kept: Tensor) -> Tensor:
        """The definition, one item after another; autograd gives the gradients."""
        values, projection = vectors.values, vectors.projection
        composed = []
        for item in range(self.num_items):
            tags = torch.stack([values[CATEGORIES + tag] for tag in self.tags(item)])
            numbers = torch.tensor(self.numbers(item), dtype=values.dtype)
            row = values[self.category(item)] + tags.mean(0) + numbers @ projection
            if ids is not None:
                row = row + ids[item] * kept[item]
            composed.append(row)
        return torch.stack(composed)
