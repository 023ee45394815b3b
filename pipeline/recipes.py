"""Complete configs to start from: each is a function of the prepared folder and the run folder.

Copy one into your own code, or change its options by dotted names on the command line. Tables of
fewer than a million items are trained with Adam, larger ones with row-wise Adagrad, which keeps one
number per row. Dropout, batch size and length follow the published SASRec settings, unless a recipe
gives a reason not to.
"""

from typing import Protocol

from shardrec.modules.catalog_config import CatalogConfig
from shardrec.modules.encoder import EncoderConfig
from shardrec.modules.losses import CCE, CCEMinus
from shardrec.pipeline.default_recipe import default
from shardrec.pipeline.model.config import MeasureConfig
from shardrec.pipeline.near_names import unknown_name
from shardrec.pipeline.prepared.loader import BatchConfig
from shardrec.pipeline.run.config import LimitConfig, OptimizerConfig, TrainConfig, ValidationConfig

__all__ = [
    "RECIPES",
    "Recipe",
    "beauty",
    "default",
    "demo",
    "epinions",
    "large_catalog",
    "recipe_named",
    "tiny_cpu",
]


class Recipe(Protocol):
    """A function from the prepared folder ``data`` and the run folder ``output`` to a config."""

    __name__: str

    def __call__(self, data: str, output: str) -> TrainConfig:
        """The complete config."""
        ...


def tiny_cpu(data: str, output: str) -> TrainConfig:
    """Twenty steps of a tiny model: a smoke test, whose losses must not change in a refactoring."""
    return TrainConfig(
        data=data,
        output=output,
        loss=CCE(),
        catalog=CatalogConfig(optimizer="rowwise_adagrad", learning_rate=0.05),
        encoder=EncoderConfig(width=16, max_length=16, dropout=0.1),
        batches=BatchConfig(batch_size=32),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        limits=LimitConfig(max_epochs=None, max_steps=20),
        validation=ValidationConfig(every_epochs=None, every_steps=10),
        device="cpu",
    )


def demo(data: str, output: str) -> TrainConfig:
    """A config that trains in a minute on two CPU cores, for about ten thousand items."""
    return TrainConfig(
        data=data,
        output=output,
        loss=CCEMinus(num_negatives=1024, share=128),
        catalog=CatalogConfig(optimizer="adam", learning_rate=2e-3, betas=(0.9, 0.98)),
        encoder=EncoderConfig(width=64, max_length=20, dropout=0.1),
        batches=BatchConfig(batch_size=256, windows="all"),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=20, clip_norm=5.0),
        limits=LimitConfig(max_epochs=10),
        validation=ValidationConfig(every_epochs=2, patience=2),
    )


def beauty(data: str, output: str) -> TrainConfig:
    """Amazon Beauty 2014 (12,101 items, 5-core), leave-one-out, as SASRec is usually reported."""
    return TrainConfig(
        data=data,
        output=output,
        loss=CCE(),
        catalog=CatalogConfig(optimizer="adam", learning_rate=3e-3, betas=(0.9, 0.98)),
        encoder=EncoderConfig(width=64, max_length=50, num_heads=1, dropout=0.5),
        batches=BatchConfig(batch_size=128),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=100, decay="cosine"),
        limits=LimitConfig(max_epochs=16),
        validation=ValidationConfig(
            every_epochs=2, patience=5, measure=MeasureConfig(ks=(10,), filter_seen=True)
        ),
    )


def epinions(data: str, output: str) -> TrainConfig:
    """Epinions (296,277 items), split by time: a tail so long that most items have few events."""
    return TrainConfig(
        data=data,
        output=output,
        loss=CCEMinus(num_negatives=4096, share=128),
        catalog=CatalogConfig(optimizer="adam", learning_rate=1e-3, betas=(0.9, 0.98)),
        encoder=EncoderConfig(width=64, max_length=50, dropout=0.3),
        batches=BatchConfig(batch_size=256),
        optimizer=OptimizerConfig(learning_rate=1e-3, clip_norm=5.0),
        limits=LimitConfig(max_epochs=20),
        validation=ValidationConfig(every_epochs=1, patience=4),
    )


def large_catalog(data: str, output: str) -> TrainConfig:
    """Millions of items on GPUs: sampled softmax with half of the negatives from the batch."""
    return TrainConfig(
        data=data,
        output=output,
        loss=CCEMinus(num_negatives=16_384, share=128, proposal="mixed"),
        catalog=CatalogConfig(optimizer="rowwise_adagrad", learning_rate=0.02),
        encoder=EncoderConfig(
            kind="modern", width=256, max_length=200, num_blocks=4, num_heads=4, dropout=0.1
        ),
        batches=BatchConfig(batch_size=4096, windows="all"),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, warmup_steps=1000, decay="cosine", clip_norm=1.0
        ),
        limits=LimitConfig(max_epochs=5),
        validation=ValidationConfig(every_epochs=1, patience=2),
    )


_ALL: tuple[Recipe, ...] = (default, demo, tiny_cpu, beauty, epinions, large_catalog)
RECIPES: dict[str, Recipe] = {recipe.__name__: recipe for recipe in _ALL}


def recipe_named(name: str) -> Recipe:
    """The recipe with this name.

    Raises:
        ValueError: there is no recipe of that name.
    """
    if name not in RECIPES:
        raise ValueError(unknown_name("recipe", name, list(RECIPES)))
    return RECIPES[name]
