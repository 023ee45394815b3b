"""Results of a verdict as JSON lines, written as they come, within a budget of seconds."""

import json
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["Lines", "failure"]

Facts = Mapping[str, Any]
_MOST_TEXT = 400


class Lines:
    """A file of lines, each with its kind and the second at which it came.

    Attributes:
        rows: the lines of this run.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        """Makes the folder of the file, and starts the clock of the budget."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self._began, self._seconds = time.monotonic(), seconds

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self._seconds - (time.monotonic() - self._began)

    def say(self, kind: str, **facts: Any) -> None:
        """Writes a line and prints it."""
        at = round(time.monotonic() - self._began, 1)
        self.rows.append({"kind": kind, "at_s": at, **facts})
        text = json.dumps(self.rows[-1], default=str)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
        print(text, flush=True)

    def attempt(
        self, kind: str, facts: Facts, measure: Callable[[], Facts], *, needs: float = 0.0
    ) -> None:
        """A line with the facts and what ``measure`` finds, or why it failed or was left out.

        Args:
            kind: of the line.
            facts: what is measured.
            measure: returns the findings.
            needs: seconds that must be left.
        """
        if self.left < needs:
            self.say("left_out", what=kind, **facts, left_s=round(self.left))
            return
        try:
            found = measure()
        except Exception as error:  # whatever goes wrong is a finding
            found, kind = failure(error), f"{kind}_failed"
        self.say(kind, **facts, **found)


def failure(error: Exception) -> dict[str, Any]:
    """What was raised, and where."""
    where = traceback.format_exception(error)[-3:-1]
    return {
        "error": f"{type(error).__name__}: {error}"[:_MOST_TEXT],
        "where": [line.strip()[:_MOST_TEXT] for line in where],
    }
