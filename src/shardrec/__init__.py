"""Sequential recommenders over huge catalogs: sharded tables, exact and sampled losses.

The stages as functions for scripts and notebooks, and the class that serves an export, are loaded
when they are first used::

    from shardrec import prepare, train, evaluate, recommend, export, Recommender
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardrec.pipeline.interactive import evaluate, export, prepare, recommend, train
    from shardrec.pipeline.serve import Recommender

__version__ = "0.2.0"
__all__ = ["Recommender", "evaluate", "export", "prepare", "recommend", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "serve" if name == "Recommender" else "interactive"
    return getattr(importlib.import_module(f"shardrec.pipeline.{module}"), name)
