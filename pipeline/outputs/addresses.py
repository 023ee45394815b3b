"""Keep access keys in addresses out of files and messages.

An address such as ``s3://KEY:SECRET@bucket/run`` holds access keys, which would otherwise be stored
with the run, shown in its report and quoted by errors.
"""

import logging
import re
from typing import Any

__all__ = ["clean", "stored_without_keys", "warn_of_keys", "without_keys"]

# All between "://" and "@": up to the first slash, or, after a colon, a secret with slashes in it.
# As a path, an address has lost a slash.
_USER_INFO = re.compile(
    r"(://|\b(?:s3a?|gc?s|hdfs|abfss?|https?):/)"
    r"(?:[^\s/?#'\"@]*|[^\s/?#'\"@:]+:(?!\d+[/?#])[^\s'\"@]*)@(?=[^\s'\"])"
)
_QUERY = re.compile(r"\?[^\s'\"#?]+=[^\s'\"#?]*")
_SECRET_NAME = re.compile("secret|token|passw|pwd|key|sig|sas|credential|auth", re.IGNORECASE)


def without_keys(text: str) -> str:
    """The text with user, password and secret query parameters removed from its addresses.

    Example:
        >>> without_keys("got 's3://KEY:SECRET@bucket/run?scheme=http&session_token=T'; check it")
        "got 's3://bucket/run?scheme=http'; check it"
        >>> without_keys("s3:/KEY:SECRET@bucket/run")
        's3:/bucket/run'
    """
    return _QUERY.sub(lambda found: _cleaned(found[0]), _USER_INFO.sub(r"\1", text))


def stored_without_keys(value: Any) -> Any:
    """A JSON value with ``without_keys`` applied to every text in it."""
    if isinstance(value, str):
        return without_keys(value)
    if isinstance(value, dict):
        return {name: stored_without_keys(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(stored_without_keys(one) for one in value)
    return value


def clean(record: logging.LogRecord) -> bool:
    """Filter of a logger: applies ``without_keys`` to each message, and keeps all of them."""
    record.msg, record.args = without_keys(record.getMessage()), None
    return True


def warn_of_keys(name: str, address: str | None) -> None:
    """Warn if the option ``name`` holds keys, which every user of the machine can see."""
    if address is not None and without_keys(address) != address:
        logging.getLogger(__name__).warning(
            "%s holds keys, which process lists and shell histories show; they are left out of "
            "files and messages, so later stages need them from the environment anyway "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or MLFLOW_TRACKING_TOKEN): give them "
            "there",
            name,
        )


def _cleaned(query: str) -> str:
    """A query, with its "?", without the secret parameters."""
    parts = query[1:].split("&")
    kept = [part for part in parts if not _SECRET_NAME.search(part.partition("=")[0])]
    return f"?{'&'.join(kept)}" if kept else ""
