"""RePlay's SASRec as the benchmarks build it; imported with the python of its environment."""

from typing import Any

from replay.data import FeatureHint, FeatureSource, FeatureType
from replay.data.nn import TensorFeatureInfo, TensorFeatureSource, TensorSchema
from replay.nn.sequential.sasrec import SasRec

__all__ = ["build"]


def build(job: dict[str, Any], num_items: int, dropout: float) -> tuple[TensorSchema, SasRec]:
    """The schema of one item sequence, and a SASRec of two blocks with two heads.

    Args:
        job: Its "width" and "length" are those of the model.
        num_items: V; also the index of padding.
        dropout: Share of activations dropped in training.
    """
    schema = TensorSchema(
        [
            TensorFeatureInfo(
                "item_id",
                is_seq=True,
                feature_type=FeatureType.CATEGORICAL,
                embedding_dim=job["width"],
                padding_value=num_items,
                cardinality=num_items,
                feature_hint=FeatureHint.ITEM_ID,
                feature_sources=[TensorFeatureSource(FeatureSource.INTERACTIONS, "item_id")],
            )
        ]
    )
    model = SasRec.from_params(
        schema,
        embedding_dim=job["width"],
        num_heads=2,
        num_blocks=2,
        max_sequence_length=job["length"],
        dropout=dropout,
    )
    return schema, model
