"""Sign manifests: a signature proves who wrote an output, a checksum only that it is intact.

A manifest holds the checksums of its files, so its signature covers them too. The signature is
HMAC-SHA256 with one key for writers and readers, in the environment variable SHARDREC_SIGNING_KEY.
While it is set, exports, checkpoints and pointers are signed, and those without a valid signature
are refused. This is the only file outside of ``launch/`` that reads the environment: if the key had
to be passed to every reader, one of them would be forgotten.
"""

import hashlib
import hmac
import json
import os
from typing import Any

__all__ = ["KEY", "SignatureError", "require_signature", "signed"]

KEY = "SHARDREC_SIGNING_KEY"
_SIGNATURE = "signature"
_LEAST_BYTES = 16


class SignatureError(ValueError):
    """A manifest has no signature, or one for another key or content; the message names it."""


def signed(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a manifest with its signature added; unchanged if no key is set.

    Raises:
        ValueError: the key is too short.
    """
    key = _key()
    return content if key is None else content | {_SIGNATURE: _signature(key, content)}


def require_signature(content: dict[str, Any], where: object) -> None:
    """Refuse the content of a manifest not signed with the key; without a key accept any.

    Args:
        content: the manifest, as read from its file.
        where: the file, for the message.

    Raises:
        SignatureError: the signature is missing or wrong.
        ValueError: the key is too short.
    """
    key = _key()
    if key is None:
        return
    found = content.get(_SIGNATURE)
    expected = _signature(key, content)
    if not isinstance(found, str) or not hmac.compare_digest(found.encode(), expected.encode()):
        what = "none" if found is None else "another"
        raise SignatureError(
            f"{where} must have a signature by the key in {KEY}, got {what}; write it again with "
            f"the key, or, if you trust it, open it without {KEY}"
        )


def _key() -> bytes | None:
    """The key; None where there is none."""
    text = os.environ.get(KEY)
    if text is None:
        return None
    key = text.encode("utf-8", "surrogateescape")
    if len(key) < _LEAST_BYTES:
        raise ValueError(
            f"{KEY} must have at least {_LEAST_BYTES} bytes, got {len(key)}; take a random one, "
            "such as `openssl rand -hex 32` prints, or unset it"
        )
    return key


def _signature(key: bytes, content: dict[str, Any]) -> str:
    """Over the content as JSON with sorted keys, without the signature itself."""
    stored = json.loads(json.dumps(content))  # keys and tuples as a reader finds them
    stored.pop(_SIGNATURE, None)
    text = json.dumps(stored, sort_keys=True, separators=(",", ":"))
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()
