"""A service on an export: recommendations and similar items over HTTP, with FastAPI.

    pip install fastapi uvicorn
    SHARDREC_PUBLISHED=published.json uvicorn --app-dir examples serve_fastapi:app

``published.json`` is the pointer of `shardrec publish`. When it changes, requests that come later
are answered by the new model; one that cannot be opened leaves the old one in place, and /health
says why. Each worker process opens a model of its own: not before a fork (gunicorn --preload).
"""

import logging
import math
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field

from shardrec import Recommender

RELOAD_S = 5.0
MOST_ITEMS = 1000

ItemId = int | str
Length = Annotated[int, Field(ge=1, le=MOST_ITEMS)]
Ids = Annotated[list[ItemId], Field(max_length=100_000)]


class Request(BaseModel):
    """What a client asks for: lists for one or several histories.

    Attributes:
        histories: item ids, most recent last; of unknown users an empty list.
        k: items wanted.
        filter_seen: leave out items of the history.
        allow: nothing else; None: all items.
        deny: none of them.
    """

    histories: Annotated[list[Ids], Field(min_length=1, max_length=1000)]
    k: Length = 10
    filter_seen: bool = True
    allow: Ids | None = None
    deny: Ids = []


class Item(BaseModel):
    """An item and its score; None where the list is that of the most popular items."""

    item_id: ItemId
    score: float | None


class Answer(BaseModel):
    """A list for each history, and the catalog that they come from."""

    lists: list[list[Item]]
    catalog_version: str


@dataclass(slots=True)
class Served:
    """The published model, opened again when the pointer changes.

    Attributes:
        published: the pointer, or the folder of an export.
        model: the one that answers.
        problem: why the pointer's present model could not be opened; None if it is the one.
    """

    published: Path
    model: Recommender
    changed_ns: int
    problem: str | None = None

    @classmethod
    def open(cls, published: Path) -> "Served":
        """Open the model; raises as ``Recommender.open``."""
        changed_ns = published.stat().st_mtime_ns
        return cls(published, Recommender.open(published), changed_ns)

    def reload(self) -> None:
        """Open the model again if the pointer has changed; requests go on meanwhile."""
        changed_ns = self.published.stat().st_mtime_ns
        if changed_ns == self.changed_ns:
            return
        self.changed_ns = changed_ns
        try:
            self.model, self.problem = Recommender.open(self.published), None
        except (OSError, ValueError) as error:
            self.problem = str(error)
            logging.getLogger(__name__).warning("%s is not served: %s", self.published, error)

    def watch(self, over: threading.Event) -> None:
        """Reload every few seconds until the service ends."""
        while not over.wait(RELOAD_S):
            try:
                self.reload()
            except OSError as error:  # the pointer is gone for now
                self.problem = str(error)


def create_app(published: Path) -> FastAPI:
    """The service on a pointer, or on the folder of an export."""
    torch.set_num_threads(1)  # requests are answered side by side

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.served = Served.open(published)
        over = threading.Event()
        threading.Thread(target=app.state.served.watch, args=(over,), daemon=True).start()
        yield
        over.set()

    app = FastAPI(title="shardrec", lifespan=lifespan)

    @app.post("/recommend")
    def recommend(request: Request) -> Answer:
        model = app.state.served.model
        asked = request.model_dump()
        lists = _checked(lambda: model.recommend(asked.pop("histories"), asked.pop("k"), **asked))
        return _answer(model, lists)

    @app.get("/similar/{item_id}")
    def similar(item_id: str, k: Length = 10) -> Answer:
        model = app.state.served.model
        is_number = model.ids.kind == "int64"
        lists = _checked(lambda: model.similar([int(item_id) if is_number else item_id], k))
        if not lists[0]:
            raise HTTPException(404, f"item_id must be of the catalog, got {item_id!r}")
        return _answer(model, lists)

    @app.get("/health")
    def health() -> dict[str, Any]:
        served = app.state.served
        return {"status": "ok" if served.problem is None else "old", "problem": served.problem}

    @app.get("/version")
    def version() -> dict[str, Any]:
        manifest = app.state.served.model.manifest
        return {
            "catalog_version": manifest["catalog_version"],
            "num_items": manifest["num_items"],
            "run": manifest["request"]["source"]["run"],
            "versions": manifest["versions"],
        }

    return app


def _checked(work: Callable[[], Any]) -> Any:
    """The result of a request; ids that the catalog cannot have are the client's error."""
    try:
        return work()
    except (TypeError, ValueError) as error:
        raise HTTPException(422, str(error)) from error


def _answer(model: Recommender, lists: list[list[tuple[ItemId, float]]]) -> Answer:
    return Answer(
        lists=[
            [Item(item_id=name, score=None if math.isnan(score) else score) for name, score in one]
            for one in lists
        ],
        catalog_version=model.manifest["catalog_version"],
    )


if "SHARDREC_PUBLISHED" in os.environ:
    app = create_app(Path(os.environ["SHARDREC_PUBLISHED"]))
